"""The relay's `backup` and `restore`: what they print."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from arcbridge.cli.output import plain, print_prose, rfc3339
from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import settings_file, start
from arcbridge.errors import ExitCode
from arcbridge.relay.backup import Manifest, make_backup, read_backup, restore_backup


def backup(invocation: Invocation) -> int:
    config = start(invocation, "warning")
    path = Path(invocation.text("file"))
    made = asyncio.run(
        make_backup(
            config,
            path,
            settings_file=settings_file(invocation, os.environ),
            recipients=invocation.texts("recipient"),
            overwrite=invocation.switch("overwrite"),
        )
    )
    how = "encrypted" if invocation.texts("recipient") else "NOT encrypted, and with the relay's CA key in it"
    print_prose(f"{path} is written, {how}:\n{_contents(made)}")
    return ExitCode.DONE


def restore(invocation: Invocation) -> int:
    config = start(invocation, "warning")
    path, identity = Path(invocation.text("file")), invocation.text("identity")
    key = Path(identity) if identity else None
    if invocation.switch("show"):
        manifest, _ = asyncio.run(read_backup(path, key))
        print_prose(_contents(manifest))
        return ExitCode.DONE
    directory = invocation.text("settings")
    done = asyncio.run(
        restore_backup(
            config,
            path,
            identity=key,
            overwrite=invocation.switch("overwrite"),
            settings=Path(directory) if directory else None,
            beside_relays=invocation.switch("yes"),
        )
    )
    since = rfc3339(done.manifest.made)
    lines = [f"restored from {path}:\n{_contents(done.manifest).rstrip()}"]
    if done.kept:
        lines.append(f"{done.kept} revocations of the registry that was there are kept.")
    if directory:
        lines.append(
            f"The settings are in {directory}, and the paths in them are those of the former machine: before the start "
            f"make data_dir {config.data_dir}, or the relay makes another CA; let the others name what is there."
        )
    lines += [
        f"Revocations made after {since} are missing until agents give them back: {done.awaited} clusters are awaited, "
        "and no user begins anything before they were heard, or recovery_wait is over. Revoke again what you know of "
        "(`user revoke`, `cluster revoke`), a cluster above all: its own agents will not tell. Join tokens of the "
        "backup are void: make new ones. Then start the relay; `cluster list` says what is still missing."
    ]
    print_prose("\n".join(lines))
    return ExitCode.DONE


def _contents(manifest: Manifest) -> str:
    revoked = f" ({', '.join(manifest.clusters_revoked)})" if manifest.clusters_revoked else ""
    lines = {
        "made": f"{rfc3339(manifest.made)} by arcbridge {manifest.version}",
        "registry": f"{manifest.kind}, schema {manifest.schema}",
        "relay_ca_pin": manifest.relay_ca_pin,
        "clusters": f"{manifest.clusters}, {len(manifest.clusters_revoked)} names revoked{revoked}",
        "users": f"{manifest.users_revoked} revoked",
        "join tokens": f"{manifest.tokens_open} open",
        "files": ", ".join(manifest.files),
    }
    return "".join(f"  {name + ':':14}{plain(value)}\n" for name, value in lines.items())

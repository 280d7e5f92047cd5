"""Takes away what the client keeps of a user on this machine: processes, contexts, logins, ports, keys, pins, a unit.

It removes what arcbridge makes, by name, and nothing else that lies beside it; settings that the user wrote, backups of
kubeconfigs, kubectl's own caches and the program itself are left. Invariant: state is removed only after all that needs
it is done, so that an uninstallation which failed can be tried again.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from arcbridge.client.background import caller
from arcbridge.client.background.connections import Connection, connected
from arcbridge.client.background.removal import disconnect
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.commands.sign_in import log_out, with_profile
from arcbridge.client.kubeconfig.entries import Kubeconfig
from arcbridge.client.kubeconfig.file import BACKUP_SUFFIX
from arcbridge.client.kubeconfig.running import running_of
from arcbridge.client.relay.relay_profile import RelayProfile, RelayProfiles
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ArcbridgeError, StateError
from arcbridge.settings.config import ClientConfig
from arcbridge.settings.role_settings import find_file
from arcbridge.settings.user_directories import user_directory

UNIT = "arcbridge-client.service"
_STATE = (
    *("pins.toml", "ports.json", "kubeconfigs.json", "connections.json", "background.log*", ".*.lock"),
    *("local-ca", "clusters", "relays", "running", "run", "run-*"),
)
_CACHE = ("tokens", "clusters", "update-notice", "program")
"""Names of what arcbridge makes in its directories of state and cache."""


@dataclass(frozen=True, slots=True)
class Installed:
    """What there is of a user on this machine."""

    state: StateDirectory
    place: BackgroundPaths
    connections: list[Connection]
    kubeconfigs: list[list[Path]]
    """The lists of files with entries of ours."""
    logins: list[RelayProfile]
    unit: Path | None
    """The unit of the user's systemd that starts the background process."""
    paths: list[Path]
    """Files and directories of arcbridge's own."""
    left: list[str]
    """What is not removed, a sentence each."""


def survey(config: ClientConfig, environment: Mapping[str, str]) -> Installed:
    """Look at what there is; changes nothing. Raises StateError while a `proxy` or a `forward` serves contexts."""
    state, place = StateDirectory.find(config.state_dir, environment), BackgroundPaths.find(environment)
    for name in running_of(state, environment).serving():
        raise StateError(f"process {name.partition('-')[0]} serves a context: end it (Ctrl-C), and try again")
    unit = user_directory("config", environment).parent / "systemd" / "user" / UNIT
    connections = connected(place)
    left = [f"settings that you wrote: {file}"] if (file := find_file("client", environment)) is not None else []
    others = {str(one.settings.get("state_dir")) for one in connections if one.settings.get("state_dir") is not None}
    left += [f"the state directory {other}: `arcbridge uninstall --state-dir {other}`" for other in sorted(others)]
    kubeconfigs = [files for files in state.kubeconfigs() if any(file.exists() for file in files)]
    left += [f"the backup {backup}" for files in kubeconfigs for file in files
             for backup in sorted(file.parent.glob(f"{file.name}{BACKUP_SUFFIX}"))]  # fmt: skip
    return Installed(
        state, place, connections, kubeconfigs, RelayProfiles(state.path).all(), unit if unit.exists() else None,
        own_paths(state, place), left,
    )  # fmt: skip


async def uninstall(config: ClientConfig, found: Installed, environment: Mapping[str, str]) -> AsyncIterator[str]:
    """Remove it; yields a sentence for each part that is gone. Raises ArcbridgeError where one cannot be."""
    if found.unit is not None:
        await asyncio.to_thread(_disable)
        found.unit.unlink()
        (found.unit.parent / "default.target.wants" / UNIT).unlink(missing_ok=True)
        yield f"the unit {found.unit}"
    try:
        caller.stop(found.place)
        yield "the background process"
    except caller.NotRunning:
        pass
    for one in disconnect(Path(found.place.connections), (), environment, every=True):
        yield f'context "{one["context"]}"'
    for files in found.kubeconfigs:
        for name in Kubeconfig(files).remove_all():
            yield f'context "{name}"'
    for profile in found.logins:
        try:
            forgotten, warning = await log_out(
                with_profile(ClientConfig(state_dir=config.state_dir), profile), environment
            )
        except ArcbridgeError as error:
            forgotten, warning = False, error.message
        if forgotten or warning:
            yield f"the login at {profile.url}{f' ({warning})' if warning else ''}"
    for path in own_paths(found.state, found.place):
        _remove(path)
    for directory in (found.state.cache, found.state.path):
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
    if found.paths:
        yield f"keys, pins, ports and tokens in {found.state.path} and {found.state.cache}"


def own_paths(state: StateDirectory, place: BackgroundPaths) -> list[Path]:
    """Return the files and directories of arcbridge's own that there are."""
    found = [path for name in _STATE for path in sorted(state.path.glob(name))]
    found += [path for name in _CACHE for path in sorted(state.cache.glob(name))]
    runtime = Path(place.runtime)  # it may be elsewhere, where the state's path is long
    return [*found, runtime] if runtime.is_dir() and runtime not in found else found


def _disable() -> None:
    try:
        subprocess.run(["systemctl", "--user", "disable", "--now", UNIT], check=False, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        pass  # no systemd of this user runs, and the link in `default.target.wants` is all that it had


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StateError(f"cannot remove {error.filename or path}: {error.strerror}") from error

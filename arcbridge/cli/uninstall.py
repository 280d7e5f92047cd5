"""`uninstall`: what it shows before it asks, and what it says of each part."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

from arcbridge.cli.output import plain, print_prose
from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import given_state_dir, load_settings
from arcbridge.cli.terminal import ask_yes, configure_logging, may_ask
from arcbridge.errors import ConfigError, ExitCode
from arcbridge.settings.config import ClientConfig
from arcbridge.single_file import executable, is_single_file

if TYPE_CHECKING:
    from arcbridge.client.commands.uninstall import Installed


def uninstall(invocation: Invocation) -> int:
    """Remove what there is of this user, after a question; print what went and what stays."""
    from arcbridge.cli.loop import run_until_signal
    from arcbridge.client.commands.uninstall import survey

    config: ClientConfig = load_settings(invocation, os.environ)
    configure_logging(config, default_level="error")
    whole = given_state_dir(invocation, os.environ) is None
    return run_until_signal(_uninstall(config, survey(config, os.environ, whole=whole), yes=invocation.switch("yes")))


async def _uninstall(config: ClientConfig, found: Installed, *, yes: bool) -> int:
    from arcbridge.client.commands.uninstall import uninstall

    parts = [
        *([f"the unit {found.unit}"] if found.unit is not None else []),
        *(f'context "{one.context}"' for one in found.connections),
        *(f"entries of arcbridge in {', '.join(map(str, files))}" for files in found.kubeconfigs),
        *(f"the login at {profile.url}" for profile in found.logins),
        *_in_few_lines(found),
    ]
    if parts and not yes:
        if not may_ask():
            raise ConfigError("uninstall asks before it removes anything; give --yes where there is no terminal")
        shown = "".join(f"  {plain(part)}\n" for part in parts)
        begin = "This ends the background process and removes" if found.whole else "This removes"
        if not await ask_yes(f"{begin}\n{shown}Remove all of it? [y/N] "):
            return ExitCode.FAILURE
    async for sentence in uninstall(config, found, os.environ):
        print_prose(f"removed: {plain(sentence)}")
    for sentence in found.left:
        print_prose(f"left: {plain(sentence)}")
    program = f"`rm {executable()}`" if is_single_file() else "`pip uninstall arcbridge`, or as you installed it"
    print_prose(f"left: kubectl's own caches in ~/.kube/cache, and the program itself: {program}")
    return ExitCode.DONE


def _in_few_lines(found: Installed) -> list[str]:
    """Name the files at the top of their directories, and of the others how many there are."""
    paths = found.paths
    shown = Counter(path if path.parent in found.directories else path.parent for path in paths)
    return [str(path) if path in paths else f"{path} ({number} of arcbridge)" for path, number in shown.items()]

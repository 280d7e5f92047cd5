"""Looks at this machine: the directories where arcbridge keeps its files, and the background process.

It changes nothing: what is written to see whether a disk has room has no name and is gone at once. A fault here is in
the way of every command, also of those that never reach a relay.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from arcbridge.checks.diagnosis import Finding, ok, skipped
from arcbridge.client.background.caller import NoAnswer, NotRunning, OtherVersion, answer_of, exchange, request
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.doctor.codes import clip, fault, fault_to_come, sentence
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ArcbridgeError, StateError
from arcbridge.pki.private_files import refuse_foreign_directory
from arcbridge.units import size

PROBE = 64 * 1024
"""Bytes that are written to see whether there is room; a login and its certificates take less."""
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
LITTLE = 16 * 1024 * 1024
"""Bytes below which a disk counts as almost full."""


def look_at_directories(state_dir: Path | None, environment: Mapping[str, str]) -> Finding:
    """Look at the directories of state, of tokens and of the background process; `state_dir`: that of the settings."""
    hop = "state directory"
    of_background = Path(BackgroundPaths.find(environment).state)
    try:
        state = StateDirectory.find(state_dir, environment)
        refuse_foreign_directory(of_background)
    except StateError as error:
        return fault(hop, sentence(error), "state_directory")
    paths = (state.path, state.cache)
    directories = list(dict.fromkeys((*paths, of_background)))
    for directory in directories:
        if (found := _unusable(hop, directory)) is not None:
            return found
    for directory in directories:
        if directory.is_dir() and os.name == "posix" and stat.S_IMODE(directory.stat().st_mode) & 0o020:
            detail = f"the group of {clip(str(directory))} can change what is in it"
            return fault_to_come(hop, detail, "state_open")
    free = min(_free(directory) for directory in directories)
    text = f"{' and '.join(clip(str(one)) for one in paths)} can be written to, {size(free)} free"
    return fault_to_come(hop, text, "disk_full") if free < LITTLE else ok(hop, text)


def _unusable(hop: str, directory: Path) -> Finding | None:
    """Return what is wrong where nothing can be written into a directory, or it cannot be made."""
    place = _existing(directory)
    name = clip(str(place))
    if not place.is_dir():
        return fault(hop, f"{name} is a file, and arcbridge keeps its files in a directory there", "state_directory")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * PROBE)
            file.flush()
    except OSError as error:
        code = "disk_full" if error.errno in _FULL else "state_directory"
        return fault(hop, f"nothing can be written into {name} ({(error.strerror or str(error)).lower()})", code)
    return None


def _existing(directory: Path) -> Path:
    """Return a directory, or the first above it that is there."""
    return next(one for one in (directory, *directory.parents) if os.path.lexists(one))


def _free(directory: Path) -> int:
    return shutil.disk_usage(_existing(directory)).free


def look_at_background(environment: Mapping[str, str], cluster: str) -> Finding:
    """Ask the background process whether it lives, and what it says of `cluster`; blocks for some seconds at most."""
    hop = "background process"
    if sys.platform == "win32":
        return skipped(hop, "there is none on Windows")
    from arcbridge.client.background.lock_holder import is_held, silence

    place = BackgroundPaths.find(environment)
    try:
        answer = answer_of(exchange(place, request("status")))
        process, served = answer["process"], answer["clusters"]
        text = f"pid {int(process['pid'])}, serves {len(served)} cluster{'' if len(served) == 1 else 's'}"
        return ok(hop, f"{text}{_reasons(served, cluster)}")
    except NotRunning:
        if is_held(place):
            return fault(hop, silence(place), "background_silent")
        return skipped(hop, "none runs; kubectl starts it when a context needs it")
    except OtherVersion as other:
        return ok(hop, f"version {clip(str(other))}; the next command of this version replaces it")
    except NoAnswer:
        return fault(hop, silence(place), "background_silent")
    except (ArcbridgeError, KeyError, TypeError, ValueError) as error:
        return fault(
            hop, sentence(error) if isinstance(error, ArcbridgeError) else "its answer cannot be read", "background"
        )


def _reasons(served: Iterable[Mapping[str, object]], cluster: str) -> str:
    """Say why `cluster` has no session there: its connection may have other settings than these."""
    found = [one for one in served if one.get("name") == cluster and one.get("reason")]
    return "".join(f"; {clip(cluster)} there: {clip(str(one['reason']))}" for one in found[:1])

"""Processes of other users of this machine: a real uid and gid, no groups, no capabilities.

A test that needs them runs as root. Where the interpreter lies in a directory that only root may enter, the process
gets a mount namespace of its own in which that directory is passable and holds the interpreter alone.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from tests.support.processes import require_or_skip

OWNER = 61_001
"""The uid (and gid) of the user who runs a client."""
OTHER = 61_002
"""The uid (and gid) of another user of the machine."""

_HIDDEN = """
set -e
uid=$1 mask=$2 hidden=$3 base=$4; shift 4
if [ -n "$hidden" ]; then
    kept=$(mktemp -d)
    mount --bind "$base" "$kept"
    mount -t tmpfs -o mode=755 none "$hidden"
    mkdir -p "$base"
    mount --move "$kept" "$base"
    rmdir "$kept"
fi
umask "$mask"
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups --inh-caps=-all --pdeathsig KILL "$@"
"""


def as_user(uid: int, *, umask: int = 0o022) -> tuple[str, ...]:
    """What a command line begins with, so that it runs as the user `uid`."""
    hidden = _hidden()
    namespace = ("unshare", "--mount", "--propagation", "private") if hidden else ()
    return (*namespace, "sh", "-c", _HIDDEN, "as-user", str(uid), f"{umask:03o}", hidden, sys.base_prefix)


def require_users() -> None:
    """Skip the test, or fail it where ARCBRIDGE_REQUIRE lists `uid`, if processes of other users cannot be had."""
    if sys.platform != "linux" or os.geteuid() != 0:
        require_or_skip("uid", "only root starts processes of other users: run the tests as root")
    for program in ("setpriv", "unshare"):
        if shutil.which(program) is None:
            require_or_skip("uid", f"{program} is missing; install util-linux")


def _hidden() -> str:
    """The directory above the interpreter that other users may not enter; empty if there is none."""
    for directory in reversed(Path(sys.base_prefix).parents):
        if not directory.stat().st_mode & 0o001:
            return str(directory)
    return ""

"""Processes of other users of this machine: a real uid and gid, no groups, no capabilities.

A test that needs them runs as root. Where the interpreter or the repository lies in a directory that only root may
enter, the process gets a mount namespace of its own in which that directory is passable and holds nothing else.
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

_ENTER = """
set -e
uid=$1 mask=$2 needed=$3 hidden=$4; shift 4
newline='
'
if [ -n "$hidden" ]; then
    IFS=$newline
    kept=$(mktemp -d) number=0
    for path in $needed; do
        mkdir "$kept/$number"
        mount --bind "$path" "$kept/$number"
        number=$((number + 1))
    done
    for path in $hidden; do
        mount -t tmpfs -o mode=755 none "$path"
    done
    number=0
    for path in $needed; do
        mkdir -p "$path"
        mount --move "$kept/$number" "$path"
        rmdir "$kept/$number"
        number=$((number + 1))
    done
    rmdir "$kept"
    unset IFS
    cd /
fi
umask "$mask"
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups --inh-caps=-all --pdeathsig KILL "$@"
"""


def as_user(uid: int, *, umask: int = 0o022) -> tuple[str, ...]:
    """What a command line begins with, so that it runs as the user `uid`."""
    needed = _needed()
    hidden = "\n".join(dict.fromkeys(needed.values()))
    namespace = ("unshare", "--mount", "--propagation", "private") if hidden else ()
    return (*namespace, "sh", "-c", _ENTER, "as-user", str(uid), f"{umask:03o}", "\n".join(needed), hidden)


def require_users() -> None:
    """Skip the test, or fail it where ARCBRIDGE_REQUIRE lists `uid`, if processes of other users cannot be had."""
    if sys.platform != "linux" or os.geteuid() != 0:
        require_or_skip("uid", "only root starts processes of other users: run the tests as root")
    for program in ("setpriv", "unshare"):
        if shutil.which(program) is None:
            require_or_skip("uid", f"{program} is missing; install util-linux")


def _needed() -> dict[str, str]:
    """What a process of the tests reads, where another user cannot: the interpreter, its environment, the repository.

    Each with the outermost directory above it that the user may not enter.
    """
    found: dict[str, str] = {}
    for path in (Path(__file__).parents[2], Path(sys.prefix), Path(sys.base_prefix)):
        closed = [str(one) for one in reversed(path.parents) if not one.stat().st_mode & 0o001]
        if closed and not any(path.is_relative_to(other) for other in found):
            found[str(path)] = closed[0]
    return found

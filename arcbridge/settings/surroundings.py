"""Finds what of this machine is in the way of a start: who listens on a port, who has a file open, a disk that is full.

It reads /proc, where the system has one, and only what this user may read: an empty answer means that nothing is known.
It opens no port and asks no process anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Final

from arcbridge.settings.named_files import nearest

_PROC: Final = Path("/proc")
LEAST: Final = 256 * 1024
"""Bytes that must be free on a disk: a registry's files and a certificate take less."""
_LISTENS: Final = "0A"
"""The state of a listening socket in /proc/net/tcp (TCP_LISTEN)."""


def listeners(port: int) -> frozenset[int]:
    """Return the processes that listen on a TCP port of this machine, by any address."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    return frozenset(_having(lambda path: os.readlink(path) in sockets)) if sockets else frozenset()


def holders(file: Path) -> frozenset[int]:
    """Return the processes that have a file open."""
    try:
        wanted = file.stat()
    except OSError:
        return frozenset()
    end = f"/{os.path.basename(os.path.realpath(file))}"
    # The name first: a descriptor of a dead network disk is asked for nothing, and a path may differ by its mount.
    return frozenset(_having(lambda at: os.readlink(at).endswith(end) and os.path.samestat(os.stat(at), wanted)))


def _having(is_it: Callable[[str], bool]) -> Iterator[int]:
    """Yield the processes of which a descriptor is what is looked for; not this one."""
    with contextlib.suppress(OSError):
        for process in os.listdir(_PROC):
            if process.isdigit() and int(process) != os.getpid() and _has(process, is_it):
                yield int(process)


def _has(process: str, is_it: Callable[[str], bool]) -> bool:
    try:
        descriptors = os.listdir(_PROC / process / "fd")
    except OSError:
        return False  # it has ended, or is another user's
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            if is_it(f"{_PROC}/{process}/fd/{descriptor}"):
                return True
    return False


def named(processes: frozenset[int], *, join: str = " by ") -> str:
    """Return ` by NAME (process ID)` for the first of some processes; empty where none is known."""
    for process in sorted(processes):
        with contextlib.suppress(OSError):
            name = (_PROC / str(process) / "comm").read_text(errors="replace").strip()  # a process chooses it itself
            return f"{join}{''.join(one if one.isprintable() else '?' for one in name)} (process {process})"
    return ""


def runs_with(process: int, role: str, file: Path | None, default: Path | None) -> bool:
    """Return whether a process was given this settings file; `default` is the one of arcbridge in `role` that was given
    none. None: flags and environment alone."""
    try:
        words = os.fsdecode((_PROC / str(process) / "cmdline").read_bytes()).split("\0")
        variables = os.fsdecode((_PROC / str(process) / "environ").read_bytes()).split("\0")
        directory = Path(os.readlink(_PROC / str(process) / "cwd"))
    except OSError:
        return False
    if given := _given("config", words, variables):
        found: Path | None = directory / given
    elif any(Path(word).name == "arcbridge" for word in words) and _given("role", words, variables) == role:
        found = default
    else:
        return False
    return (found and found.absolute()) == (file and file.absolute())


def _given(name: str, words: list[str], variables: list[str]) -> str:
    """Return the value of a flag in a command line, else that of its variable; empty where neither is given."""
    found = [after for word, after in pairwise(words) if word == f"--{name}"]
    for prefix, given in ((f"--{name}=", words), (f"ARCBRIDGE_{name.upper()}=", variables)):
        found += [one.removeprefix(prefix) for one in given if one.startswith(prefix)]
    return found[0] if found else ""


def is_full(path: Path) -> str:
    """Return why nothing more can be written where `path` is, or will be made; empty where it can, or none knows."""
    try:
        disk = os.statvfs(nearest(path))
    except (OSError, AttributeError):
        return ""
    if disk.f_flag & os.ST_RDONLY:
        return f"the disk of {path} is mounted read-only: remount it, or choose another directory"
    blocks, files = (disk.f_bfree, disk.f_ffree) if os.geteuid() == 0 else (disk.f_bavail, disk.f_favail)
    if disk.f_blocks and blocks * disk.f_frsize < LEAST:
        return f"the disk of {path} is full ({blocks * disk.f_frsize} bytes are free): make room"
    if disk.f_files and not files:
        return f"the disk of {path} takes no more files (its inodes are used up): remove some"
    return ""

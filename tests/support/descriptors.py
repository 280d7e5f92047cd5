"""Which file descriptors this process holds, and a process without a free one for as long as a test wants."""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from arcbridge.net.sockets import AcceptLoop


def held() -> frozenset[tuple[str, str]]:
    """Return number and kind (a path, or `socket`, `pipe`) of each open descriptor.

    A test that counts them before and after is wrong where another thread closes one meanwhile, and sees no leak behind
    it: what is in the later set alone has been left open. Empty where the system is not Linux, and shows none of this.
    """
    if sys.platform != "linux":
        return frozenset()
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            # Without the inode: uvloop makes the pair of sockets that wakes it anew for each run.
            found.append((number, os.readlink(f"/proc/self/fd/{number}").partition(":")[0]))
        except FileNotFoundError:
            pass  # the directory's own, or one that another thread has closed
    return frozenset(found)


# What uvloop opens once for a process.
AT_ONCE = {"/dev/null"}


def left_open(before: frozenset[tuple[str, str]]) -> set[str]:
    """Return the kinds of which there are descriptors that were not open `before`, and more than there were.

    New numbers alone say too little: uvloop makes its pair of sockets anew for each run, and takes other numbers for it
    where lower ones have become free.
    """
    now = held()
    more = Counter(kind for _, kind in now) - Counter(kind for _, kind in before)
    return {kind for _, kind in now - before} & set(more)


@contextmanager
def none_left() -> Iterator[None]:
    """Lower this process's soft limit and take every number below it; all are given back at the end."""
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
    try:
        while True:
            try:
                taken.append(os.dup(0))
            except OSError:
                break
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def pauses_of(loop: AcceptLoop) -> list[bool]:
    """Return a list that grows with each pause of an accept loop: whether the pause before has not helped."""
    pauses: list[bool] = []
    told = loop._exhausted

    def exhausted(listening: socket.socket, error: OSError, again: bool) -> None:
        pauses.append(again)
        told(listening, error, again)

    loop._exhausted = exhausted
    return pauses

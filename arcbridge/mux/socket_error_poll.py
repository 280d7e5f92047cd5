"""A reset that comes with a socket's last bytes: heard of without asking at each read.

uvloop calls once for a socket in error, bytes or not, and then never again. Asking behind each read costs a system
call per frame; so all sockets that were read since the last look are asked together, by one timer per loop, which
exists only while there is one to ask.
"""

from __future__ import annotations

import asyncio
from typing import Protocol
from weakref import WeakKeyDictionary

LOOK_EVERY = 0.2
"""Seconds between two looks."""


class Looker(Protocol):
    """Owner of a socket that was read."""

    def look(self) -> None:
        """Find out whether the socket is in error; `SocketErrorPoll.add` is needed again for another look."""


class SocketErrorPoll:
    """Those to ask at the next look; one per loop (`lookout`)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._read: set[Looker] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, looker: Looker) -> None:
        """Ask `looker` at the next look."""
        self._read.add(looker)
        if self._timer is None:
            self._timer = self._loop.call_later(LOOK_EVERY, self._look)

    def remove(self, looker: Looker) -> None:
        """`looker` has closed its socket."""
        self._read.discard(looker)
        if not self._read and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        read, self._read = self._read, set()
        try:
            while read:
                read.pop().look()
        finally:
            for looker in read:  # one has raised: the others are asked next time
                self.add(looker)


_lookouts: WeakKeyDictionary[asyncio.AbstractEventLoop, SocketErrorPoll] = WeakKeyDictionary()


def lookout() -> SocketErrorPoll:
    """The running loop's."""
    loop = asyncio.get_running_loop()
    found = _lookouts.get(loop)
    if found is None:
        found = _lookouts[loop] = SocketErrorPoll(loop)
    return found

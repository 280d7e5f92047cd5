"""Polls sockets for a pending error (SO_ERROR), so that a reset is noticed that comes with a socket's last bytes.

uvloop reports an error only once, together with the last bytes, so a socket that was read is polled again. A poll after
each read would cost a system call per frame: one timer per loop polls all sockets that were read since it last fired,
and it exists only while there are any. The module reads no socket itself; their owners do.
"""

from __future__ import annotations

import asyncio
from typing import Protocol
from weakref import WeakKeyDictionary

POLL_EVERY = 0.2
"""Seconds between two polls."""


class PolledSocket(Protocol):
    """Owner of a socket that was read."""

    def poll_error(self) -> None:
        """Find out whether the socket is in error; `SocketErrorPoll.add` is needed again for another poll."""


class SocketErrorPoll:
    """The sockets to poll next; one per loop (`socket_error_poll`)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._read: set[PolledSocket] = set()
        """Sockets that were read since the last poll."""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, polled: PolledSocket) -> None:
        """Include a socket that was read in the next poll."""
        self._read.add(polled)
        if self._timer is None:
            self._timer = self._loop.call_later(POLL_EVERY, self._poll)

    def remove(self, polled: PolledSocket) -> None:
        """Leave out a socket that was closed."""
        self._read.discard(polled)
        if not self._read and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _poll(self) -> None:
        self._timer = None
        read, self._read = self._read, set()
        try:
            while read:
                read.pop().poll_error()
        finally:
            for polled in read:  # one has raised: the others are polled next time
                self.add(polled)


class TransportErrorPoll:
    """Makes one transport find its socket's error, because it learns of readiness from `loop.add_reader` alone.

    uvloop reports a reset that comes with the last bytes together with them, and never again.
    """

    __slots__ = ("_poll", "_transport", "included")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._poll = socket_error_poll()
        self.included = False
        """Whether the next poll includes this transport."""

    def was_read(self) -> None:
        """Include the transport in the next poll: call it after each read."""
        if not self.included:
            self.included = True
            self._poll.add(self)

    def poll_error(self) -> None:
        """Make the transport read again, which finds a pending error (called by the poll)."""
        self.included = False
        if self._transport.is_reading():
            self._transport.pause_reading()
            self._transport.resume_reading()

    def stop(self) -> None:
        """Poll no more: the connection is lost."""
        self._poll.remove(self)


_polls: WeakKeyDictionary[asyncio.AbstractEventLoop, SocketErrorPoll] = WeakKeyDictionary()


def socket_error_poll(loop: asyncio.AbstractEventLoop | None = None) -> SocketErrorPoll:
    """Return the poll of the running loop, which a caller that knows the loop need not look up."""
    loop = loop or asyncio.get_running_loop()
    found = _polls.get(loop)
    if found is None:
        found = _polls[loop] = SocketErrorPoll(loop)
    return found

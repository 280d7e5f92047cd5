"""Holds the payload of one session back: for its pacer, for the event loop, and while its readers are too far behind.

It counts nothing itself and decides no rate. Invariants: nothing is lost by a hold; and one that has begun is followed
by another only while there is a reason, so that PINGs are answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from arcbridge.wire.session import Session, State

AHEAD_FREE = 256 * 1024
"""Bytes that a session may hold for readers that stopped, however much others hold: one first window."""

AHEAD_PAUSE = 0.1
"""Seconds between two looks whether there is room again for what a peer sends ahead of its readers."""

PACED = 4 * 1024
"""Bytes of a direction that come together before the pacer counts them: small frames do not call it."""


class Pacer(Protocol):
    """Says how fast a session may move bytes; several sessions may share one."""

    def bytes_sent(self, count: int, now: float) -> float:
        """Count bytes that left; return the seconds for which payload waits. `now`: monotonic seconds."""

    def bytes_received(self, count: int, now: float) -> float:
        """Count bytes that came; return the seconds for which no more are read."""


class Pacing:
    """The holds of one session, one for each direction."""

    __slots__ = (
        "_loop",
        "_machine",
        "_transport",
        "_wake",
        "pacer",
        "reading_held",
        "received",
        "sending_held",
        "sent",
    )

    def __init__(self, machine: Session, wake: Callable[[], None]) -> None:
        """`wake` has what waited sent in this turn of the loop."""
        self._loop = asyncio.get_running_loop()
        self._machine = machine
        self._wake = wake
        self._transport: asyncio.Transport | None = None
        """That of the connection that carries the session."""
        self.pacer: Pacer | None = None
        """What bounds the bytes a second; None: nothing does."""
        self.received = self.sent = 0
        """Bytes of the session, in each direction, that the pacer has counted."""
        self.sending_held: asyncio.TimerHandle | None = None
        """Runs while payload waits."""
        self.reading_held: asyncio.TimerHandle | None = None
        """Runs while nothing is read."""

    def connection_changed(self, transport: asyncio.Transport | None) -> None:
        """Hold another connection from now on (None: there is none); it is read until the next hold."""
        if self.reading_held is not None:
            self.reading_held.cancel()
            self.reading_held = None
        self._transport = transport

    def count_received(self, pacer: Pacer, now: float) -> None:
        """Have the pacer count what came, and read nothing for as long as it says."""
        total = self._machine.stats.bytes_received
        count, self.received = total - self.received, total
        if wait := pacer.bytes_received(count, now):
            self.hold_reading(wait)

    def count_sent(self, pacer: Pacer, now: float) -> None:
        """Have the pacer count what left, and send no payload for as long as it says."""
        total = self._machine.stats.bytes_sent
        count, self.sent = total - self.sent, total
        if wait := pacer.bytes_sent(count, now):
            self.hold_sending(wait)

    def hold(self, wait: float) -> None:
        """Move no payload for `wait` seconds, in either direction."""
        self.hold_reading(wait)
        self.hold_sending(wait)

    def hold_sending(self, wait: float) -> None:
        """Send no payload for `wait` seconds."""
        if self.sending_held is None and self._machine.state is not State.CLOSED:
            self._machine.sender.set_paced(True)
            self.sending_held = self._loop.call_later(wait, self._resume_sending)

    def hold_reading(self, wait: float) -> None:
        """Read nothing for `wait` seconds: the peer's bytes wait in the path, and its sender adapts to that."""
        transport = self._transport
        if self.reading_held is None and transport is not None and not transport.is_closing():
            transport.pause_reading()
            self.reading_held = self._loop.call_later(wait, self._resume_reading, transport)

    def stop(self) -> None:
        """Count the rest, and hold nothing any more: the session is over, and its peer's close_notify may have come
        already."""
        if (pacer := self.pacer) is not None:
            now = monotonic()
            self.count_received(pacer, now)
            self.count_sent(pacer, now)
        if self.reading_held is not None and self._transport is not None:
            self._transport.resume_reading()
        self.connection_changed(None)
        if self.sending_held is not None:
            self.sending_held.cancel()
        self.sending_held = self.pacer = None

    def _resume_sending(self) -> None:
        self.sending_held = None
        if self.pacer is not None and (wait := self.pacer.bytes_sent(0, monotonic())):
            self.sending_held = self._loop.call_later(wait, self._resume_sending)
            return
        self._machine.sender.set_paced(False)
        self._wake()

    def _resume_reading(self, transport: asyncio.Transport) -> None:
        """Read again, whatever the pacer would say now: PINGs have to be answered. A session that is too far ahead of
        its readers waits on: there is no room for what would come."""
        self.reading_held = None
        if transport.is_closing():
            return
        ahead = self._machine.ahead
        self._machine.session_window.count()
        if ahead.held >= AHEAD_FREE and ahead.spent:
            self.reading_held = self._loop.call_later(AHEAD_PAUSE, self._resume_reading, transport)
        else:
            transport.resume_reading()

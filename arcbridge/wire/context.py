"""Holds what the parts of one session share, and what they ask of the session that owns them.

A part gets the context and the parts that it needs, never the session itself: so each is tested alone. The module
decides nothing. Invariant: a session has one context, which all of its parts share.
"""

from __future__ import annotations

import sys
from typing import Protocol

from arcbridge.errors import ArcbridgeError
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.events import Event
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.limits import Limits
from arcbridge.wire.state import Kind, Side, Stats
from arcbridge.wire.stream import Stream


class Owner(Protocol):
    """What a part of a session asks of the session."""

    def fail(self, code: GoawayCode, message: str) -> None:
        """End the session with a GOAWAY, because the peer broke the protocol or a limit."""

    def end(self, error: ArcbridgeError) -> None:
        """End the session without a GOAWAY of its own; after the first call it changes nothing."""

    def say_hello(self) -> None:
        """Queue HELLO, once."""

    def establish(self) -> None:
        """Open the session: the handshake is complete."""

    def acknowledged(self, received: int) -> None:
        """Note that the peer has `received` bytes of our sequence. Raises `Violation` for more than were sent."""

    def send_ping(self) -> None:
        """Queue a PING; before the handshake is complete it changes nothing."""

    def finish_drain_if_idle(self) -> None:
        """End a draining session whose last stream is over."""

    def stream_sent(self, stream: Stream) -> None:
        """Settle a finishing stream whose last bytes leave, with FIN behind them."""

    def stream_cut(self, stream: Stream) -> None:
        """Settle a stream that was cut and whose last bytes leave, with RESET behind them."""


class SessionContext:
    """What the parts of one session share."""

    def __init__(
        self, owner: Owner, side: Side, kind: Kind, limits: Limits, now: float, backlog: Backlog | None = None
    ) -> None:
        """`backlog`: of which the session's is a part."""
        self.owner = owner
        self.side = side
        self.kind = kind
        self.limits = limits
        self.now = now
        """The latest `now` that the session was given, monotonic seconds."""
        self.backlog = Backlog(limits.backlog, backlog)
        """Bytes that wait towards the peer."""
        self.ahead = Backlog(sys.maxsize)
        """Bytes of the peer that no reader has taken yet, as of the latest `SessionWindow.count`."""
        self.stats = Stats()
        self.events: list[Event] = []
        """What happened since the shell asked last, in order."""
        self.streams: dict[int, Stream] = {}
        """Streams that are not over, by id."""

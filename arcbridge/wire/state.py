"""Words that the parts of a session share: side, kind, state, counters, and the context in which the parts work.

The module decides nothing. `wire.lifecycle` has the table of state changes.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from arcbridge.errors import ArcbridgeError
    from arcbridge.wire.events import Event
    from arcbridge.wire.frames import GoawayCode
    from arcbridge.wire.limits import Limits
    from arcbridge.wire.stream import Stream


class Side(Enum):
    """Which end dialled. The initiator's stream ids are odd, and it authenticates."""

    INITIATOR = 1
    ACCEPTOR = 0


class Kind(Enum):
    """What the connection carries."""

    SESSION = "session"
    CONTROL = "control"


class State(Enum):
    """State of a session or control connection; `wire.lifecycle` has the table."""

    HELLO = "hello"
    AUTH = "auth"
    OPEN = "open"
    DRAINING = "draining"
    DETACHED = "detached"
    CLOSED = "closed"


class Owner(Protocol):
    """What a part of a session asks of the session."""

    def fail(self, code: GoawayCode, message: str) -> None:
        """End the session with a GOAWAY, because the peer broke the protocol or a limit."""

    def end(self, error: ArcbridgeError) -> None:
        """End the session without a GOAWAY of its own; after the first call it changes nothing."""

    def acknowledged(self, received: int) -> None:
        """The peer has `received` bytes of our sequence. Raises `Violation` for more than were sent."""

    def send_ping(self) -> None:
        """Queue a PING; before the handshake is complete it changes nothing."""

    def finish_drain_if_idle(self) -> None:
        """End a draining session whose last stream is over."""

    def stream_sent(self, stream: Stream) -> None:
        """The last bytes of a finishing stream leave, with FIN behind them."""

    def stream_cut(self, stream: Stream) -> None:
        """The last bytes of a stream that was cut leave, with RESET behind them."""


class Stats:
    """Counters, read at any time; plain integers."""

    __slots__ = (
        "bytes_received",
        "bytes_sent",
        "detached",
        "dropped_bytes",
        "ignored_frames",
        "replayed_bytes",
        "resets_received",
        "resets_sent",
        "resumed",
        "streams_opened",
        "streams_refused",
    )

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    bytes_received: int
    bytes_sent: int
    detached: int
    dropped_bytes: int
    ignored_frames: int
    replayed_bytes: int
    resets_received: int
    resets_sent: int
    resumed: int
    streams_opened: int
    streams_refused: int


class SessionContext:
    """What the parts of one session share."""

    __slots__ = ("events", "kind", "limits", "now", "owner", "side", "stats", "streams")

    def __init__(self, owner: Owner, side: Side, kind: Kind, limits: Limits, now: float) -> None:
        self.owner = owner
        self.side = side
        self.kind = kind
        self.limits = limits
        self.now = now
        """The latest `now` that the session was given, monotonic seconds."""
        self.stats = Stats()
        self.events: list[Event] = []
        """What happened since the shell asked last, in order."""
        self.streams: dict[int, Stream] = {}
        """Streams that are not over, by id."""

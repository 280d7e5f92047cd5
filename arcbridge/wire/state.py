"""Words that the parts of a session share: side, kind, state, and its counters.

The module decides nothing. `wire.lifecycle` has the table of state changes.
"""

from __future__ import annotations

from enum import Enum


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


class Stats:
    """Counters, read at any time; plain integers."""

    __slots__ = (
        "bytes_received",
        "bytes_sent",
        "detached",
        "replayed_bytes",
        "resumed",
    )

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    bytes_received: int
    bytes_sent: int
    detached: int
    replayed_bytes: int
    resumed: int

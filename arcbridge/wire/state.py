"""Words that the parts of a session share: side, kind, state, and its counters.

The module decides nothing. `wire.lifecycle` has the table of state changes.
"""

from __future__ import annotations

from dataclasses import dataclass
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


STATE_DETACHED, STATE_CLOSED = State.DETACHED, State.CLOSED  # as names of the module: see `wire.stream`
STATES_OF_OPENING = (State.OPEN, State.AUTH, State.HELLO)
"""In which a session opens streams."""


@dataclass(slots=True)
class Stats:
    """Counters, read at any time; plain integers."""

    bytes_received: int = 0
    bytes_sent: int = 0
    detached: int = 0
    replayed_bytes: int = 0
    resumed: int = 0

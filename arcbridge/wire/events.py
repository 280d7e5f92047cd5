"""Lists what the session machine reports to the shell: what happened to streams and connections, and records that came.

A record of the peer that the shell acts on is an event itself. Payload is none: it goes straight to its stream's sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from arcbridge.errors import ArcbridgeError
from arcbridge.wire.records import Auth, AuthOk, CaSuccession, Dial, Goaway, Hello, Ledger, Move, Revoke, Status

if TYPE_CHECKING:
    from arcbridge.wire.stream import Stream


@dataclass(slots=True)
class StreamOpened:
    """The peer opened a stream. Its DATA waits in the stream until a sink is set."""

    stream: Stream
    target: str


@dataclass(slots=True)
class StreamFinished:
    """The peer's direction ended in order, after every byte before it was handed over."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class StreamWasReset:
    """The stream is over: the peer reset it or broke the protocol within it, or a drain's deadline passed."""

    stream: Stream
    code: int


@dataclass(frozen=True, slots=True)
class Detached:
    """The connection is gone; the session waits to be resumed."""

    error: ArcbridgeError


@dataclass(frozen=True, slots=True)
class ResumeFailed:
    """The connection that should have resumed the session did not; the session still waits."""

    error: ArcbridgeError


@dataclass(frozen=True, slots=True)
class Resumed:
    """The session goes on over its new connection."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The machine is closed; comes exactly once and last. Every stream has been told before."""

    error: ArcbridgeError


Reported = Hello | Auth | AuthOk | Goaway | Dial | Status | Revoke | Ledger | Move | CaSuccession
"""HELLO that was accepted; a token to verify, at first and at each renewal, and the acceptor's consent; GOAWAY; what
goes over control connections; and the acceptor's wish for another connection."""

Event = Reported | StreamOpened | StreamFinished | StreamWasReset | Detached | ResumeFailed | Resumed | Ended

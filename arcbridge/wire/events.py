"""Lists what the session machine reports to the shell. Payload is no event: it goes straight to its stream's sink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from arcbridge.errors import ArcbridgeError
from arcbridge.wire.records import Auth, AuthOk, Dial, Goaway, Hello, Revoke, Status

if TYPE_CHECKING:
    from arcbridge.wire.stream import Stream


@dataclass(frozen=True, slots=True)
class HelloReceived:
    """The peer's HELLO was accepted."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class AuthReceived:
    """A token to verify: answer with `accept_auth` or `close`. Comes again at each renewal."""

    auth: Auth


@dataclass(frozen=True, slots=True)
class AuthAccepted:
    """The acceptor took the token."""

    ok: AuthOk


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The peer opened a stream. Its DATA waits in the stream until a sink is set."""

    stream: Stream
    target: str


@dataclass(frozen=True, slots=True)
class StreamFinished:
    """The peer's direction ended in order, after every byte before it was handed over."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class StreamWasReset:
    """The stream is over: the peer reset it or broke the protocol within it, or a drain's deadline passed."""

    stream: Stream
    code: int


@dataclass(frozen=True, slots=True)
class GoawayReceived:
    """The peer takes no streams above `goaway.last_stream`."""

    goaway: Goaway


@dataclass(frozen=True, slots=True)
class DialReceived:
    """A dial request (control connections)."""

    dial: Dial


@dataclass(frozen=True, slots=True)
class StatusReceived:
    """An agent's status (control connections)."""

    status: Status


@dataclass(frozen=True, slots=True)
class RevokeReceived:
    """A relay's revocation of one user (control connections)."""

    revoke: Revoke


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
class MoveRequested:
    """The acceptor asks for another connection in place of the one made under `join_id`."""

    join_id: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The machine is closed; comes exactly once and last. Every stream has been told before."""

    error: ArcbridgeError


Event = (
    HelloReceived
    | AuthReceived
    | AuthAccepted
    | StreamOpened
    | StreamFinished
    | StreamWasReset
    | GoawayReceived
    | DialReceived
    | StatusReceived
    | RevokeReceived
    | Detached
    | ResumeFailed
    | Resumed
    | MoveRequested
    | Ended
)

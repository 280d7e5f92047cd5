"""The state of a session or control connection: its table of changes, its deadlines, and how it ends.

`TRANSITIONS` is the table that the code executes: a change that it does not name raises `LocalProtocolError` and
changes nothing. The module sends nothing and keeps no stream; `wire.session` acts on what it decides.

=========  ==================================================  ====================================================
state      meaning                                             changes
=========  ==================================================  ====================================================
HELLO      waits for the peer's HELLO                          HELLO -> AUTH; on a control connection -> OPEN
AUTH       waits for AUTH, its verdict, or AUTH_OK             `accept_auth` or AUTH_OK -> OPEN
OPEN       streams come and go                                 GOAWAY either way -> DRAINING; lost connection of a
                                                               resumable session -> DETACHED
DRAINING   opens nothing; streams that run may finish          lost connection of a resumable session -> DETACHED
DETACHED   has no connection; streams wait                     a connection that resumes -> OPEN, or DRAINING where
                                                               GOAWAY was said
CLOSED     `Ended` was given; input is ignored                 none
=========  ==================================================  ====================================================

Every state changes to CLOSED: by an error, by a lost connection that cannot be resumed, by a deadline, or when the
last stream of a draining session is over.
"""

from __future__ import annotations

from enum import Enum

from arcbridge.errors import ArcbridgeError, LocalProtocolError, SessionEnded
from arcbridge.refusals import read_refusal
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.keepalive import Keepalive
from arcbridge.wire.limits import Limits
from arcbridge.wire.records import Goaway
from arcbridge.wire.state import Kind, State

DRAIN_CODES = frozenset({GoawayCode.DONE, GoawayCode.DRAINING, GoawayCode.REPLACED})
"""GOAWAY codes after which the streams that run may finish, unless `final` is set."""


class Violation(Exception):
    """The peer broke the protocol; the session ends with `code`."""

    def __init__(self, code: GoawayCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def ended_by(goaway: Goaway) -> SessionEnded:
    """Make the error with which the peer's GOAWAY ends the session."""
    message = goaway.message or "the other end ended the session"
    refusal = read_refusal(goaway.rule, goaway.wanted)
    return SessionEnded(goaway.code, message, retry_after=goaway.retry_after or None, refusal=refusal)


class Change(Enum):
    """What moves a session from one state to another."""

    GREET = "HELLO of the peer"
    ESTABLISH = "end of the handshake"
    DRAIN = "GOAWAY"
    DETACH = "loss of the connection"
    RESUME = "a connection that resumes"
    RESUME_DRAINING = "a connection that resumes a draining session"
    CLOSE = "end of the session"


TRANSITIONS: dict[State, dict[Change, State]] = {
    State.HELLO: {Change.GREET: State.AUTH, Change.ESTABLISH: State.OPEN, Change.DRAIN: State.DRAINING},
    State.AUTH: {Change.ESTABLISH: State.OPEN, Change.DRAIN: State.DRAINING},
    State.OPEN: {Change.DRAIN: State.DRAINING, Change.DETACH: State.DETACHED},
    State.DRAINING: {
        Change.GREET: State.DRAINING,
        Change.ESTABLISH: State.DRAINING,
        Change.DRAIN: State.DRAINING,
        Change.DETACH: State.DETACHED,
    },
    State.DETACHED: {Change.DRAIN: State.DETACHED, Change.RESUME: State.OPEN, Change.RESUME_DRAINING: State.DRAINING},
    State.CLOSED: {},
}
"""State -> change -> next state. A change that is missing is not lawful in that state."""
for _state, _row in TRANSITIONS.items():
    if _state is not State.CLOSED:
        _row[Change.CLOSE] = State.CLOSED


class Deadline(Enum):
    """What a session waits for no longer."""

    RESUMPTION = "a connection that resumes"
    HANDSHAKE = "HELLO and authentication"
    DRAIN = "streams that run"


class Lifecycle:
    """State and deadlines. Every `now` is monotonic seconds and an argument."""

    def __init__(self, kind: Kind, limits: Limits, now: float) -> None:
        self._limits = limits
        self.state = State.HELLO
        self.authenticated = kind is Kind.CONTROL
        """Whether the peer is known; TLS alone authenticates a control connection."""
        self.auth_sent = False
        """Whether the first AUTH was sent (initiator), or came (acceptor)."""
        self.draining = False
        """Whether GOAWAY was said, by either end, and streams may finish."""
        self.error: ArcbridgeError | None = None
        """Why the session is over; None before."""
        self.goaway_sent = False
        self.peer_goaway: Goaway | None = None
        """The peer's latest GOAWAY that lets streams finish."""
        self.keepalive: Keepalive | None = None
        """Liveness of the attached connection; None before the handshake is complete."""
        self.handshake_deadline: float | None = now + limits.handshake_timeout
        self.drain_deadline: float | None = None
        self.detached_deadline: float | None = None

    def change(self, change: Change) -> None:
        """Go to the next state of the table. Raises LocalProtocolError where the table has none."""
        following = TRANSITIONS[self.state].get(change)
        if following is None:
            raise LocalProtocolError(f"{change.value} is not possible in state {self.state.value}")
        self.state = following

    def establish(self, now: float) -> None:
        """Note that the handshake is complete."""
        self.change(Change.ESTABLISH)
        self.authenticated = True
        self.handshake_deadline = None
        self.watch(now)

    def watch(self, now: float) -> None:
        """Watch over a connection that stands from now on. PING numbers go on: a late answer must not match."""
        number = self.keepalive.number if self.keepalive is not None else 0
        self.keepalive = Keepalive(self._limits.ping_interval, self._limits.ping_timeout, now, number=number)

    def drain(self) -> None:
        """Begin the drain: GOAWAY was said, by either end."""
        self.change(Change.DRAIN)
        self.draining = True

    def await_streams(self, now: float) -> None:
        """Give the streams that run until the drain deadline."""
        self.drain_deadline = now + self._limits.drain_timeout

    def detach(self, now: float) -> None:
        """Wait for another connection that resumes the session: this one is lost."""
        self.change(Change.DETACH)
        self.detached_deadline = now + self._limits.detached_timeout

    def await_handshake(self, now: float) -> None:
        """Wait for the handshake of a new connection."""
        self.handshake_deadline = now + self._limits.handshake_timeout

    def resume(self) -> None:
        """Go on: a new connection carries the session."""
        self.change(Change.RESUME_DRAINING if self.draining else Change.RESUME)
        self.handshake_deadline = self.detached_deadline = None

    def close(self, error: ArcbridgeError) -> None:
        """End the session, because of `error`."""
        self.change(Change.CLOSE)
        self.error = error
        self.handshake_deadline = self.drain_deadline = self.detached_deadline = None

    def due(self, now: float) -> Deadline | None:
        """Return the most urgent deadline that has passed, or None."""
        if self.detached_deadline is not None and now >= self.detached_deadline:
            return Deadline.RESUMPTION
        if self.handshake_deadline is not None and now >= self.handshake_deadline:
            return Deadline.HANDSHAKE
        if self.drain_deadline is not None and now >= self.drain_deadline:
            return Deadline.DRAIN
        return None

    def next_deadline(self) -> float | None:
        """Return the next moment at which a deadline passes or the keepalive acts; None: nothing is awaited."""
        if self.state is State.CLOSED:
            return None
        keepalive = self.keepalive
        if self.state is State.OPEN and keepalive is not None:
            return keepalive.next_deadline()  # there is no other: almost every call
        deadlines = [
            at for at in (self.handshake_deadline, self.drain_deadline, self.detached_deadline) if at is not None
        ]
        if keepalive is not None and self.state is not State.DETACHED:
            deadlines.append(keepalive.next_deadline())
        return min(deadlines, default=None)

"""From one connection to the next: what a session does when its connection is lost, and how it goes on.

The initiator makes the new connection. It says which session it means, proves it, and says how much of the agent's
sequence it has; the acceptor checks all that against the session it still holds and answers with its own count. Each
then sends again what the other lacks, and the sequences go on as if nothing had happened: every frame is acted on once.

Nothing of the session's sequence travels before both counts are known, so a refused connection changes nothing.
"""

from __future__ import annotations

from dataclasses import replace

from arcbridge.errors import ArcbridgeError, ConnectionLost, RemoteProtocolError, SessionEnded
from arcbridge.wire import events as ev
from arcbridge.wire.books import Violation
from arcbridge.wire.congestion import CongestionWindow
from arcbridge.wire.frames import VERSION, FrameType, GoawayCode
from arcbridge.wire.keepalive import Keepalive
from arcbridge.wire.reception import Reception, ended_by
from arcbridge.wire.records import Auth, AuthOk, Goaway, Hello, Move
from arcbridge.wire.resume_handshake import ResumeHandshake
from arcbridge.wire.state import Kind, Side, State

REFUSED_FOR_NOW = frozenset(
    {GoawayCode.DRAINING, GoawayCode.REPLACED, GoawayCode.LIMIT, GoawayCode.TIMEOUT, GoawayCode.UNAVAILABLE}
)
"""Answers to a resuming connection after which another one may succeed; any other ends the session."""


class Resumption(Reception):
    """Detaching and attaching. `wire.session` has the table of states."""

    def begin_resume(self, auth: Auth, now: float) -> None:
        """Initiator: a new connection stands; say on it which session it is to carry.

        A connection that is still attached is given up: its bytes must not come any more.
        """
        self._require(self.side is Side.INITIATOR and self.resumable, "this session cannot be resumed")
        self.now = now
        if self.state is not State.DETACHED:
            self._detach(ConnectionLost("another connection takes its place"), tell=False)
        self.epoch += 1
        self._greeting, self._greeted = ResumeHandshake(), None
        self._prelude = [self._resuming_hello(self.resume_secret), self._record(FrameType.AUTH, auth)]
        self._handshake_deadline = now + self.limits.handshake_timeout

    def take_over(self, hello: Hello, ok: AuthOk, now: float) -> None:
        """Acceptor: go on over the connection whose HELLO this is, and whose right to the session was verified.

        Raises LocalProtocolError when its epoch is not higher, or the session is over; RemoteProtocolError, with the
        session over, when the counts cannot be true.
        """
        self._require(self.side is Side.ACCEPTOR and self.resumable, "this session cannot be resumed")
        self._require(hello.epoch > self.epoch, "a connection of an older epoch")
        self.now = now
        if self.state is not State.DETACHED:
            self._detach(ConnectionLost("another connection took its place"), tell=False)
        self._check_counts(hello)
        self.epoch = hello.epoch
        self._prelude = [self._resuming_hello(b""), self._record(FrameType.AUTH_OK, ok)]
        self._attach(hello)

    def hand_over(self, now: float) -> None:
        """Acceptor: another session took this connection; this machine ends without a word."""
        self._require(self.resuming is not None and not self._authenticated, "not a connection that resumes")
        self.now = now
        self._prelude.clear()
        self._control.clear()
        self._close(SessionEnded(GoawayCode.DONE, "its connection carries the resumed session now"))

    def ask_to_move(self, join_id: str) -> None:
        """Acceptor: ask for another connection in place of the one made under `join_id`."""
        self._require(self.side is Side.ACCEPTOR and self.kind is Kind.SESSION, "only an agent asks to move")
        if self._authenticated and self.resumable:
            self._queue_control(self._record(FrameType.MOVE, Move(join_id)))

    # -- inside ---------------------------------------------------------------------------------------------------

    def _lose_connection(self, error: ArcbridgeError) -> None:
        """The connection died, or never became one: wait for another where that is possible."""
        if self.state is State.CLOSED:
            return
        if self._greeting is not None:
            self._resume_failed(error)
        elif self.state is State.DETACHED:
            return
        elif self.resumable and (self._peer_goaway is None or self.streams):
            self._detach(error)
        elif self._peer_goaway is not None:
            self._close(ended_by(self._peer_goaway))
        else:
            self._close(error)

    def _detach(self, error: ArcbridgeError, *, tell: bool = True) -> None:
        self._before = State.DRAINING if self.state is State.DRAINING else State.OPEN
        self.state = State.DETACHED
        self.stats.detached += tell
        self._detached_deadline = self.now + self.limits.detached_timeout
        self.writable = self.socket_writable = self._may_send = False
        self._pong = None
        self._resend.clear()
        self._prelude.clear()
        if tell:
            self._events.append(ev.Detached(error))

    def _resume_failed(self, error: ArcbridgeError) -> None:
        self._greeting = self._greeted = None
        self._handshake_deadline = None
        self._prelude.clear()
        self._events.append(ev.ResumeFailed(error))

    def _resuming_hello(self, secret: bytes) -> bytes:
        hello = replace(
            self._hello_template,
            session_id=self.session_id,
            resume_secret=secret,
            received=self.received,
            sent=self.sent,
            epoch=self.epoch,
        )
        return self._record(FrameType.HELLO, hello)

    def _greet(self, data: memoryview) -> memoryview:
        """Initiator: the acceptor's part of the handshake; what is left of `data` belongs to the sequence."""
        at = 0
        while self._greeting is not None and at < len(data):
            at, whole = self._greeting.next(data, at)
            if whole is None:
                break
            kind, body = whole
            if kind == FrameType.GOAWAY:
                self._refused(Goaway.decode(body))
                return data[:0]
            if kind == FrameType.HELLO:
                self._on_greeting_hello(Hello.decode(body))
            else:
                self._on_greeting_ok(AuthOk.decode(body))
        return data[at:]

    def _on_greeting_hello(self, hello: Hello) -> None:
        if self._greeted is not None:
            raise Violation(GoawayCode.PROTOCOL, "a second HELLO")
        if not hello.least <= VERSION <= hello.version:
            raise Violation(GoawayCode.VERSION, "the other end speaks another protocol version now")
        self._greeted = hello

    def _on_greeting_ok(self, ok: AuthOk) -> None:
        hello = self._greeted
        if hello is None or hello.session_id != self.session_id or hello.epoch != self.epoch:
            raise Violation(GoawayCode.PROTOCOL, "AUTH_OK without the HELLO of this session")
        self._greeting = self._greeted = None
        self._check_counts(hello)
        self._events.append(ev.AuthAccepted(ok))
        self._attach(hello)

    def _refused(self, goaway: Goaway) -> None:
        error = ended_by(goaway)
        if goaway.code in REFUSED_FOR_NOW:
            self._resume_failed(error)
        else:
            self._close(error)

    def _check_counts(self, hello: Hello) -> None:
        """Raises RemoteProtocolError, with the machine closed, for counts that contradict ours."""
        assert self._history is not None
        possible = self._history.holds(hello.received) and hello.received >= self._peer_received
        if possible and hello.sent >= self.received:
            return
        error = RemoteProtocolError("the session cannot be resumed: the two ends disagree about what was sent")
        self._prelude.clear()
        self._close(error)
        raise error

    def _attach(self, hello: Hello) -> None:
        """Both counts are known: go on."""
        history = self._history
        assert history is not None
        self._handshake_deadline = self._detached_deadline = None
        self.state = self._before
        self._may_send = True
        self._resend = history.since(hello.received)
        self.stats.replayed_bytes += self.sent - hello.received
        self.stats.resumed += 1
        self._answers_from = hello.sent
        self._acked_position = self._decoder.position
        if self._flight is not None:  # another path, perhaps: what was known counts once it proves to be no longer
            self._flight = CongestionWindow(self.limits.under_way, sent=self.sent, now=self.now, earlier=self._flight)
            self._pinged = self.sent
        self._usual_window = 0
        self._peer_has(hello.received)
        if self._flight is not None:
            self._cap_applied = 0
            self._make_room(self._flight, self._flight.cap - (self.sent - hello.received))
        self.set_writable(True)
        number = self._keepalive.number if self._keepalive is not None else 0
        self._keepalive = Keepalive(self.limits.ping_interval, self.limits.ping_timeout, self.now, number=number)
        self._events.append(ev.Resumed())
        self._send_ping()
        self._finish_drain_if_idle()

    def _take_resend(self, limit: int) -> list[bytes | memoryview]:
        """Up to about `limit` bytes of what is sent again."""
        parts: list[bytes | memoryview] = []
        size = 0
        while self._resend and size < limit:
            piece = self._resend.popleft()
            parts.append(piece)
            size += len(piece)
        return parts

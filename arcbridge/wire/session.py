"""The machine of one session, or of one control connection: bytes in, decisions out.

It knows no socket, no clock and no role beyond its side: `now` is monotonic seconds and an argument.

Order of calls. After each *receive* or *command* the shell must: take `events_received()` and act on them, resume
the writers of `take_writable()`, write what `data_to_send()` gives, and re-arm its one timer at `next_deadline()`.

================  ==========================================  =======================================================
state             meaning                                     leaves by
================  ==========================================  =======================================================
HELLO             waiting for the peer's HELLO                HELLO -> AUTH (session) or OPEN (control connection)
AUTH              waiting for AUTH, its verdict, or AUTH_OK   `accept_auth` / AUTH_OK -> OPEN; `refuse_auth` -> CLOSED
OPEN              streams come and go                         GOAWAY either way -> DRAINING; error -> CLOSED; loss ->
                                                              DETACHED where the session is resumable, else CLOSED
DRAINING          nothing new; what runs may finish           last stream over, or the drain deadline -> CLOSED; loss
                                                              as in OPEN
DETACHED          no connection; streams wait                 a connection that resumes -> as before; the deadline, or
                                                              a refusal for good -> CLOSED
CLOSED            `Ended` was given; all input is ignored
================  ==========================================  =======================================================

Whose mistake is whose: the caller's raises `LocalProtocolError` and changes nothing; the peer's against the session
becomes a GOAWAY and `Ended`; the peer's within one stream becomes a RESET; a race is settled, counted and dropped.

Everything after the handshake (HELLO and the first AUTH, or AUTH_OK) is one byte sequence per direction, counted
from 0: `sent` and `received` are those counts, told to the peer by ACK, PING and PONG.
"""

from __future__ import annotations

from arcbridge.errors import ArcbridgeError, ConnectionLost, RemoteProtocolError, SessionEnded
from arcbridge.wire import events as ev
from arcbridge.wire.books import DATA, Violation
from arcbridge.wire.frames import (
    HEADER_SIZE,
    MAX_DATA,
    U32,
    U64,
    FrameType,
    GoawayCode,
    ResetCode,
    frame,
    pack_header,
)
from arcbridge.wire.records import Auth, AuthOk, Dial, Open, Status
from arcbridge.wire.resumption import Resumption
from arcbridge.wire.state import Kind, Side, State, Stats
from arcbridge.wire.stream import ReceiveState, SendState, Stream
from arcbridge.wire.window import MAX_CREDIT


class Session(Resumption):
    """One side of a session or control connection. See the module's docstring for the order of calls."""

    def __repr__(self) -> str:
        return (
            f"<Session {self.kind.value} {self.side.name.lower()} {self.state.value} streams={len(self.streams)} "
            f"sent={self.sent} received={self.received} credit={self._credit}>"
        )

    # -- receive: called by the socket and the timer --------------------------------------------------------------

    def receive_data(self, data: memoryview, now: float) -> None:
        """Take bytes of the peer; `data` is valid during the call only.

        Payload goes straight to its stream's sink; everything else becomes events. Never raises for what the peer
        sent: a violation closes the machine.
        """
        if self.state is State.CLOSED:
            return
        self.now = now
        self.stats.bytes_received += len(data)
        if self._keepalive is not None:
            self._keepalive.bytes_arrived(now)
        try:
            if self._greeting is not None:
                data = self._greet(data)
            elif self.state is State.DETACHED:
                return  # of a connection that was given up
            self._decoder.feed(data, self)
            if self.resuming is not None and self.received:
                raise Violation(GoawayCode.PROTOCOL, "bytes of the session before it was resumed")
        except Violation as violation:
            self._fail(violation.code, violation.message)
        except RemoteProtocolError as error:
            self._fail(GoawayCode.PROTOCOL, error.message)
        else:
            if self._decoder.position - self._acked_position >= self.limits.ack_every and self._authenticated:
                self._acked_position = self._decoder.position
                self._queue_control(frame(FrameType.ACK, 0, U64.pack(self.received)))
                self._look_at_unread()

    def receive_eof(self, now: float) -> None:
        """The peer closed the connection. Without a GOAWAY before it, that is a loss, never an end in order."""
        self.connection_lost(now, ConnectionLost("the other end closed the connection"))

    def connection_lost(self, now: float, error: ArcbridgeError) -> None:
        """The connection is gone: the session waits for another one, or ends where that is not possible."""
        self.now = now
        self._lose_connection(error)

    def give_up(self, now: float, error: ArcbridgeError) -> None:
        """End without a word, whatever the connection: nothing is resumed."""
        self.now = now
        self._close(error)

    def handle_timer(self, now: float) -> None:
        """Act on every deadline that has passed; a call too early changes nothing."""
        if self.state is State.CLOSED:
            return
        self.now = now
        if self._detached_deadline is not None and now >= self._detached_deadline:
            waited = f"{self.limits.detached_timeout:.0f} s"
            self._close(SessionEnded(GoawayCode.GONE, f"the connection was lost and not resumed within {waited}"))
            return
        if self._greeting is not None and self._handshake_deadline is not None and now >= self._handshake_deadline:
            self._resume_failed(ConnectionLost(f"no answer within {self.limits.handshake_timeout:.0f} s"))
            return
        if self._handshake_deadline is not None and now >= self._handshake_deadline:
            waiting_for = "HELLO" if self.state is State.HELLO else "authentication"
            self._fail(GoawayCode.TIMEOUT, f"no {waiting_for} within {self.limits.handshake_timeout:.0f} s")
            return
        if self._drain_deadline is not None and now >= self._drain_deadline:
            for stream in list(self.streams.values()):
                self._tell_reset(stream, ResetCode.CANCELLED, local=True)
                self._reset_stream(stream, ResetCode.CANCELLED)
            self._finish_drain()
            return
        if self._keepalive is not None and self.state is not State.DETACHED:
            reason = self._keepalive.dead(now, answers=self.received >= self._answers_from)
            if reason is not None:
                self._lose_connection(ConnectionLost(f"the connection is dead: {reason}"))
            elif self._keepalive.ping_due(now):
                self._send_ping()

    # -- command: called by whoever owns the session or a stream --------------------------------------------------

    def authenticate(self, auth: Auth) -> None:
        """Initiator: send the token, first or again. The first goes out with HELLO, before anything else."""
        self._require(self.kind is Kind.SESSION and self.side is Side.INITIATOR, "only the initiator authenticates")
        if self.state is State.CLOSED:
            return
        body = self._record(FrameType.AUTH, auth)
        if self._auth_sent:
            self._queue_control(body)
            return
        self._auth_sent = True
        self._prelude.append(body)
        self._open_window()

    def accept_auth(self, ok: AuthOk) -> None:
        """Acceptor: the token is good. Streams opened meanwhile become visible now."""
        if self.state is State.CLOSED:
            return
        self._require(self.side is Side.ACCEPTOR and self._auth_sent, "no AUTH is waiting for an answer")
        self._require(self.resuming is None, "a connection that resumes is taken over, not accepted")
        body = self._record(FrameType.AUTH_OK, ok)
        if self._authenticated:
            self._queue_control(body)
            return
        self._learn_secret(ok.session_id, ok.resume_secret)
        self._prelude.append(body)
        self._open_window()
        self._establish()
        self._events.extend(self._early)
        self._early.clear()

    def refuse_auth(self, code: GoawayCode, message: str) -> None:
        """Acceptor: the token is not good; the session is over, with a reason the caller may read."""
        self.close(code, message)

    def open_stream(self, target: str) -> Stream:
        """Open a stream; its DATA may follow at once. Raises SessionEnded when nothing new is accepted."""
        self._require(self.kind is Kind.SESSION, "a control connection has no streams")
        if self.state is State.CLOSED:
            raise SessionEnded(GoawayCode.DONE, "the session is over")
        if self.state is State.DETACHED:
            raise SessionEnded(GoawayCode.UNAVAILABLE, "the session has no connection now")
        if self.state is State.DRAINING or self._next_id > 0x7FFFFFFF:
            raise SessionEnded(GoawayCode.DRAINING, "the session accepts no new streams")
        self._require(self._auth_sent or self._authenticated, "a stream before authentication")
        if self.peer_hello is not None and self.peer_hello.max_streams <= len(self.streams) - self._peer_streams:
            raise SessionEnded(GoawayCode.LIMIT, f"{self.peer_hello.max_streams} streams are open already")
        body = self._record(FrameType.OPEN, Open(target), self._next_id)
        stream = self._new_stream(self._next_id, target)
        self._next_id += 2
        self._queue_out(body)
        return stream

    def send(self, stream: Stream, data: bytes | memoryview | bytearray) -> int:
        """Send bytes on a stream; how many now wait in it (0: all are in the write queue).

        The bytes are copied once, into what is written: `data` may be a view that is valid during the call only.
        Raises LocalProtocolError after `finish`; bytes for a stream that was reset are dropped, because the reset
        may have crossed them.
        """
        size = len(data)
        if (
            size <= stream.credit
            and size <= self._credit
            and not stream.queued
            and 0 < size <= MAX_DATA
            and self.writable
            and self._out_bytes + size <= self._ahead
            and not self._scheduler
            and stream.sending is SendState.OPEN
        ):
            stream.credit -= size
            self._credit -= size
            stream.bytes_sent += size
            if stream is not self._scheduler.last_sender:
                self._scheduler.sender_changed(stream, self.now)
            self._out.append(b"".join((pack_header(size << 8 | DATA, stream.id), data)))
            self._out_bytes += size + HEADER_SIZE
            return 0
        if stream.sending is SendState.RESET:
            return 0
        self._require(stream.sending is SendState.OPEN, "bytes after the end of the stream")
        if size:
            stream.outbox.append(bytes(data))
            stream.queued += size
            if stream.credit > 0:
                self._scheduler.add(stream)
        return stream.queued

    def finish(self, stream: Stream) -> None:
        """End our direction in order, after all its bytes. A second call changes nothing."""
        if stream.sending is not SendState.OPEN:
            return
        if stream.queued:
            stream.sending = SendState.FINISHING
            return
        stream.sending = SendState.FINISHED
        self._queue_out(frame(FrameType.FIN, stream.id))
        self._forget_if_over(stream)

    def reset(self, stream: Stream, code: ResetCode) -> None:
        """End both directions now; queued bytes are dropped. After FIN both ways it changes nothing."""
        if stream.id in self.streams:
            self._reset_stream(stream, code)

    def cut(self, stream: Stream) -> None:
        """End both directions because the source of our bytes broke off: them first, then RESET with TRUNCATED."""
        if stream.id not in self.streams:
            return
        if stream.queued:
            stream.sending = SendState.CUTTING
        else:
            self._reset_stream(stream, ResetCode.TRUNCATED)

    def consumed(self, stream: Stream, count: int) -> None:
        """The consumer has `count` more bytes of the stream: grant credit when enough has come together."""
        whole, own = self._window, stream.window
        if (
            stream.receiving is ReceiveState.OPEN
            and own.consumed + count < own.due_at
            and whole.consumed + count < whole.due_at
        ):
            # Almost every delivery: no grant is due, so counting is all, in place as in `data_begins`.
            own.consumed += count
            whole.consumed += count
            return
        if self.state is State.CLOSED:
            return
        now = self.now
        trip = self._keepalive.round_trip if self._keepalive is not None else 0.0
        if stream.receiving is ReceiveState.OPEN:
            due = own.consume(count, now, trip, self._usual_window)
            if due:
                self._usual_window = max(self._usual_window, own.size)
                if self._keepalive is not None and self._keepalive.stale(now) and self._may_send:
                    self._send_ping()  # the window grows by the round trip, and paths change
                self._queue_control(frame(FrameType.WINDOW, stream.id, U32.pack(due)))
        elif stream.receiving is ReceiveState.RESET:
            return  # settled when it was reset
        else:
            own.consumed += count
            if stream.id not in self.streams and not own.unconsumed:
                own.settle()
        self._release(count)

    def send_dial(self, dial: Dial) -> None:
        """Relay, control connection: ask the agent to join."""
        self._require(self.kind is Kind.CONTROL and self.side is Side.ACCEPTOR, "only a relay sends DIAL")
        self._queue_control(self._record(FrameType.DIAL, dial))

    def send_status(self, status: Status) -> None:
        """Agent, control connection: answer a dial request, or tell of itself."""
        self._require(self.kind is Kind.CONTROL and self.side is Side.INITIATOR, "only an agent sends STATUS")
        self._queue_control(self._record(FrameType.STATUS, status))

    def goaway(self, code: GoawayCode, message: str = "", retry_after: int = 0) -> None:
        """Drain: nothing new is accepted, what runs may finish within the drain deadline."""
        if self.state is State.CLOSED or self._goaway_sent:
            return
        # Behind the OPENs that are queued: a peer that has no stream yet would end the session before they come.
        self._say_goaway(code, message, retry_after, in_turn=True, final=False)
        if self.state is State.DETACHED:
            self._before = State.DRAINING
        else:
            self.state = State.DRAINING
        if self.kind is Kind.SESSION:
            self._drain_deadline = self.now + self.limits.drain_timeout
            self._finish_drain_if_idle()

    def close(self, code: GoawayCode, message: str, retry_after: int = 0) -> None:
        """End the session now: GOAWAY, and every stream ends with its reason."""
        if self.state is State.CLOSED:
            return
        self._say_goaway(code, message, retry_after)
        self._close(SessionEnded(code, message, retry_after=retry_after or None))

    # -- collect: called by the shell after any of the above ------------------------------------------------------

    def events_received(self) -> list[ev.Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def take_writable(self) -> list[Stream]:
        """Blocked streams that may be written again."""
        if not self._writable:
            return []
        streams, self._writable = self._writable, []
        return streams

    def data_to_send(self, limit: int, now: float = 0.0) -> list[bytes | memoryview]:
        """Up to about `limit` bytes to write, control frames first; call again while it gives something.

        The limit lets the scheduler choose as late as possible: a keystroke that comes now is still ahead of
        payload that was not handed over. Without `now` the latest one counts, which makes the path look longer.
        """
        if now > self.now:
            self.now = now
        parts: list[bytes | memoryview] = []
        if self._prelude:
            parts.extend(self._prelude)
            self.stats.bytes_sent += sum(map(len, self._prelude))
            self._prelude.clear()
        if not self._may_send:
            return parts
        if self._resend:
            if self.state is State.CLOSED:
                limit = self.sent  # the last call: nothing may be left behind
            elif not self.socket_writable:
                return parts
            again = self._take_resend(limit)
            self.stats.bytes_sent += sum(map(len, again))
            parts.extend(again)
            return parts
        if not (parts or self._control or self._pong is not None or self._scheduler):
            # Almost every flush: only finished frames wait, and their size is known.
            parts, self._out = self._out, parts
            count, self._out_bytes = self._out_bytes, 0
            kept = parts
        else:
            kept = []
            self._gather(kept, limit)
            count = sum(map(len, kept))
            parts = [*parts, *kept] if parts else kept
        self.sent += count
        self.stats.bytes_sent += count
        self._earned += count
        if self._history is not None:
            self._keep(kept, count)
        if self._flight is not None and count:
            self._has_left(self._flight, count)
        return parts

    def _gather(self, parts: list[bytes | memoryview], limit: int) -> None:
        """Append all that may leave, in its order: the PONG, control frames, finished frames, payload that waits."""
        if self._pong is not None:
            parts.append(self._pong)
            self._pong = None
        parts.extend(self._control)
        self._control.clear()
        self._control_bytes = 0
        parts.extend(self._out)
        self._out.clear()
        size, self._out_bytes = self._out_bytes, 0
        if self._scheduler and self.writable:
            self._schedule(parts, size, limit)

    def next_deadline(self) -> float | None:
        """When `handle_timer` is needed next; None when closed."""
        if self.state is State.CLOSED:
            return None
        if self.state is State.OPEN and self._keepalive is not None:
            return self._keepalive.next_deadline()  # there is no other: almost every call
        deadlines = [
            at
            for at in (
                self._handshake_deadline,
                self._drain_deadline,
                self._detached_deadline,
                self._keepalive.next_deadline()
                if self._keepalive is not None and self.state is not State.DETACHED
                else None,
            )
            if at is not None
        ]
        return min(deadlines, default=None)

    # -- look: no effect ------------------------------------------------------------------------------------------

    @property
    def round_trip(self) -> float:
        """Smallest recent round trip, seconds; 0 while unknown."""
        return self._keepalive.round_trip if self._keepalive is not None else 0.0

    @property
    def unconsumed(self) -> int:
        """Bytes received on all streams that their consumers do not have yet."""
        return self._window.unconsumed

    def assert_invariants(self) -> None:
        """Raise AssertionError when the books do not balance; for tests and debug builds."""
        self._window.assert_invariants()
        assert 0 <= self._credit <= MAX_CREDIT, "session credit out of range"
        held = 0
        for stream in self.streams.values():
            stream.window.assert_invariants()
            assert 0 <= stream.credit <= MAX_CREDIT, "stream credit out of range"
            assert stream.queued == sum(map(len, stream.outbox)), "queued bytes miscounted"
            assert not stream.over, "a stream that is over was kept"
            if stream.receiving is ReceiveState.OPEN:
                held += stream.window.unconsumed
        assert held <= self._window.unconsumed, "a stream holds bytes that the session does not know of"


__all__ = ["Kind", "Session", "Side", "State", "Stats"]

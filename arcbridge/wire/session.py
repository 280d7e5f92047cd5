"""The machine of one session, or of one control connection: bytes in, decisions out.

It knows no socket, no clock and no role beyond its side: `now` is monotonic seconds and an argument.

Order of calls. After each *receive* or *command* the shell must: take `events_received()` and act on them, resume
the writers of `take_writable()`, write what `data_to_send()` gives, and re-arm its one timer at `next_deadline()`.

================  ==========================================  =======================================================
state             meaning                                     leaves by
================  ==========================================  =======================================================
HELLO             waiting for the peer's HELLO                HELLO -> AUTH (session) or OPEN (control connection)
AUTH              waiting for AUTH, its verdict, or AUTH_OK   `accept_auth` / AUTH_OK -> OPEN; `refuse_auth` -> CLOSED
OPEN              streams come and go                         GOAWAY either way -> DRAINING; error, loss -> CLOSED
DRAINING          nothing new; what runs may finish           last stream over, or the drain deadline -> CLOSED
CLOSED            `Ended` was given; all input is ignored
================  ==========================================  =======================================================

Whose mistake is whose: the caller's raises `LocalProtocolError` and changes nothing; the peer's against the session
becomes a GOAWAY and `Ended`; the peer's within one stream becomes a RESET; a race is settled, counted and dropped.

Everything after the handshake (HELLO and the first AUTH, or AUTH_OK) is one byte sequence per direction, counted
from 0: `sent` and `received` are those counts, told to the peer by ACK, PING and PONG.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from arcbridge.errors import ArcbridgeError, ConnectionLost, LocalProtocolError, RemoteProtocolError, SessionEnded
from arcbridge.wire import events as ev
from arcbridge.wire.allowance import Allowance
from arcbridge.wire.decoder import Decoder
from arcbridge.wire.frames import (
    FIRST_CREDIT,
    HEADER_SIZE,
    IGNORABLE_FROM,
    LARGEST,
    MAX_DATA,
    ON_SESSION_ID,
    ON_STREAM_ID,
    PING_BODY,
    U32,
    U64,
    VERSION,
    FrameType,
    GoawayCode,
    ResetCode,
    frame,
    pack_header,
)
from arcbridge.wire.keepalive import Keepalive
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk, Dial, Goaway, Hello, Open, Record, Status
from arcbridge.wire.scheduler import Scheduler
from arcbridge.wire.stream import ReceiveState, SendState, Stream
from arcbridge.wire.window import MAX_CREDIT, ReceiveWindow

_DATA = int(FrameType.DATA)
_JOIN_BELOW = 64 * 1024
"""Header and payload up to this size are joined into one object: a copy is cheaper than a TLS record of its own."""
_QUEUE_AHEAD = 512 * 1024
"""Bytes of finished frames that may wait for one flush; beyond it payload waits in its stream, where it is fair."""
_HANDSHAKE = frozenset({FrameType.HELLO, FrameType.AUTH, FrameType.AUTH_OK, FrameType.GOAWAY})
"""What may come before a peer's byte sequence begins."""
_DRAIN_CODES = frozenset({GoawayCode.DONE, GoawayCode.DRAINING, GoawayCode.REPLACED})


class Side(Enum):
    """Who dialled. The initiator's stream ids are odd, and it authenticates."""

    INITIATOR = 1
    ACCEPTOR = 0


class Kind(Enum):
    """What the connection carries."""

    SESSION = "session"
    CONTROL = "control"


class State(Enum):
    """See the table in the module's docstring."""

    HELLO = "hello"
    AUTH = "auth"
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


def _ended_by(goaway: Goaway) -> SessionEnded:
    message = goaway.message or "the other end ended the session"
    return SessionEnded(goaway.code, message, retry_after=goaway.retry_after or None)


class _Violation(Exception):
    """The peer broke the protocol; ends the session with a code."""

    def __init__(self, code: GoawayCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Stats:
    """Counters, read at any time; plain integers."""

    __slots__ = (
        "bytes_received",
        "bytes_sent",
        "dropped_bytes",
        "ignored_frames",
        "resets_received",
        "resets_sent",
        "streams_opened",
        "streams_refused",
    )

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    bytes_received: int
    bytes_sent: int
    dropped_bytes: int
    ignored_frames: int
    resets_received: int
    resets_sent: int
    streams_opened: int
    streams_refused: int


class Session:
    """One side of a session or control connection. See the module's docstring for the order of calls."""

    def __init__(
        self,
        side: Side,
        kind: Kind,
        now: float,
        *,
        limits: Limits = DEFAULT,
        agent: str = "",
        software: str = "",
    ) -> None:
        self.side = side
        self.kind = kind
        self.limits = limits
        self.state = State.HELLO
        self.now = now
        """The latest `now` given; commands that take none use it."""
        self.stats = Stats()
        self.peer_hello: Hello | None = None
        self.streams: dict[int, Stream] = {}
        self.writable = True
        """Set by the shell: whether the socket takes more. While false, payload waits in its stream."""
        self.error: ArcbridgeError | None = None
        self.sent = 0
        self._received_base = 0
        self._decoder = Decoder()
        self._events: list[ev.Event] = []
        self._writable: list[Stream] = []
        self._prelude: list[bytes] = []
        self._control: list[bytes] = []
        self._control_bytes = 0
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0
        self._pong: bytes | None = None
        self._authenticated = kind is Kind.CONTROL
        self._auth_sent = False
        self._hello_sent = side is Side.INITIATOR
        self._may_send = side is Side.INITIATOR
        """Whether frames after the handshake may leave: an acceptor says nothing to a stranger."""
        self._counting = False
        """Whether the peer's byte sequence has begun: before it only handshake frames and GOAWAY are lawful."""
        self._early: list[ev.StreamOpened | ev.StreamFinished] = []
        self._scheduler = Scheduler(limits.frame_alone, limits.frame_shared)
        self._credit = FIRST_CREDIT
        self._window = ReceiveWindow(FIRST_CREDIT, FIRST_CREDIT)
        self._stream_credit = FIRST_CREDIT
        self._next_id = 1 if side is Side.INITIATOR else 2
        self._last_peer_id = 0
        self._peer_streams = 0
        self._goaway_sent = False
        self._peer_goaway: Goaway | None = None
        self._drain_deadline: float | None = None
        self._handshake_deadline: float | None = now + limits.handshake_timeout
        self._keepalive: Keepalive | None = None
        self._resets = Allowance(limits.churn_burst, limits.churn_rate)
        self._small = Allowance(limits.small_frame_burst, limits.small_frame_rate)
        self._explained = 0
        self._acked_position = 0
        self._peer_received = 0
        self._frames: dict[int, Callable[[int, bytes], None]] = {
            FrameType.HELLO: self._on_hello,
            FrameType.AUTH: self._on_auth,
            FrameType.AUTH_OK: self._on_auth_ok,
            FrameType.OPEN: self._on_open,
            FrameType.FIN: self._on_fin,
            FrameType.RESET: self._on_reset,
            FrameType.WINDOW: self._on_window,
            FrameType.ACK: self._on_ack,
            FrameType.PING: self._on_ping,
            FrameType.PONG: self._on_pong,
            FrameType.GOAWAY: self._on_goaway,
            FrameType.DIAL: self._on_dial,
            FrameType.STATUS: self._on_status,
        }
        hello = Hello(VERSION, VERSION, "", limits.stream_window, limits.max_streams, agent, software)
        self._hello = frame(FrameType.HELLO, 0, hello.encode())
        if side is Side.INITIATOR:
            self._prelude.append(self._hello)

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
            self._decoder.feed(data, self)
        except _Violation as violation:
            self._fail(violation.code, violation.message)
        except RemoteProtocolError as error:
            self._fail(GoawayCode.PROTOCOL, error.message)
        else:
            if self._decoder.position - self._acked_position >= self.limits.ack_every and self._authenticated:
                self._acked_position = self._decoder.position
                self._queue_control(frame(FrameType.ACK, 0, U64.pack(self.received)))

    def receive_eof(self, now: float) -> None:
        """The peer closed the connection. Without a GOAWAY before it, that is a loss, never an end in order."""
        error: ArcbridgeError = ConnectionLost("the other end closed the connection")
        if self._peer_goaway is not None:
            error = _ended_by(self._peer_goaway)
        self.connection_lost(now, error)

    def connection_lost(self, now: float, error: ArcbridgeError) -> None:
        """The connection is gone: the machine closes and says so once."""
        self.now = now
        self._close(error)

    def handle_timer(self, now: float) -> None:
        """Act on every deadline that has passed; a call too early changes nothing."""
        if self.state is State.CLOSED:
            return
        self.now = now
        if self._handshake_deadline is not None and now >= self._handshake_deadline:
            waiting_for = "HELLO" if self.state is State.HELLO else "authentication"
            self._fail(GoawayCode.TIMEOUT, f"no {waiting_for} within {self.limits.handshake_timeout:.0f} s")
            return
        if self._drain_deadline is not None and now >= self._drain_deadline:
            for stream in list(self.streams.values()):
                self._tell_reset(stream, ResetCode.CANCELLED, local=True)
                self._reset_stream(stream, ResetCode.CANCELLED)
            self._finish_drain_if_idle()
            return
        if self._keepalive is not None:
            reason = self._keepalive.dead(now)
            if reason is not None:
                self._close(ConnectionLost(f"the connection is dead: {reason}"))
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
        body = self._record(FrameType.AUTH_OK, ok)
        if self._authenticated:
            self._queue_control(body)
            return
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
            and self._out_bytes < _QUEUE_AHEAD
            and not self._scheduler
            and stream.sending is SendState.OPEN
        ):
            stream.credit -= size
            self._credit -= size
            stream.bytes_sent += size
            self._out.append(b"".join((pack_header(size << 8 | _DATA, stream.id), data)))
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

    def consumed(self, stream: Stream, count: int) -> None:
        """The consumer has `count` more bytes of the stream: grant credit when enough has come together."""
        if self.state is State.CLOSED:
            return
        now = self.now
        trip = self._keepalive.round_trip if self._keepalive is not None else 0.0
        if stream.receiving is ReceiveState.OPEN:
            due = stream.window.consume(count, now, trip)
            if due:
                self._queue_control(frame(FrameType.WINDOW, stream.id, U32.pack(due)))
        elif stream.receiving is ReceiveState.RESET:
            return  # settled when it was reset
        else:
            stream.window.consumed += count
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
        self._say_goaway(code, message, retry_after, in_turn=True)
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

    @property
    def has_output(self) -> bool:
        """Whether `data_to_send` would give anything (credit apart)."""
        return bool(
            self._out
            or self._control
            or self._prelude
            or self._pong is not None
            or (self.writable and self._credit and self._scheduler)
        )

    def data_to_send(self, limit: int) -> list[bytes | memoryview]:
        """Up to about `limit` bytes to write, control frames first; call again while it gives something.

        The limit lets the scheduler choose as late as possible: a keystroke that comes now is still ahead of
        payload that was not handed over.
        """
        parts: list[bytes | memoryview] = []
        if self._prelude:
            parts.extend(self._prelude)
            self.stats.bytes_sent += sum(map(len, self._prelude))
            self._prelude.clear()
        if not self._may_send:
            return parts
        before = len(parts)
        size = 0
        if self._pong is not None:
            parts.append(self._pong)
            self._pong = None
        if self._control:
            parts.extend(self._control)
            self._control.clear()
            self._control_bytes = 0
        if self._out:
            size = self._out_bytes
            parts.extend(self._out)
            self._out.clear()
            self._out_bytes = 0
        if self._scheduler and self.writable:
            self._schedule(parts, size, limit)
        count = sum(map(len, parts[before:])) if len(parts) != 1 or before else len(parts[0])
        self.sent += count
        self.stats.bytes_sent += count
        self._explained += count
        return parts

    def next_deadline(self) -> float | None:
        """When `handle_timer` is needed next; None when closed."""
        if self.state is State.CLOSED:
            return None
        deadlines = [
            at
            for at in (
                self._handshake_deadline,
                self._drain_deadline,
                self._keepalive.next_deadline() if self._keepalive is not None else None,
            )
            if at is not None
        ]
        return min(deadlines, default=None)

    # -- look: no effect ------------------------------------------------------------------------------------------

    @property
    def received(self) -> int:
        """Bytes of the peer's sequence that have arrived."""
        return max(0, self._decoder.position - self._received_base)

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

    # -- frames -----------------------------------------------------------------------------------------------------

    def data_begins(self, stream_id: int, length: int) -> Callable[[memoryview], None] | None:
        """A DATA header (called by the decoder): account for the whole payload before any of it is taken."""
        stream = self.streams.get(stream_id)
        if stream is None or not self._counting:
            if self.state is State.CLOSED:
                return None  # closed by a sink earlier in the same input
            self._data_out_of_place(stream_id)
        if length == 0:
            self._take_small()
        if not self._window.receive(length):
            raise _Violation(GoawayCode.FLOW_CONTROL, "more bytes than the session's window")
        if stream is None:
            self.stats.dropped_bytes += length
            self._release(length)
            return None
        if stream.receiving is ReceiveState.OPEN and stream.window.receive(length):
            return stream.deliver
        self._release(length)
        late = stream.receiving is not ReceiveState.OPEN
        self._break_stream(stream, ResetCode.PROTOCOL if late else ResetCode.FLOW_CONTROL)
        return None

    def frame_received(self, kind: int, stream_id: int, body: bytes) -> None:
        """Any other frame, whole (called by the decoder)."""
        if (kind in ON_SESSION_ID and stream_id) or (kind in ON_STREAM_ID and not stream_id):
            raise _Violation(GoawayCode.PROTOCOL, f"a frame of type {kind} with stream id {stream_id}")
        if self.peer_hello is None and kind not in (FrameType.HELLO, FrameType.GOAWAY):
            raise _Violation(GoawayCode.PROTOCOL, "the first frame is not HELLO")
        if self.state is State.CLOSED:
            return  # closed by a frame, or by an application, earlier in the same input
        if kind >= IGNORABLE_FROM:
            self.stats.ignored_frames += 1
            self._take_small()
            return
        if not self._counting and kind not in _HANDSHAKE:
            raise _Violation(GoawayCode.PROTOCOL, f"a frame of type {kind} before the handshake is complete")
        self._frames[kind](stream_id, body)

    def _on_hello(self, _stream_id: int, body: bytes) -> None:
        if self.peer_hello is not None:
            raise _Violation(GoawayCode.PROTOCOL, "a second HELLO")
        hello = Hello.decode(body)
        if not hello.least <= VERSION <= hello.version:
            raise _Violation(
                GoawayCode.VERSION,
                f"the other end speaks protocol versions {hello.least} to {hello.version}, this one only {VERSION}: "
                "upgrade the older of the two",
            )
        if not FIRST_CREDIT <= hello.stream_window <= MAX_CREDIT:
            raise _Violation(GoawayCode.PROTOCOL, f"a first stream window of {hello.stream_window} bytes")
        self.peer_hello = hello
        more = hello.stream_window - self._stream_credit
        self._stream_credit = hello.stream_window
        for stream in self.streams.values():
            self._add_credit(stream, more)
        self._events.append(ev.HelloReceived(hello))
        self._say_hello()
        if self.kind is Kind.CONTROL:
            self._begin_counting()
            self._establish()
        elif self.state is State.HELLO:  # not DRAINING
            self.state = State.AUTH

    def _on_auth(self, _stream_id: int, body: bytes) -> None:
        if self.side is not Side.ACCEPTOR or self.kind is not Kind.SESSION:
            raise _Violation(GoawayCode.PROTOCOL, "AUTH from the wrong side")
        self._take_small()
        if not self._authenticated:
            if self._auth_sent:
                raise _Violation(GoawayCode.PROTOCOL, "a second AUTH before the first was answered")
            self._auth_sent = True
            self._begin_counting()
        self._events.append(ev.AuthReceived(Auth.decode(body)))

    def _on_auth_ok(self, _stream_id: int, body: bytes) -> None:
        if self.side is not Side.INITIATOR or self.kind is not Kind.SESSION or not self._auth_sent:
            raise _Violation(GoawayCode.PROTOCOL, "AUTH_OK that nobody asked for")
        self._take_small()
        ok = AuthOk.decode(body)
        if not self._authenticated:
            self._begin_counting()
            self._establish()
        self._events.append(ev.AuthAccepted(ok))

    def _on_open(self, stream_id: int, body: bytes) -> None:
        self._sessions_only("OPEN")
        if stream_id & 1 == self.side.value:
            raise _Violation(GoawayCode.PROTOCOL, "OPEN with a stream id of the other side's")
        if stream_id <= self._last_peer_id:
            raise _Violation(GoawayCode.PROTOCOL, "OPEN with a stream id that does not rise")
        target = Open.decode(body).target
        self._last_peer_id = stream_id
        most = self.limits.max_streams if self._authenticated else self.limits.early_streams
        if self._goaway_sent or self._peer_streams >= most:
            self._count_reset()
            self.stats.streams_refused += 1
            self._queue_out(frame(FrameType.RESET, stream_id, U32.pack(ResetCode.REFUSED)))
            return
        stream = self._new_stream(stream_id, target)
        self._peer_streams += 1
        opened = ev.StreamOpened(stream, target)
        if self._authenticated:
            self._events.append(opened)
        else:
            self._early.append(opened)

    def _on_fin(self, stream_id: int, _body: bytes) -> None:
        stream = self._stream_of(stream_id, "FIN")
        if stream is None:
            return
        if stream.receiving is not ReceiveState.OPEN:
            self._break_stream(stream, ResetCode.PROTOCOL)
            return
        stream.receiving = ReceiveState.FINISHED
        (self._events if self._authenticated else self._early).append(ev.StreamFinished(stream))
        self._forget_if_over(stream)

    def _on_reset(self, stream_id: int, body: bytes) -> None:
        stream = self._stream_of(stream_id, "RESET")
        code = U32.unpack(body)[0]
        in_order = code == ResetCode.NO_ERROR and (stream is None or stream.receiving is ReceiveState.FINISHED)
        if in_order:  # part of an ordinary close, and two of them may cross
            self._take_small()
        else:
            self._count_reset()
        if stream is None:
            return
        self.stats.resets_received += 1
        self._end_stream(stream, keep_received=in_order)
        self._tell_reset(stream, code, local=False)
        self._finish_drain_if_idle()

    def _on_window(self, stream_id: int, body: bytes) -> None:
        self._sessions_only("WINDOW")
        self._take_small()
        increment = U32.unpack(body)[0]
        if stream_id == 0:
            if increment == 0 or self._credit + increment > MAX_CREDIT:
                raise _Violation(GoawayCode.FLOW_CONTROL, "an impossible grant for the session")
            self._credit += increment
            return
        stream = self._stream_of(stream_id, "WINDOW")
        if stream is None:
            return
        if increment == 0 or stream.credit + increment > MAX_CREDIT:
            self._break_stream(stream, ResetCode.FLOW_CONTROL)
            return
        self._add_credit(stream, increment)

    def _on_ack(self, _stream_id: int, body: bytes) -> None:
        self._take_small()
        self._peer_has(U64.unpack(body)[0])

    def _on_ping(self, _stream_id: int, body: bytes) -> None:
        self._take_small()
        number, received = PING_BODY.unpack(body)
        self._peer_has(received)
        # Only the latest is answered: a flood of PINGs to an end that cannot write costs one frame.
        self._pong = frame(FrameType.PONG, 0, PING_BODY.pack(number, self.received))

    def _on_pong(self, _stream_id: int, body: bytes) -> None:
        self._take_small()
        number, received = PING_BODY.unpack(body)
        self._peer_has(received)
        if self._keepalive is not None:
            self._keepalive.pong(number, self.now)

    def _on_goaway(self, _stream_id: int, body: bytes) -> None:
        self._take_small()
        goaway = Goaway.decode(body)
        self._events.append(ev.GoawayReceived(goaway))
        if goaway.code not in _DRAIN_CODES:
            self._close(_ended_by(goaway))
            return
        self._peer_goaway = goaway
        if self.kind is Kind.CONTROL:
            return
        self.state = State.DRAINING
        for stream in list(self.streams.values()):
            if stream.id & 1 == self.side.value and stream.id > goaway.last_stream:
                self._end_stream(stream, keep_received=False)
                self._tell_reset(stream, ResetCode.REFUSED, local=False)
        self._finish_drain_if_idle()

    def _on_dial(self, _stream_id: int, body: bytes) -> None:
        if self.kind is not Kind.CONTROL or self.side is not Side.INITIATOR:
            raise _Violation(GoawayCode.PROTOCOL, "DIAL from the wrong side")
        self._take_small()
        self._events.append(ev.DialReceived(Dial.decode(body)))

    def _on_status(self, _stream_id: int, body: bytes) -> None:
        if self.kind is not Kind.CONTROL or self.side is not Side.ACCEPTOR:
            raise _Violation(GoawayCode.PROTOCOL, "STATUS from the wrong side")
        self._take_small()
        self._events.append(ev.StatusReceived(Status.decode(body)))

    # -- inside -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _require(condition: bool, message: str) -> None:
        if not condition:
            raise LocalProtocolError(message)

    @staticmethod
    def _record(kind: FrameType, record: Record, stream_id: int = 0) -> bytes:
        """A record's frame. Raises LocalProtocolError where the peer would have to refuse its size."""
        body = record.encode()
        if len(body) > LARGEST[kind]:
            raise LocalProtocolError(f"{kind.name} of {len(body)} bytes, more than {LARGEST[kind]}")
        return frame(kind, stream_id, body)

    def _sessions_only(self, name: str) -> None:
        if self.kind is not Kind.SESSION:
            raise _Violation(GoawayCode.PROTOCOL, f"{name} on a control connection")

    def _take_small(self) -> None:
        """Frames that need no credit: as many as our own payload explains, and an allowance beyond."""
        if self._explained >= 32768:
            self._small.give(self._explained >> 15)
            self._explained &= 32767
        if not self._small.take(self.now):
            raise _Violation(GoawayCode.LIMIT, "a flood of control frames")

    def _count_reset(self) -> None:
        if not self._resets.take(self.now):
            raise _Violation(GoawayCode.LIMIT, "streams are reset faster than is allowed")

    def _establish(self) -> None:
        if self.state is not State.DRAINING:
            self.state = State.OPEN
        self._authenticated = self._may_send = True
        self._handshake_deadline = None
        self._acked_position = self._decoder.position
        self._keepalive = Keepalive(self.limits.ping_interval, self.limits.ping_timeout, self.now)
        self._send_ping()  # at once: windows grow by the round trip, so it must be known early

    def _begin_counting(self) -> None:
        """The peer's byte sequence begins behind the frame that is being handled."""
        self._counting = True
        self._received_base = self._decoder.position

    def _send_ping(self) -> None:
        assert self._keepalive is not None
        number = self._keepalive.ping(self.now)
        self._acked_position = self._decoder.position  # PING confirms, too: an idle session needs no ACK
        self._queue_control(frame(FrameType.PING, 0, PING_BODY.pack(number, self.received)))

    def _open_window(self) -> None:
        self._window.size = self._window.limit = self.limits.session_window
        due = self._window.open_up()
        if due:
            self._queue_control(frame(FrameType.WINDOW, 0, U32.pack(due)))

    def _peer_has(self, received: int) -> None:
        if received > self.sent:
            raise _Violation(GoawayCode.PROTOCOL, "the other end confirms bytes that were never sent")
        if received > self._peer_received:
            self._peer_received = received
        if self._keepalive is not None:
            self._keepalive.progress_reported(received, self.now)

    def _data_out_of_place(self, stream_id: int) -> None:
        """DATA for no stream that we know: a race at best."""
        if not self._counting:
            raise _Violation(GoawayCode.PROTOCOL, "DATA before the handshake is complete")
        self._sessions_only("DATA")
        self._known_id(stream_id, "DATA")

    def _known_id(self, stream_id: int, name: str) -> None:
        ours = stream_id & 1 == self.side.value
        if stream_id == 0 or (stream_id >= self._next_id if ours else stream_id > self._last_peer_id):
            raise _Violation(GoawayCode.PROTOCOL, f"{name} for a stream that was never opened")

    def _stream_of(self, stream_id: int, name: str) -> Stream | None:
        self._sessions_only(name)
        stream = self.streams.get(stream_id)
        if stream is None:
            self._known_id(stream_id, name)
        return stream

    def _new_stream(self, stream_id: int, target: str) -> Stream:
        window = ReceiveWindow(self.limits.stream_window, self.limits.max_stream_window)
        stream = Stream(stream_id, target, self._stream_credit, window)
        self.streams[stream_id] = stream
        self.stats.streams_opened += 1
        return stream

    def _add_credit(self, stream: Stream, increment: int) -> None:
        stream.credit += increment
        if stream.queued and stream.credit > 0:
            self._scheduler.add(stream)

    def _release(self, count: int) -> None:
        """Return session credit for bytes that nobody holds any more."""
        if count:
            due = self._window.consume(count, self.now, 0.0)
            if due:
                self._queue_control(frame(FrameType.WINDOW, 0, U32.pack(due)))

    def _break_stream(self, stream: Stream, code: ResetCode) -> None:
        """The peer broke the protocol within one stream."""
        self._count_reset()
        self._tell_reset(stream, code, local=True)  # before the end of the session, which may follow from it
        self._reset_stream(stream, code)

    def _tell_reset(self, stream: Stream, code: int, *, local: bool) -> None:
        if not self._authenticated and stream.id & 1 != self.side.value:  # nobody was told of it yet
            self._early = [event for event in self._early if event.stream is not stream]
        else:
            self._events.append(ev.StreamWasReset(stream, code, local))

    def _reset_stream(self, stream: Stream, code: ResetCode) -> None:
        self.stats.resets_sent += 1
        self._end_stream(stream, keep_received=stream.receiving is ReceiveState.FINISHED)
        self._queue_out(frame(FrameType.RESET, stream.id, U32.pack(code)))
        self._finish_drain_if_idle()

    def _end_stream(self, stream: Stream, *, keep_received: bool) -> None:
        """Both halves are over: settle the credit and let go."""
        stream.outbox.clear()
        stream.queued = 0
        stream.sending = SendState.RESET
        self._scheduler.remove(stream)
        if not keep_received:
            if stream.receiving is not ReceiveState.RESET:
                stream.receiving = ReceiveState.RESET
                self._release(stream.window.unconsumed)
            stream.inbox.clear()
        self._drop(stream)

    def _forget_if_over(self, stream: Stream) -> None:
        if stream.over:
            self._drop(stream)
            self._finish_drain_if_idle()

    def _drop(self, stream: Stream) -> None:
        if self.streams.pop(stream.id, None) is not None and stream.id & 1 != self.side.value:
            self._peer_streams -= 1

    def _queue_control(self, body: bytes) -> None:
        if self.state is State.CLOSED:
            return
        self._control.append(body)
        self._control_bytes += len(body)
        if self._control_bytes > self.limits.max_queued_control:
            self._fail(GoawayCode.LIMIT, "the other end does not read what it causes")

    def _queue_out(self, body: bytes) -> None:
        if self.state is not State.CLOSED:
            self._out.append(body)
            self._out_bytes += len(body)

    def _schedule(self, parts: list[bytes | memoryview], size: int, limit: int) -> None:
        """Fill `parts` up to `limit` bytes from the streams that wait."""
        while size < limit and self._credit > 0:
            turn = self._scheduler.next()
            if turn is None:
                return
            stream, most = turn
            most = min(most, stream.credit, self._credit, stream.queued)
            if most <= 0:
                continue
            pieces = stream.take(most)
            stream.credit -= most
            self._credit -= most
            stream.bytes_sent += most
            header = pack_header(most << 8 | _DATA, stream.id)
            if len(pieces) > 1 or most < _JOIN_BELOW:
                parts.append(b"".join((header, *pieces)))
            else:
                parts.append(header)
                parts.append(pieces[0])
            size += most + HEADER_SIZE
            if stream.queued:
                if stream.credit > 0:
                    self._scheduler.add(stream)
            elif stream.sending is SendState.FINISHING:
                stream.sending = SendState.FINISHED
                stream.blocked = True  # whoever waits for the end is told, even if it never had to stop
                parts.append(frame(FrameType.FIN, stream.id))
                self._forget_if_over(stream)
            if stream.blocked and stream.queued <= stream.low_water:
                stream.blocked = False
                self._writable.append(stream)

    def _say_hello(self) -> None:
        if not self._hello_sent:
            self._hello_sent = True
            self._prelude.append(self._hello)

    def _say_goaway(self, code: GoawayCode, message: str, retry_after: int, *, in_turn: bool = False) -> None:
        self._goaway_sent = True
        goaway = Goaway(self._last_peer_id, code, message[:1000], retry_after)
        body = frame(FrameType.GOAWAY, 0, goaway.encode())
        if in_turn:
            self._queue_out(body)
        else:
            self._control.append(body)

    def _fail(self, code: GoawayCode, message: str) -> None:
        if self.state is State.CLOSED:
            return
        self._say_goaway(code, message, 0)
        error: ArcbridgeError = RemoteProtocolError(f"the other end broke the protocol: {message}")
        if code is GoawayCode.TIMEOUT:
            error = SessionEnded(code, message)
        self._close(error)

    def _finish_drain_if_idle(self) -> None:
        if self.state is State.DRAINING and not self.streams and self.kind is Kind.SESSION:
            self._finish_drain()

    def _finish_drain(self) -> None:
        if not self._goaway_sent:
            self._say_goaway(GoawayCode.DONE, "", 0)
        self._close(SessionEnded(GoawayCode.DRAINING, "the session was drained"))

    def _close(self, error: ArcbridgeError) -> None:
        """Closed, once. The streams stay in `streams` for the shell to end; payload that waits is dropped."""
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        self.error = error
        if self._goaway_sent:
            self._say_hello()  # a stranger who said nothing is answered in kind, so that it can read why
        self._may_send = True
        self._handshake_deadline = self._drain_deadline = None
        self._early.clear()
        while self._scheduler.next() is not None:
            pass
        if not isinstance(error, SessionEnded) or error.code != GoawayCode.DRAINING:
            self._out.clear()
            self._out_bytes = 0
        self._events.append(ev.Ended(error))

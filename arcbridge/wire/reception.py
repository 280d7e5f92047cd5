"""Frames in: what each of the peer's frames does to a session machine, in each of its states.

A violation of the session is raised here, and becomes a GOAWAY in `Session.receive_data`; one within a stream becomes
a RESET at once; a race is settled, counted and dropped.
"""

from __future__ import annotations

from collections.abc import Callable

from arcbridge.errors import SessionEnded
from arcbridge.wire import events as ev
from arcbridge.wire.books import DRAIN_CODES, HANDSHAKE, Books, Violation
from arcbridge.wire.frames import (
    FIRST_CREDIT,
    IGNORABLE_FROM,
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
)
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk, Dial, Goaway, Hello, Move, Open, Status
from arcbridge.wire.replay import Budget
from arcbridge.wire.state import Kind, Side, State
from arcbridge.wire.stream import ReceiveState, Stream
from arcbridge.wire.window import MAX_CREDIT

PAYLOAD_EXPLAINS = 1024
"""Payload bytes that make a PING no part of a flood: they needed credit."""


def ended_by(goaway: Goaway) -> SessionEnded:
    message = goaway.message or "the other end ended the session"
    return SessionEnded(goaway.code, message, retry_after=goaway.retry_after or None)


class Reception(Books):
    """The decoder's sink (`wire.decoder.FrameSink`)."""

    def __init__(
        self,
        side: Side,
        kind: Kind,
        now: float,
        *,
        limits: Limits = DEFAULT,
        agent: str = "",
        software: str = "",
        cluster_ca: str = "",
        budget: Budget | None = None,
    ) -> None:
        super().__init__(
            side, kind, now, limits=limits, agent=agent, software=software, cluster_ca=cluster_ca, budget=budget
        )
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
            FrameType.MOVE: self._on_move,
            FrameType.QUIET: self._on_quiet,
        }

    def data_begins(self, stream_id: int, length: int) -> Callable[[memoryview], None] | None:
        """A DATA header (called by the decoder): account for the whole payload before any of it is taken.

        The two windows are compared in place, and the stream's own sink is returned: this runs for every frame, and
        three calls were a fifth of what a frame cost.
        """
        stream = self.streams.get(stream_id)
        if stream is not None and length and self._counting and stream.receiving is ReceiveState.OPEN:
            whole, own = self._window, stream.window
            if whole.received + length <= whole.granted and own.received + length <= own.granted:
                whole.received += length
                own.received += length
                sink = stream.sink
                if sink is None:
                    return stream.deliver
                stream.bytes_received += length
                return sink
        return self._data_otherwise(stream, stream_id, length)

    def _data_otherwise(
        self, stream: Stream | None, stream_id: int, length: int
    ) -> Callable[[memoryview], None] | None:
        """DATA that is empty, of no stream we know, late, or beyond its credit."""
        if stream is None or not self._counting:
            if self.state is State.CLOSED:
                return None  # closed by a sink earlier in the same input
            self._data_out_of_place(stream_id)
        if length == 0:
            self._spend_control_budget()
        if not self._window.receive(length):
            raise Violation(GoawayCode.FLOW_CONTROL, "more bytes than the session's window")
        if stream is None:
            self.stats.dropped_bytes += length
            self._release(length)
            return None
        if stream.receiving is ReceiveState.OPEN and stream.window.receive(length):
            return stream.deliver  # of an empty frame nothing comes
        self._release(length)
        late = stream.receiving is not ReceiveState.OPEN
        self._break_stream(stream, ResetCode.PROTOCOL if late else ResetCode.FLOW_CONTROL)
        return None

    def frame_received(self, kind: int, stream_id: int, body: bytes) -> None:
        """Any other frame, whole (called by the decoder)."""
        if (kind in ON_SESSION_ID and stream_id) or (kind in ON_STREAM_ID and not stream_id):
            raise Violation(GoawayCode.PROTOCOL, f"a frame of type {kind} with stream id {stream_id}")
        if self.peer_hello is None and kind not in (FrameType.HELLO, FrameType.GOAWAY):
            raise Violation(GoawayCode.PROTOCOL, "the first frame is not HELLO")
        if self.state is State.CLOSED:
            return  # closed by a frame, or by an application, earlier in the same input
        if kind >= IGNORABLE_FROM and kind not in self._frames:
            self.stats.ignored_frames += 1
            self._spend_control_budget()
            return
        if not self._counting and kind not in HANDSHAKE:
            raise Violation(GoawayCode.PROTOCOL, f"a frame of type {kind} before the handshake is complete")
        self._frames[kind](stream_id, body)

    def _on_hello(self, _stream_id: int, body: bytes) -> None:
        if self.peer_hello is not None:
            raise Violation(GoawayCode.PROTOCOL, "a second HELLO")
        hello = Hello.decode(body)
        if not hello.least <= VERSION <= hello.version:
            raise Violation(
                GoawayCode.VERSION,
                f"the other end speaks protocol versions {hello.least} to {hello.version}, this one only {VERSION}: "
                "upgrade the older of the two",
            )
        if not FIRST_CREDIT <= hello.stream_window <= MAX_CREDIT:
            raise Violation(GoawayCode.PROTOCOL, f"a first stream window of {hello.stream_window} bytes")
        self.peer_hello = hello
        more = hello.stream_window - self._stream_credit
        self._stream_credit = hello.stream_window
        for stream in self.streams.values():
            self._add_credit(stream, more)
        self._events.append(ev.HelloReceived(hello))
        if hello.session_id:
            self._asks_to_resume(hello)
        else:
            self._say_hello()
        if self.kind is Kind.CONTROL:
            self._begin_counting()
            self._establish()
        elif self.state is State.HELLO:  # not DRAINING
            self.state = State.AUTH

    def _asks_to_resume(self, hello: Hello) -> None:
        """Nothing is answered until the session that is meant takes the connection over, or it is refused."""
        if self.side is not Side.ACCEPTOR or self.kind is not Kind.SESSION:
            raise Violation(GoawayCode.PROTOCOL, "a HELLO that resumes, from the wrong side")
        self.resuming = hello

    def _on_auth(self, _stream_id: int, body: bytes) -> None:
        if self.side is not Side.ACCEPTOR or self.kind is not Kind.SESSION:
            raise Violation(GoawayCode.PROTOCOL, "AUTH from the wrong side")
        self._spend_control_budget()
        if not self._authenticated:
            if self._auth_sent:
                raise Violation(GoawayCode.PROTOCOL, "a second AUTH before the first was answered")
            self._auth_sent = True
            self._begin_counting()
        self._events.append(ev.AuthReceived(Auth.decode(body)))

    def _on_auth_ok(self, _stream_id: int, body: bytes) -> None:
        if self.side is not Side.INITIATOR or self.kind is not Kind.SESSION or not self._auth_sent:
            raise Violation(GoawayCode.PROTOCOL, "AUTH_OK that nobody asked for")
        self._spend_control_budget()
        ok = AuthOk.decode(body)
        if not self._authenticated:
            self._learn_secret(ok.session_id, ok.resume_secret)
            self._begin_counting()
            self._establish()
        self._events.append(ev.AuthAccepted(ok))

    def _on_open(self, stream_id: int, body: bytes) -> None:
        self._sessions_only("OPEN")
        if stream_id & 1 == self.side.value:
            raise Violation(GoawayCode.PROTOCOL, "OPEN with a stream id of the other side's")
        if stream_id <= self._last_peer_id:
            raise Violation(GoawayCode.PROTOCOL, "OPEN with a stream id that does not rise")
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
            self._spend_control_budget()
        else:
            self._count_reset()
        if stream is None:
            return
        self.stats.resets_received += 1
        if code == ResetCode.TRUNCATED and stream.receiving is ReceiveState.OPEN:
            stream.receiving = ReceiveState.FINISHED  # what came is a prefix, and all of it counts
            in_order = True
        self._end_stream(stream, keep_received=in_order)
        self._tell_reset(stream, code, local=False)
        self._finish_drain_if_idle()

    def _on_window(self, stream_id: int, body: bytes) -> None:
        self._sessions_only("WINDOW")
        self._spend_control_budget()
        increment = U32.unpack(body)[0]
        if stream_id == 0:
            if increment == 0 or self._credit + increment > MAX_CREDIT:
                raise Violation(GoawayCode.FLOW_CONTROL, "an impossible grant for the session")
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
        self._spend_control_budget()
        self._peer_has(U64.unpack(body)[0])

    def _on_quiet(self, _stream_id: int, _body: bytes) -> None:
        self._sessions_only("QUIET")
        self._spend_control_budget()
        if self._flight is not None:
            self._flight.begin_probe(self.now)

    def _on_ping(self, _stream_id: int, body: bytes) -> None:
        came = self._window.received
        if came - self._asked_at < PAYLOAD_EXPLAINS:  # else it asks how much of its payload is here (`wire.congestion`)
            self._spend_control_budget()
        self._asked_at = came
        number, received = PING_BODY.unpack(body)
        self._peer_has(received)
        # Only the latest is answered: a flood of PINGs to an end that cannot write costs one frame.
        self._pong = frame(FrameType.PONG, 0, PING_BODY.pack(number, self.received))
        self._acked_position = self._decoder.position  # PONG confirms, too
        self._look_at_unread()
        if self.side is Side.ACCEPTOR and self._keepalive is not None:
            # While payload comes, its window grows by the round trip, which only PINGs of our own measure.
            if self._idle_from == self._window.received:
                self._keepalive.peer_pinged(self.now)
            self._idle_from = self._window.received

    def _on_pong(self, _stream_id: int, body: bytes) -> None:
        self._spend_control_budget()
        number, received = PING_BODY.unpack(body)
        self._peer_has(received)
        if self._keepalive is not None:
            self._keepalive.pong(number, self.now)

    def _on_goaway(self, _stream_id: int, body: bytes) -> None:
        self._spend_control_budget()
        goaway = Goaway.decode(body)
        self._events.append(ev.GoawayReceived(goaway))
        if goaway.final or goaway.code not in DRAIN_CODES:
            self._close(ended_by(goaway))
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
            raise Violation(GoawayCode.PROTOCOL, "DIAL from the wrong side")
        self._spend_control_budget()
        self._events.append(ev.DialReceived(Dial.decode(body)))

    def _on_status(self, _stream_id: int, body: bytes) -> None:
        if self.kind is not Kind.CONTROL or self.side is not Side.ACCEPTOR:
            raise Violation(GoawayCode.PROTOCOL, "STATUS from the wrong side")
        self._spend_control_budget()
        self._events.append(ev.StatusReceived(Status.decode(body)))

    def _on_move(self, _stream_id: int, body: bytes) -> None:
        self._sessions_only("MOVE")
        if self.side is not Side.INITIATOR:
            raise Violation(GoawayCode.PROTOCOL, "MOVE from the wrong side")
        self._spend_control_budget()
        self._events.append(ev.MoveRequested(Move.decode(body).join_id))

    def _sessions_only(self, name: str) -> None:
        if self.kind is not Kind.SESSION:
            raise Violation(GoawayCode.PROTOCOL, f"{name} on a control connection")

    def _peer_has(self, received: int) -> None:
        if received > self.sent:
            raise Violation(GoawayCode.PROTOCOL, "the other end confirms bytes that were never sent")
        if received > self._peer_received:
            self._peer_received = received
            history = self._history
            if history is not None:
                history.acknowledge(received)
                if self._history_full and history.roomy:
                    self._history_full = False
                    self.set_writable(self.socket_writable)
            flight = self._flight
            if flight is not None and self._keepalive is not None:
                flight.interactive = self._scheduler.interactive_until > self.now
                trip = flight.confirmed(received, self.sent, self.now)
                self._scheduler.set_pace(flight.pace)
                if trip:
                    self._keepalive.sample(trip, self.now)
                    if flight.wants_probe(self.now) and flight.begin_probe(self.now):
                        self._queue_control(frame(FrameType.QUIET, 0, b""))
                self._cap_applied = 0
                self._make_room(flight, flight.cap - (self.sent - received))
            if self.state is State.DRAINING:
                self._finish_drain_if_idle()
        if self._keepalive is not None:
            self._keepalive.progress_reported(received, self.now)

    def _data_out_of_place(self, stream_id: int) -> None:
        """DATA for no stream that we know: a race at best."""
        if not self._counting:
            raise Violation(GoawayCode.PROTOCOL, "DATA before the handshake is complete")
        self._sessions_only("DATA")
        self._known_id(stream_id, "DATA")

    def _known_id(self, stream_id: int, name: str) -> None:
        ours = stream_id & 1 == self.side.value
        if stream_id == 0 or (stream_id >= self._next_id if ours else stream_id > self._last_peer_id):
            raise Violation(GoawayCode.PROTOCOL, f"{name} for a stream that was never opened")

    def _stream_of(self, stream_id: int, name: str) -> Stream | None:
        self._sessions_only(name)
        stream = self.streams.get(stream_id)
        if stream is None:
            self._known_id(stream_id, name)
        return stream

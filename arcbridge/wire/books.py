"""What a session machine keeps, and what happens inside it: queues, streams and their ends, credit, farewell.

`Books` has no public command and reads no frame: `wire.reception` feeds it from the peer's side, `wire.session` from
ours; `wire.resumption` carries them over from one connection to the next. They are one class in four files, each with
its own reader in mind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from arcbridge.errors import ArcbridgeError, LocalProtocolError, RemoteProtocolError, SessionEnded
from arcbridge.wire import events as ev
from arcbridge.wire.allowance import Allowance
from arcbridge.wire.congestion import CongestionWindow
from arcbridge.wire.decoder import Decoder
from arcbridge.wire.frames import (
    FIRST_CREDIT,
    HEADER_SIZE,
    LARGEST,
    PING_BODY,
    U32,
    VERSION,
    FrameType,
    GoawayCode,
    ResetCode,
    frame,
    pack_header,
)
from arcbridge.wire.keepalive import Keepalive
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Goaway, Hello, Record
from arcbridge.wire.replay import Budget, Piece, Replay
from arcbridge.wire.resume_handshake import ResumeHandshake
from arcbridge.wire.scheduler import Scheduler
from arcbridge.wire.state import Kind, Side, State, Stats
from arcbridge.wire.stream import ReceiveState, SendState, Stream
from arcbridge.wire.window import MAX_CREDIT, Growth, ReceiveWindow

DATA = int(FrameType.DATA)
_JOIN_BELOW = 32 * 1024
"""Payload that waited in its stream is joined to its header up to this size: copying what has just been written is
cheaper than a TLS record for eight bytes."""
_AHEAD_LEAST = 64 * 1024
"""Bytes of finished frames that may wait for one flush however short the step between two PINGs is."""
QUEUE_AHEAD = 512 * 1024
"""Bytes of finished frames that may wait for one flush; beyond it payload waits in its stream, where it is fair."""
HANDSHAKE = frozenset({FrameType.HELLO, FrameType.AUTH, FrameType.AUTH_OK, FrameType.GOAWAY})
"""What may come before a peer's byte sequence begins."""
DRAIN_CODES = frozenset({GoawayCode.DONE, GoawayCode.DRAINING, GoawayCode.REPLACED})


class Violation(Exception):
    """The peer broke the protocol; ends the session with a code."""

    def __init__(self, code: GoawayCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Books:
    """State of one side of a session or control connection."""

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
        """`budget` is what all sessions of the process may keep of what they sent; none: only this one's own limit."""
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
        """Whether payload may leave: the socket takes more (`set_writable`), the history has room, and the path takes
        more. While false, payload waits in its stream."""
        self.socket_writable = True
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
        # A part that is small beside what stopped readers leave free: what is never read never comes to a quarter.
        self._window = ReceiveWindow(FIRST_CREDIT, FIRST_CREDIT, grant=limits.session_window >> 4)
        self._usual_window = 0
        """The largest that a stream of this connection came to need."""
        self._stream_credit = FIRST_CREDIT
        self._next_id = 1 if side is Side.INITIATOR else 2
        self._last_peer_id = 0
        self._peer_streams = 0
        self._goaway_sent = False
        self._peer_goaway: Goaway | None = None
        self._drain_deadline: float | None = None
        self._handshake_deadline: float | None = now + limits.handshake_timeout
        self._keepalive: Keepalive | None = None
        self._idle_from = 0
        """Payload bytes that had come when the peer's last PING came."""
        self._resets = Allowance(limits.churn_burst, limits.churn_rate)
        self._control_budget = Allowance(limits.small_frame_burst, limits.small_frame_rate)
        self._earned = 0
        self._asked_at = 0
        """Payload bytes that had come with the peer's latest PING."""
        self._acked_position = 0
        self._peer_received = 0
        self.session_id = b""
        self.resume_secret = b""
        self.epoch = 0
        """Of the attached connection; each later one has a higher one."""
        self.resuming: Hello | None = None
        """Acceptor: this connection asks to resume another session."""
        self._history: Replay | None = None
        budget = budget or Budget(2 * (limits.replay + limits.session_window))
        if kind is Kind.SESSION and limits.replay:
            self._history = Replay(limits.replay, budget)
        self._growth = Growth(limits.session_window // 2, budget)
        """Of the streams' windows: half the session's, so that readers that stop cannot hold all of it."""
        self._extension = Growth(MAX_CREDIT - limits.session_window, budget)
        """Of the session's window: what readers that stopped hold beyond half of it."""
        self._history_full = False
        self._flight: CongestionWindow | None = None
        if kind is Kind.SESSION and limits.under_way:
            self._flight = CongestionWindow(limits.under_way, now=now)
        self._at_cap = False
        """As much is under way as the path takes."""
        self._room = limits.under_way if self._flight is not None else MAX_CREDIT
        """Payload that may leave in one portion."""
        self._ahead = QUEUE_AHEAD
        """Bytes of finished frames that may wait for the next flush."""
        self._cap_applied = 0
        """The cap for which `_room` and `_ahead` were set with less than a quarter of it under way; 0: none."""
        self._pinged = 0
        """Count of what was sent before the latest PING: its answer confirms all of it."""
        self._resend: deque[Piece] = deque()
        """What a resumed connection has to carry first."""
        self._answers_from = 0
        """Bytes of the peer's sequence behind which its answers to PING come: what it sends again comes before."""
        self._greeting: ResumeHandshake | None = None
        """Initiator: a new connection is in its handshake."""
        self._greeted: Hello | None = None
        self._before = State.OPEN
        """The state to which a detached session returns."""
        self._detached_deadline: float | None = None
        self._hello_template = Hello(
            VERSION,
            VERSION,
            "resume" if self._history is not None else "",
            limits.stream_window,
            limits.max_streams,
            agent,
            software,
            cluster_ca=cluster_ca,
        )
        self._hello = self._record(FrameType.HELLO, self._hello_template)
        if side is Side.INITIATOR:
            self._prelude.append(self._hello)

    @property
    def received(self) -> int:
        """Bytes of the peer's sequence that have arrived."""
        return max(0, self._decoder.position - self._received_base)

    @property
    def resumable(self) -> bool:
        """Whether the session outlives its connection: both ends keep history, and both know the secret."""
        return self._history is not None and bool(self.session_id) and self.state is not State.CLOSED

    def set_writable(self, writable: bool) -> None:
        """The socket takes more, or does not (called by the shell)."""
        self.socket_writable = writable
        self.writable = writable and not self._history_full and not self._at_cap

    def _keep(self, pieces: Sequence[Piece], count: int) -> None:
        """Keep what is being sent until the peer confirms it."""
        history = self._history
        if history is None or not count:
            return
        history.append(pieces, count)
        if history.full:
            self._history_full, self.writable = True, False
            if history.size > 2 * history.most + self.limits.max_queued_control:
                self._fail(GoawayCode.LIMIT, "the other end confirms nothing of what it gets")

    def _forget_history(self) -> None:
        """Nothing will be sent again."""
        if self._history is not None:
            self._history.clear()
            self._history = None
            self._history_full = False
            self.set_writable(self.socket_writable)

    def _learn_secret(self, session_id: bytes, secret: bytes) -> None:
        """Of the first AUTH_OK; without both, or where the peer keeps nothing, the session dies with its connection."""
        offered = self.peer_hello is not None and "resume" in self.peer_hello.features.split()
        if self._history is not None and session_id and secret and offered:
            self.session_id, self.resume_secret = session_id, secret
        else:
            self._forget_history()

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

    def _spend_control_budget(self) -> None:
        """Frames that need no credit: as many as our own payload explains, and an allowance beyond."""
        if self._earned >= 32768:
            self._control_budget.give(self._earned >> 15)
            self._earned &= 32767
        if not self._control_budget.take(self.now):
            raise Violation(GoawayCode.LIMIT, "a flood of control frames")

    def _count_reset(self) -> None:
        if not self._resets.take(self.now):
            raise Violation(GoawayCode.LIMIT, "streams are reset faster than is allowed")

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
        self._pinged = self.sent
        if self._flight is not None:
            self._flight.pinged(self.sent, self.now)
        self._queue_control(frame(FrameType.PING, 0, PING_BODY.pack(number, self.received)))

    def _has_left(self, flight: CongestionWindow, count: int) -> None:
        """`count` bytes more are under way: stop at the cap, and ask for news of the path in time."""
        sent, now, cap = self.sent, self.now, flight.cap
        under_way = sent - self._peer_received
        if now - flight.left_at > flight.round_trip:
            flight.resume(sent - count, under_way - count, now)
        flight.left_at = now
        if under_way << 2 < cap:
            if not self._scheduler:
                flight.app_limited_until = sent
            if self._cap_applied != cap:
                self._make_room(flight, cap - under_way)
                self._cap_applied = cap
            return
        room = cap - under_way
        if not self._scheduler and room >= flight.least:
            flight.app_limited_until = sent
        self._cap_applied = 0
        self._make_room(flight, room)

    def _make_room(self, flight: CongestionWindow, room: int) -> None:
        self._room = min(room, flight.step)  # a PING follows each step, however much fits
        self._ahead = min(QUEUE_AHEAD, max(flight.step, min(room, _AHEAD_LEAST)))
        at_cap = room < flight.least
        if at_cap is not self._at_cap:
            self._at_cap = at_cap
            self.set_writable(self.socket_writable)
        asks = self.sent - self._pinged >= flight.step and 4 * room < 3 * flight.cap
        if asks and self._keepalive is not None and self._may_send:
            self._send_ping()

    def _open_window(self) -> None:
        self._window.size = self._window.limit = self.limits.session_window
        due = self._window.open_up()
        if due:
            self._queue_control(frame(FrameType.WINDOW, 0, U32.pack(due)))

    def _new_stream(self, stream_id: int, target: str) -> Stream:
        window = ReceiveWindow(self.limits.stream_window, self.limits.max_stream_window, growth=self._growth)
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
            whole = self._window
            if self._extension.held and whole.consumed + count >= whole.due_at:
                self._shrink(whole.granted - whole.consumed - count)
            due = whole.consume(count, self.now, 0.0)
            if due:
                self._queue_control(frame(FrameType.WINDOW, 0, U32.pack(due)))

    def _look_at_unread(self) -> None:
        """Keep half of the session's window free for streams that are read, as far as the process has room for that.

        Called for each so many bytes that came: a stream whose reader stopped keeps its own window full for ever, and
        enough of them would leave the others nothing.
        """
        whole = self._window
        more = whole.unconsumed + (self.limits.session_window >> 1) - whole.size
        if more > 0 and self._authenticated and self.kind is Kind.SESSION:
            whole.size += self._extension.take(max(more, self.limits.session_window >> 3))
            whole.limit = max(whole.limit, whole.size)
            due = whole.open_up()
            if due:
                self._queue_control(frame(FrameType.WINDOW, 0, U32.pack(due)))

    def _shrink(self, promised: int) -> None:
        """Take back an extension, no further than `promised`, what the peer may still make us hold."""
        whole = self._window
        wanted = max(self.limits.session_window, whole.unconsumed + (self.limits.session_window >> 1), promised)
        if wanted < whole.size:
            self._extension.give(whole.size - wanted)
            whole.size = whole.limit = wanted

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
                self._decoder.abandon(stream.id)
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
        if stream.receiving is ReceiveState.RESET or not stream.window.unconsumed:
            stream.window.settle()

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
        room = self._room
        while size < limit and self._credit > 0 and size < room:
            turn = self._scheduler.next()
            if turn is None:
                return
            stream, most = turn
            most = min(most, stream.credit, self._credit, stream.queued, room - size)
            if most <= 0:
                self._scheduler.sent(stream, 0)
                continue
            pieces = stream.take(most)
            stream.credit -= most
            self._credit -= most
            stream.bytes_sent += most
            if stream is not self._scheduler.last_sender:
                self._scheduler.sender_changed(stream, self.now)
            header = pack_header(most << 8 | DATA, stream.id)
            if most < _JOIN_BELOW:
                parts.append(b"".join((header, *pieces)))
            else:  # owned already: no second copy
                parts.append(header)
                parts += pieces
            size += most + HEADER_SIZE
            self._scheduler.sent(stream, most)
            if stream.queued:
                pass  # it waits for its next turn, or for credit
            elif stream.sending is SendState.FINISHING:
                stream.sending = SendState.FINISHED
                stream.blocked = True  # whoever waits for the end is told, even if it never had to stop
                parts.append(frame(FrameType.FIN, stream.id))
                self._forget_if_over(stream)
            elif stream.sending is SendState.CUTTING:
                self.stats.resets_sent += 1
                parts.append(frame(FrameType.RESET, stream.id, U32.pack(ResetCode.TRUNCATED)))
                self._end_stream(stream, keep_received=stream.receiving is ReceiveState.FINISHED)
                self._finish_drain_if_idle()
            if stream.blocked and stream.queued <= stream.low_water:
                stream.blocked = False
                self._writable.append(stream)

    def _say_hello(self) -> None:
        if not self._hello_sent:
            self._hello_sent = True
            self._prelude.append(self._hello)

    def _say_goaway(
        self, code: GoawayCode, message: str, retry_after: int, *, in_turn: bool = False, final: bool = True
    ) -> None:
        """In turn: behind the frames that are queued. Not final: what runs may finish."""
        self._goaway_sent = True
        goaway = Goaway(self._last_peer_id, code, message[:1000], retry_after, final)
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
        if self.kind is not Kind.SESSION or self.streams:
            return
        if self.state is State.DRAINING:
            if self.side is Side.INITIATOR or self._peer_goaway is not None or self._all_confirmed:
                self._finish_drain()
        elif self.state is State.DETACHED and self._before is State.DRAINING:
            self._finish_drain()

    @property
    def _all_confirmed(self) -> bool:
        """Whether the peer has everything, so that no cut can take the end of a stream with it."""
        return not self.resumable or (self._peer_received >= self.sent and not self.has_output)

    @property
    def has_output(self) -> bool:
        """Whether `data_to_send` would give anything (credit apart)."""
        return bool(
            self._out
            or self._control
            or self._prelude
            or self._pong is not None
            or (self._resend and self.socket_writable)
            or (self.writable and self._credit and self._scheduler)
        )

    def _finish_drain(self) -> None:
        if self.state is State.CLOSED:
            return
        if not self._goaway_sent:
            self._say_goaway(GoawayCode.DONE, "", 0, in_turn=True)  # behind the last FIN
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
        self._handshake_deadline = self._drain_deadline = self._detached_deadline = None
        self._greeting = None
        self._early.clear()
        while self._scheduler.next() is not None:
            pass
        if not isinstance(error, SessionEnded) or error.code != GoawayCode.DRAINING:
            self._out.clear()
            self._out_bytes = 0
            if self._resend:  # a last word in the middle of what is sent again would not be understood
                self._resend.clear()
                self._control.clear()
        if self._history is not None:
            self._history.clear()
        self._growth.clear()
        self._extension.clear()
        self._events.append(ev.Ended(error))

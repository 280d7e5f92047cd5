"""Takes what arrives: payload into its streams within the windows, other frames to their handlers, counts for the peer.

The receiver is the decoder's sink (`wire.decoder.FrameSink`). It keeps the session's window, the count of the peer's
sequence and the allowances against floods; what a frame other than DATA means is `wire.frame_handlers`' matter. A
violation of the session is raised as `Violation`; DATA that breaks one stream's rules resets that stream alone; a race
is settled, counted and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arcbridge.limiters import TokenBucket
from arcbridge.wire.context import SessionContext
from arcbridge.wire.decoder import Decoder
from arcbridge.wire.frames import (
    FRAMES,
    HANDSHAKE,
    U32,
    U64,
    UNCHARGED,
    FrameType,
    GoawayCode,
    ResetCode,
    StreamId,
    frame,
)
from arcbridge.wire.lifecycle import Lifecycle, Violation
from arcbridge.wire.records import Hello
from arcbridge.wire.sender import Sender
from arcbridge.wire.session_window import SessionWindow
from arcbridge.wire.state import STATE_CLOSED, Kind
from arcbridge.wire.stream import RECEIVE_OPEN, RECEIVE_RESET, Stream
from arcbridge.wire.stream_table import StreamTable

PAYLOAD_EXPLAINS = 1024
"""Payload bytes that make a PING no part of a flood: they needed credit."""

SENT_EXPLAINS = 32 * 1024
"""Bytes of ours that explain one frame of the peer that needs no credit (WINDOW, ACK, PONG)."""

_STREAM, _ZERO = StreamId.STREAM, StreamId.ZERO  # as names of the module: see `wire.stream`


class Receiver:
    """The receiving direction of a session or control connection."""

    def __init__(
        self,
        context: SessionContext,
        lifecycle: Lifecycle,
        sender: Sender,
        decoder: Decoder,
        session_window: SessionWindow,
        table: StreamTable,
    ) -> None:
        limits = context.limits
        self._context = context
        self._lifecycle = lifecycle
        self._sender = sender
        self._session_window = session_window
        self._table = table
        self.handlers: Any = None
        """What acts on each type of frame other than DATA: a `FrameHandlers`, whose module needs this one."""
        self._streams = context.streams
        self._whole = session_window.account
        self.decoder = decoder
        self.peer_hello: Hello | None = None
        """The peer's HELLO of the first connection, once it came."""
        self.counting = False
        """Whether the peer's byte sequence has begun: before it only handshake frames and GOAWAY are lawful."""
        self._base = 0
        """Position of the decoder at which the sequence began."""
        self.reported_position = 0
        """Position of the decoder that the peer was told of last."""
        self.answers_from = 0
        """Bytes of the peer's sequence behind which its answers to PING come: what it sends again comes before."""
        self.control_budget = TokenBucket(limits.small_frame_burst, limits.small_frame_rate)
        """Frames that need no credit."""
        self._explained = 0
        """Bytes that this end sent and that were given to `control_budget` already."""
        self._asked_at = 0
        """Payload bytes that had come with the peer's latest PING."""
        self.usual_window = 0
        """The largest window, bytes, that a stream of this connection came to need."""

    # -- the decoder's sink -----------------------------------------------------------------------------------------

    def data_begins(self, stream_id: int, length: int) -> Callable[[memoryview], None] | None:
        """Account for the whole payload of a DATA header before any of it is taken (called by the decoder).

        The two windows are compared in place, and the stream's own sink is returned: this runs for every frame, and
        three calls were a fifth of what a frame cost.
        """
        stream = self._streams.get(stream_id)
        if stream is not None and length and self.counting and stream.receiving is RECEIVE_OPEN:
            whole, own = self._whole, stream.window
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
        if stream is None or not self.counting:
            if self._lifecycle.state is STATE_CLOSED:
                return None  # closed by a sink earlier in the same input
            if not self.counting:
                raise Violation(GoawayCode.PROTOCOL, "DATA before the handshake is complete")
            if self._context.kind is not Kind.SESSION:
                raise Violation(GoawayCode.PROTOCOL, "DATA on a control connection")
            self._table.find(stream_id, "DATA")  # raises unless the stream is over: a race at best
        if length == 0:
            self.spend_control_budget()
        if not self._whole.receive(length):
            raise Violation(GoawayCode.FLOW_CONTROL, "more bytes than the session's window")
        if stream is None:
            self._session_window.release(length)
            return None
        if stream.receiving is RECEIVE_OPEN and stream.window.receive(length):
            return stream.deliver  # of an empty frame nothing comes
        self._session_window.release(length)
        late = stream.receiving is not RECEIVE_OPEN
        self._table.refuse(stream, ResetCode.PROTOCOL if late else ResetCode.FLOW_CONTROL)
        return None

    def frame_received(self, kind: int, stream_id: int, body: bytes) -> None:
        """Take any other frame, whole (called by the decoder)."""
        layout = FRAMES.get(kind)
        if layout is not None and layout.stream_id is (_STREAM if stream_id == 0 else _ZERO):
            raise Violation(GoawayCode.PROTOCOL, f"a frame of type {kind} with stream id {stream_id}")
        if self.peer_hello is None and kind not in (FrameType.HELLO, FrameType.GOAWAY):
            raise Violation(GoawayCode.PROTOCOL, "the first frame is not HELLO")
        if self._lifecycle.state is STATE_CLOSED:
            return  # closed by a frame, or by an application, earlier in the same input
        if kind not in UNCHARGED:
            self.spend_control_budget()
        if layout is None:
            return
        if not self.counting and kind not in HANDSHAKE:
            raise Violation(GoawayCode.PROTOCOL, f"a frame of type {kind} before the handshake is complete")
        handlers = self.handlers
        handlers.table[kind](handlers, stream_id, body)

    # -- windows ----------------------------------------------------------------------------------------------------

    def consumed(self, stream: Stream, count: int) -> None:
        """Note that the consumer has `count` more bytes of the stream, and grant credit when enough has come
        together."""
        whole, own = self._whole, stream.window
        if (
            stream.receiving is RECEIVE_OPEN
            and own.consumed + count < own.due_at
            and whole.consumed + count < whole.due_at
        ):
            # Almost every delivery: no grant is due, so counting is all, in place as in `data_begins`.
            own.consumed += count
            whole.consumed += count
            return
        if self._lifecycle.state is STATE_CLOSED:
            if stream.id in self._table.unread:
                self._took_unread(stream, count)
                self._context.ahead.remove(count)
            return
        if stream.receiving is RECEIVE_OPEN:
            now, keepalive = self._context.now, self._lifecycle.keepalive
            trip = keepalive.round_trip if keepalive is not None else 0.0
            due = own.consume(count, now, trip, self.usual_window)
            if due:
                self.usual_window = max(self.usual_window, own.size)
                if keepalive is not None and keepalive.stale(now) and self._sender.handshake_done:
                    self._context.owner.send_ping()  # the window grows by the round trip, and paths change
                self._sender.queue_control(frame(FrameType.WINDOW, stream.id, U32.pack(due)))
        elif stream.receiving is RECEIVE_RESET:
            return  # settled when it was reset
        else:
            self._took_unread(stream, count)
        self._session_window.release(count)

    def _took_unread(self, stream: Stream, count: int) -> None:
        """The consumer has `count` more bytes of a stream of which no more come."""
        own = stream.window
        own.consumed += count
        if not own.unconsumed and self._table.unread.pop(stream.id, None) is not None:
            own.settle()

    def keep_half_free(self) -> None:
        """Let readers that stopped not starve the others; called for each so many bytes that came."""
        if self._lifecycle.authenticated and self._context.kind is Kind.SESSION:
            self._session_window.keep_half_free()

    # -- counts -----------------------------------------------------------------------------------------------------

    @property
    def received(self) -> int:
        """Bytes of the peer's sequence that have arrived."""
        return self.decoder.position - self._base

    def begin_counting(self) -> None:
        """Begin the peer's byte sequence behind the frame that is being handled."""
        self.counting = True
        self._base = self.decoder.position

    def report(self) -> int:
        """Return the count for a frame that tells it to the peer (ACK, PING, PONG)."""
        self.reported_position = self.decoder.position
        return self.reported_position - self._base

    def connection_changed(self, sent: int) -> None:
        """Go on over another connection with the sequence, of which the peer had sent `sent` bytes before."""
        self.answers_from = sent
        self.reported_position = self.decoder.position
        self.usual_window = 0

    def acknowledge(self) -> None:
        """`ack_every` bytes came of which the peer was not told (the session counts them in place): queue an ACK."""
        self._sender.queue_control(frame(FrameType.ACK, 0, U64.pack(self.report())))
        self.keep_half_free()

    # -- floods -----------------------------------------------------------------------------------------------------

    def spend_control_budget(self) -> None:
        """Charge a frame that needs no credit: allowed are as many as our own bytes explain, and a burst beyond."""
        unexplained = self._sender.sent - self._explained
        if unexplained >= SENT_EXPLAINS:
            frames = unexplained // SENT_EXPLAINS
            self.control_budget.give(frames)
            self._explained += frames * SENT_EXPLAINS
        if not self.control_budget.take(self._context.now):
            raise Violation(GoawayCode.LIMIT, "a flood of control frames")

    def ping_came(self) -> int:
        """Count a PING; return the payload bytes that came since the one before it.

        It counts as part of a flood unless payload came with it, which it asks about (`wire.congestion`).
        """
        came = self._whole.received - self._asked_at
        if came < PAYLOAD_EXPLAINS:
            self.spend_control_budget()
        self._asked_at += came
        return came

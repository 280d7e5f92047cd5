"""Sends finished frames in their order, payload as far as credit, socket, history and path allow.

The sender decides which bytes are written next and keeps what the peer has not confirmed. It reads no frame, knows no
state but `closed`, and ends no stream itself: it tells its `Owner`. It keeps this order: the handshake, what a resumed
connection sends again, PONG, control frames, finished frames, payload that waited.
"""

from __future__ import annotations

from collections import deque
from enum import IntFlag

from arcbridge.errors import LocalProtocolError
from arcbridge.wire.congestion import CongestionWindow
from arcbridge.wire.context import SessionContext
from arcbridge.wire.frames import (
    FIRST_CREDIT,
    HEADER_SIZE,
    MAX_DATA,
    PING_BODY,
    U32,
    FrameType,
    GoawayCode,
    ResetCode,
    frame,
    pack_header,
)
from arcbridge.wire.replay import Piece, Replay
from arcbridge.wire.scheduler import Scheduler
from arcbridge.wire.stream import PROGRESS, SEND_CUTTING, SEND_FINISHED, SEND_FINISHING, SEND_OPEN, SEND_RESET, Stream
from arcbridge.wire.window import MAX_CREDIT

_DATA = int(FrameType.DATA)
_JOIN_BELOW = 32 * 1024
"""Payload that waited in its stream is joined to its header up to this size, bytes: copying what has just been written
is cheaper than a TLS record for eight bytes."""
_AHEAD_LEAST = 64 * 1024
"""Bytes of finished frames that may wait for one flush however short the step between two PINGs is."""
_NO_PIECES: deque[Piece] = deque()
"""Is never filled: an empty deque has 760 bytes, for each control connection too."""

JOIN_WRITES = 32 * 1024
"""Up to this many bytes of one flush are joined into one write: few TLS records, one system call, one piece to keep."""
JOIN_PARTS = 4 * 1024
"""In a larger flush, parts below this size are joined to their neighbours; larger ones are not copied again."""
QUEUE_AHEAD = 512 * 1024
"""Bytes of finished frames that may wait for one flush; beyond it payload waits in its stream, where it is fair."""


class Blocked(IntFlag):
    """Why payload waits in its streams."""

    SOCKET = 1
    """The socket takes no more (`Sender.set_writable`), or there is none."""
    HISTORY = 2
    """As much is kept for a resumption as may be."""
    PATH = 4
    """As much is under way as the path takes."""
    RATE = 8
    """As many bytes have left as may for now (`Sender.set_paced`)."""


# Plain integers: an operation on the members themselves takes 0.6 µs, on integers 0.02.
_SOCKET = int(Blocked.SOCKET)
_HISTORY = int(Blocked.HISTORY)
_PATH = int(Blocked.PATH)
_RATE = int(Blocked.RATE)


class Sender:
    """The sending direction of a session or control connection."""

    def __init__(
        self,
        context: SessionContext,
        *,
        history: Replay | None = None,
        congestion: CongestionWindow | None = None,
        handshake_done: bool = True,
    ) -> None:
        """Without `history` or `congestion` that limit is not there."""
        limits = context.limits
        self._context = context
        self.handshake_done = handshake_done
        """Whether frames behind the handshake may leave. Until then only `prelude` does: an acceptor tells a peer that
        is not authenticated nothing more."""
        self.closed = False
        """Whether the session is over: what is queued leaves, and nothing is queued any more."""
        self.blocked = 0
        """Flags of `Blocked`: why payload waits in its streams; 0: it may leave. A plain integer: it is read for each
        frame."""
        self.sent = 0
        """Bytes of our sequence that were handed to the connection."""
        self.peer_received = 0
        """Bytes of our sequence that the peer has confirmed."""
        self.credit = FIRST_CREDIT
        """Payload bytes that the peer still accepts on all streams together."""
        self.scheduler = Scheduler(limits.frame_alone, limits.frame_shared)
        if congestion is not None:
            self.scheduler.set_pace(congestion.pace)
        self.prelude: list[bytes | memoryview] = []
        """Frames of the handshake, which are no part of the sequence."""
        self.control: list[bytes] = []
        """Control frames, which overtake finished frames."""
        self._control_bytes = 0
        self.pong: bytes | None = None
        """The answer to the peer's latest PING. Earlier ones are not answered: a flood of PINGs to an end that cannot
        write costs one frame."""
        self.out: list[bytes | memoryview] = []
        """Finished frames, in their order."""
        self.out_bytes = 0
        """Bytes in `out`."""
        self.resend = _NO_PIECES
        """What a resumed connection has to carry first."""
        self.history = history
        """What was sent and is not confirmed; None: nothing is kept, and the session cannot be resumed."""
        self.congestion = congestion
        """How many bytes may be under way; None: as many as credit allows."""
        self._room = limits.under_way if congestion is not None else MAX_CREDIT
        """Payload bytes that may leave in one portion."""
        self._ahead = QUEUE_AHEAD
        """Bytes of finished frames that may wait for the next flush."""
        self._cap_applied = 0
        """The cap, bytes, for which `_room` and `_ahead` were set with less than a quarter of it under way; 0: none."""
        self.pinged = 0
        """`sent` before the latest PING: its answer confirms all of it."""
        self.unblocked: list[Stream] = []
        """Streams whose writers had to stop and may go on."""

    # -- the socket -------------------------------------------------------------------------------------------------

    @property
    def blocked_by(self) -> Blocked:
        """Why payload waits in its streams, for people and tests."""
        return Blocked(self.blocked)

    @property
    def socket_writable(self) -> bool:
        """Whether the socket takes more."""
        return not self.blocked & _SOCKET

    def set_writable(self, writable: bool) -> None:
        """Note whether the socket takes more (called by the shell)."""
        if writable:
            self.blocked &= ~_SOCKET
        else:
            self.blocked |= _SOCKET

    def set_paced(self, paced: bool) -> None:
        """Let payload wait in its streams for a while (called by the shell); frames of other types leave."""
        if paced:
            self.blocked |= _RATE
        else:
            self.blocked &= ~_RATE

    # -- commands ---------------------------------------------------------------------------------------------------

    def send(self, stream: Stream, data: bytes | memoryview | bytearray) -> int:
        """Send bytes on a stream; how many now wait in it (0: all are in the write queue).

        The bytes are copied once, into what is written: `data` may be a view that is valid during the call only.
        Raises LocalProtocolError after `finish`; bytes for a stream that was reset are dropped, because the reset
        may have crossed them.
        """
        size = len(data)
        if (
            size <= stream.credit
            and size <= self.credit
            and not stream.queued
            and 0 < size <= MAX_DATA
            and not self.blocked
            and self.out_bytes + size <= self._ahead
            and not self.scheduler.ready
            and stream.sending is SEND_OPEN
        ):
            stream.credit -= size
            self.credit -= size
            stream.bytes_sent += size
            if stream is not self.scheduler.last_sender:
                self.scheduler.sender_changed(stream, self._context.now)
            self.out.append(b"".join((pack_header(size << 8 | _DATA, stream.id), data)))
            self.out_bytes += size + HEADER_SIZE
            return 0
        if stream.sending is SEND_RESET:
            return 0
        if stream.sending is not SEND_OPEN:
            raise LocalProtocolError("bytes after the end of the stream")
        if size:
            if not stream.queued:
                stream.stalled_since, stream.progress = self._context.now, stream.bytes_sent
            stream.put(data)
            self._context.backlog.add(size)
            if stream.credit > 0:
                self.scheduler.add(stream)
        return stream.queued

    def add_credit(self, stream: Stream, increment: int) -> None:
        """Add `increment` bytes to what a stream may send."""
        stream.credit += increment
        if stream.queued and stream.credit > 0:
            self.scheduler.add(stream)

    def add_session_credit(self, increment: int) -> bool:
        """Add `increment` bytes to what all streams may send; return False, changing nothing, if the peer may not allow
        it."""
        if increment == 0 or self.credit + increment > MAX_CREDIT:
            return False
        self.credit += increment
        return True

    def queue(self, body: bytes) -> None:
        """Queue a whole frame behind those that are finished."""
        if not self.closed:
            self.out.append(body)
            self.out_bytes += len(body)

    def queue_control(self, body: bytes) -> None:
        """Queue a whole frame before those that are finished. A peer that reads none of them ends the session."""
        if self.closed:
            return
        self.control.append(body)
        self._control_bytes += len(body)
        if self._control_bytes > self._context.limits.max_queued_control:
            self._context.owner.fail(GoawayCode.LIMIT, "the other end does not read what it causes")

    def ping(self, number: int, received: int) -> None:
        """Queue PING `number`, which tells the peer that `received` bytes of its sequence are here."""
        self.pinged = self.sent
        if self.congestion is not None:
            self.congestion.pinged(self.sent, self._context.now)
        self.queue_control(frame(FrameType.PING, 0, PING_BODY.pack(number, received)))

    def answer_ping(self, number: int, received: int) -> None:
        """Queue the answer to PING `number`, in place of one to an earlier PING."""
        self.pong = frame(FrameType.PONG, 0, PING_BODY.pack(number, received))

    def take_unblocked(self) -> list[Stream]:
        """Return the streams whose writers had to stop and may go on."""
        streams, self.unblocked = self.unblocked, []
        return streams

    # -- what leaves ------------------------------------------------------------------------------------------------

    @property
    def has_output(self) -> bool:
        """Whether `data_to_send` would give anything (the credit of single streams apart)."""
        return bool(
            self.out
            or self.control
            or self.prelude
            or self.pong is not None
            or (self.resend and not self.blocked & _SOCKET)
            or (not self.blocked and self.credit and self.scheduler.ready)
        )

    def data_to_send(self, limit: int, now: float = 0.0) -> list[bytes | memoryview]:
        """Return up to about `limit` bytes to write, in few parts, control frames first; call again while it gives any.

        The limit lets the scheduler choose as late as possible: a keystroke that comes now is still ahead of
        payload that was not handed over. Without `now` the latest one counts, which makes the path look longer.
        """
        context = self._context
        if now > context.now:
            context.now = now
        prelude: list[bytes | memoryview] = []
        before = 0
        if self.prelude:
            prelude, self.prelude = self.prelude, prelude
            before = sum(map(len, prelude))
            context.stats.bytes_sent += before
        if not self.handshake_done:
            return gathered(prelude, before)
        if self.resend:
            if self.closed:
                limit = self.sent  # the last call: nothing may be left behind
            elif self.blocked & _SOCKET:
                return gathered(prelude, before)
            again = self._take_resend(limit)
            count = sum(map(len, again))
            context.stats.bytes_sent += count
            return gathered([*prelude, *again], before + count)
        kept: list[bytes | memoryview] = []
        if not (self.control or self.pong is not None or self.scheduler.ready):
            # Almost every flush: only finished frames wait, and their size is known.
            kept, self.out = self.out, kept
            count, self.out_bytes = self.out_bytes, 0
        else:
            self._gather(kept, limit)
            count = sum(map(len, kept))
        if len(kept) > 1:
            # Before they are kept: pieces of nine bytes would take six times their size.
            kept = [b"".join(kept)] if count <= JOIN_WRITES else gathered(kept, count)
        parts = gathered([*prelude, *kept], before + count) if prelude else kept
        self.sent += count
        context.stats.bytes_sent += count
        if count:
            history = self.history
            if history is not None:
                history.append(kept, count)
                if history.size >= history.least_full and history.full:
                    self.blocked |= _HISTORY
                    if history.size > 2 * history.most + context.limits.max_queued_control:
                        context.owner.fail(GoawayCode.LIMIT, "the other end confirms nothing of what it gets")
            if self.congestion is not None:
                self._has_left(self.congestion, count)
        return parts

    def _gather(self, parts: list[bytes | memoryview], limit: int) -> None:
        """Append all that may leave, in its order: the PONG, control frames, finished frames, payload that waits."""
        if self.pong is not None:
            parts.append(self.pong)
            self.pong = None
        if self.control:
            parts += self.control
            self.control.clear()
            self._control_bytes = 0
        size, self.out_bytes = self.out_bytes, 0
        if self.out:
            parts += self.out
            self.out.clear()
        if self.scheduler.ready and not self.blocked:
            self._schedule(parts, size, limit)

    def _schedule(self, parts: list[bytes | memoryview], size: int, limit: int) -> None:
        """Fill `parts` up to `limit` bytes from the streams that wait."""
        room = self._room
        scheduler = self.scheduler
        while size < limit and self.credit > 0 and size < room:
            turn = scheduler.next()
            if turn is None:
                return
            stream, most = turn
            most = min(most, stream.credit, self.credit, stream.queued, room - size)
            if most <= 0:
                scheduler.sent(stream, 0)
                continue
            held = stream.held
            pieces = stream.take(most)
            self._context.backlog.remove(held - stream.held)
            stream.credit -= most
            self.credit -= most
            stream.bytes_sent += most
            if stream.bytes_sent - stream.progress >= PROGRESS:
                stream.stalled_since, stream.progress = self._context.now, stream.bytes_sent
            if stream is not scheduler.last_sender:
                scheduler.sender_changed(stream, self._context.now)
            header = pack_header(most << 8 | _DATA, stream.id)
            if most < _JOIN_BELOW:
                parts.append(b"".join((header, *pieces)))
            else:  # nothing else holds these pieces: no second copy
                parts.append(header)
                parts += pieces
            size += most + HEADER_SIZE
            scheduler.sent(stream, most)
            if stream.queued:
                pass  # it waits for its next turn, or for credit
            elif stream.sending is SEND_FINISHING:
                stream.sending = SEND_FINISHED
                stream.blocked = True  # a writer that waits for the end is told, even if it never had to stop
                parts.append(frame(FrameType.FIN, stream.id))
                self._context.owner.stream_sent(stream)
            elif stream.sending is SEND_CUTTING:
                parts.append(frame(FrameType.RESET, stream.id, U32.pack(ResetCode.TRUNCATED)))
                self._context.owner.stream_cut(stream)
            if stream.blocked and stream.queued <= stream.low_water:
                stream.blocked = False
                self.unblocked.append(stream)

    def _take_resend(self, limit: int) -> list[bytes | memoryview]:
        """Return up to about `limit` bytes of what is sent again."""
        parts: list[bytes | memoryview] = []
        size = 0
        while self.resend and size < limit:
            piece = self.resend.popleft()
            parts.append(piece)
            size += len(piece)
        return parts

    # -- history and path -------------------------------------------------------------------------------------------

    def _has_left(self, congestion: CongestionWindow, count: int) -> None:
        """`count` bytes more are under way: stop at the cap, and ask for news of the path in time."""
        sent, now, cap = self.sent, self._context.now, congestion.cap
        under_way = sent - self.peer_received
        if now - congestion.left_at > congestion.round_trip:
            congestion.resume(sent - count, under_way - count, now)
        congestion.left_at = now
        if under_way << 2 < cap:
            if not self.scheduler.ready:
                congestion.app_limited_until = sent
            if self._cap_applied != cap:
                self._make_room(congestion, cap - under_way)
                self._cap_applied = cap
            return
        room = cap - under_way
        if not self.scheduler.ready and room >= congestion.least:
            congestion.app_limited_until = sent
        self._cap_applied = 0
        self._make_room(congestion, room)

    def _make_room(self, congestion: CongestionWindow, room: int) -> None:
        """Let `room` bytes more be under way; a PING follows each step, however much fits."""
        step = congestion.step
        self._room = room if room < step else step
        ahead = room if room < _AHEAD_LEAST else _AHEAD_LEAST
        if ahead < step:
            ahead = step
        self._ahead = ahead if ahead < QUEUE_AHEAD else QUEUE_AHEAD
        if room < congestion.least:
            self.blocked |= _PATH
        else:
            self.blocked &= ~_PATH
        if self.sent - self.pinged >= step and 4 * room < 3 * congestion.cap and self.handshake_done:
            self._context.owner.send_ping()

    def confirmed(self, received: int) -> float:
        """Note that the peer's count rose to `received`, at most `sent`; return a new round trip in seconds, or 0."""
        self.peer_received = received
        history = self.history
        if history is not None:
            history.acknowledge(received)
            if self.blocked & _HISTORY and history.roomy:
                self.blocked &= ~_HISTORY
        congestion = self.congestion
        if congestion is None:
            return 0.0
        now = self._context.now
        congestion.interactive = self.scheduler.interactive_until > now
        trip = congestion.confirmed(received, self.sent, now)
        if trip:  # only an answer to a PING changes the rate
            if congestion.wants_probe(now) and congestion.begin_probe(now):
                self.queue_control(frame(FrameType.QUIET, 0))
            self.scheduler.set_pace(congestion.pace)
        self._cap_applied = 0
        self._make_room(congestion, congestion.cap - (self.sent - received))
        return trip

    # -- from one connection to the next ----------------------------------------------------------------------------

    def forget_history(self) -> None:
        """Keep nothing to send again: the session ends with its connection."""
        if self.history is not None:
            self.history.clear()
            self.history = None
            self.blocked &= ~_HISTORY

    def detach(self) -> None:
        """Send nothing until `attach`: the connection is gone."""
        self.blocked |= _SOCKET
        self.handshake_done = False
        self.pong = None
        self.resend = _NO_PIECES
        self.prelude.clear()

    def replay_from(self, received: int) -> None:
        """Send first what the peer lacks, which has `received` bytes: another connection stands."""
        assert self.history is not None
        self.handshake_done = True
        self.resend = self.history.since(received)
        self._context.stats.replayed_bytes += self.sent - received
        if self.congestion is not None:  # another path, perhaps: what was known counts once that is no longer
            most, now = self._context.limits.under_way, self._context.now
            self.congestion = CongestionWindow(most, sent=self.sent, now=now, earlier=self.congestion)
            self.scheduler.set_pace(self.congestion.pace)
            self.pinged = self.sent

    def attach(self) -> None:
        """Send over the new connection; as much at first as a path takes of which nothing is known."""
        if self.congestion is not None:
            self._cap_applied = 0
            self._make_room(self.congestion, self.congestion.cap - (self.sent - self.peer_received))
        self.set_writable(True)

    def close(self, *, keep_frames: bool) -> None:
        """Drop payload that waits, and finished frames too unless `keep_frames`: the session is over."""
        self.closed = self.handshake_done = True
        while self.scheduler.next() is not None:
            pass
        if not keep_frames:
            self.out.clear()
            self.out_bytes = 0
            if self.resend:  # a last word in the middle of what is sent again would not be understood
                self.resend = _NO_PIECES
                self.control.clear()
        self.forget_history()  # what still leaves, the last word among it, is not kept


def gathered(parts: list[bytes | memoryview], count: int) -> list[bytes | memoryview]:
    """Return the same `count` bytes in fewer parts: each is at least one TLS record."""
    if count <= JOIN_WRITES:
        return [b"".join(parts)] if parts else []
    found: list[bytes | memoryview] = []
    small: list[bytes | memoryview] = []
    for part in parts:
        if len(part) < JOIN_PARTS:
            small.append(part)
            continue
        if small:
            found.append(b"".join(small) if len(small) > 1 else small[0])
            small = []
        found.append(part)
    if small:
        found.append(b"".join(small) if len(small) > 1 else small[0])
    return found

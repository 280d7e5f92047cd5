"""The streams of a session: their ids, how they begin, and how they are settled and forgotten.

The table holds every stream that is not over. It decides no frame's meaning and schedules nothing. Invariant: a stream
leaves the table exactly when both of its directions are over, and the session then has back all the credit it held.
"""

from __future__ import annotations

from functools import lru_cache

from arcbridge.errors import SessionEnded
from arcbridge.limiters import TokenBucket
from arcbridge.wire import events as ev
from arcbridge.wire.context import SessionContext
from arcbridge.wire.decoder import Decoder
from arcbridge.wire.frames import (
    FIRST_CREDIT,
    HEADER_SIZE,
    U32,
    FrameType,
    GoawayCode,
    ResetCode,
    frame,
    pack_header,
    record_frame,
)
from arcbridge.wire.lifecycle import Lifecycle, Violation
from arcbridge.wire.records import Open
from arcbridge.wire.replay import Budget
from arcbridge.wire.sender import Sender
from arcbridge.wire.session_window import SessionWindow
from arcbridge.wire.state import Side
from arcbridge.wire.stream import (
    RECEIVE_FINISHED,
    RECEIVE_OPEN,
    RECEIVE_RESET,
    SEND_CUTTING,
    SEND_FINISHED,
    SEND_FINISHING,
    SEND_OPEN,
    SEND_RESET,
    Stream,
)
from arcbridge.wire.window import Growth, ReceiveWindow

LAST_ID = 0x7FFFFFFF
"""Largest stream id."""
_OPEN, _FIN = int(FrameType.OPEN), int(FrameType.FIN)


@lru_cache(maxsize=64)
def _open_body(target: str) -> bytes:
    """Return the body of OPEN. Raises LocalProtocolError for a target that is too long."""
    return record_frame(FrameType.OPEN, Open(target))[HEADER_SIZE:]


class StreamTable:
    """Streams that are not over, by id."""

    def __init__(
        self,
        context: SessionContext,
        lifecycle: Lifecycle,
        sender: Sender,
        decoder: Decoder,
        session_window: SessionWindow,
        budget: Budget,
    ) -> None:
        limits = context.limits
        self._context = context
        self._side = context.side.value
        """What the ids of this end's streams have in their last bit."""
        self._lifecycle = lifecycle
        self._sender = sender
        self._decoder = decoder
        self._session_window = session_window
        self.churn = TokenBucket(limits.churn_burst, limits.churn_rate)
        """Streams that may end before their answers; several sessions may share one."""
        self.streams = context.streams
        self.growth = Growth(limits.session_window // 2, budget)
        """Bytes by which the streams' windows grew: at most half of the session's, so that readers that stop cannot
        hold all of it."""
        self.unread: dict[int, Stream] = {}
        """Streams that are over but for bytes that their readers have not taken, by id."""
        self.early: list[ev.StreamOpened | ev.StreamFinished] = []
        """Events of streams that the peer opened before it was authenticated."""
        self.first_credit = FIRST_CREDIT
        """Bytes that the peer accepts on a new stream."""
        self.next_id = 1 if context.side is Side.INITIATOR else 2
        """Id of the next stream that this end opens."""
        self.last_peer_id = 0
        """Highest id that the peer has opened."""
        self.peer_streams = 0
        """Streams in the table that the peer opened."""

    # -- begin ------------------------------------------------------------------------------------------------------

    def open(self, target: str, most: int | None) -> Stream:
        """Open a stream of this end, the peer allowing `most` (None: it has not said yet).

        Raises SessionEnded when no id or no room is left, LocalProtocolError for a target that is too long.
        """
        if self.next_id > LAST_ID:
            raise SessionEnded(GoawayCode.DRAINING, "the session accepts no new streams")
        if most is not None and most <= len(self.streams) - self.peer_streams:
            raise SessionEnded(GoawayCode.LIMIT, f"{most} streams are open already")
        body = frame(_OPEN, self.next_id, _open_body(target))
        stream = self.add(self.next_id, target)
        self.next_id += 2
        self._sender.queue(body)
        return stream

    def peer_opens(self, stream_id: int, target: str) -> None:
        """Take a stream that the peer opened; it is refused while the session drains or above the limit. Raises
        Violation for an id that is not one that the peer may use next."""
        if stream_id & 1 == self._side:
            raise Violation(GoawayCode.PROTOCOL, "OPEN with a stream id of the other side's")
        if stream_id <= self.last_peer_id:
            raise Violation(GoawayCode.PROTOCOL, "OPEN with a stream id that does not rise")
        self.last_peer_id = stream_id
        authenticated = self._lifecycle.authenticated
        most = self._context.limits.max_streams if authenticated else self._context.limits.early_streams
        if self._lifecycle.goaway_sent or self.peer_streams >= most:
            self._sender.queue(frame(FrameType.RESET, stream_id, U32.pack(ResetCode.REFUSED)))
            self.count_churn()
            return
        stream = self.add(stream_id, target)
        stream.owed = True
        self.peer_streams += 1
        (self._context.events if authenticated else self.early).append(ev.StreamOpened(stream, target))

    def add(self, stream_id: int, target: str) -> Stream:
        """Make a stream and hold it."""
        window = ReceiveWindow(
            self._context.limits.stream_window, self._context.limits.max_stream_window, growth=self.growth
        )
        stream = Stream(stream_id, target, self.first_credit, window)
        self.streams[stream_id] = stream
        return stream

    def set_first_credit(self, credit: int) -> None:
        """Take from the peer's HELLO how much it accepts on each stream, those that are open included."""
        more = credit - self.first_credit
        self.first_credit = credit
        for stream in self.streams.values():
            self._sender.add_credit(stream, more)

    def tell_early(self) -> None:
        """Make the early streams of the peer visible, which is authenticated now."""
        self._context.events.extend(self.early)
        self.early.clear()

    # -- look -------------------------------------------------------------------------------------------------------

    def find(self, stream_id: int, name: str) -> Stream | None:
        """Return the stream that a frame called `name` means, or None if it is over. Raises Violation if it never
        was."""
        stream = self.streams.get(stream_id)
        if stream is None:
            ours = stream_id & 1 == self._side
            if stream_id == 0 or (stream_id >= self.next_id if ours else stream_id > self.last_peer_id):
                raise Violation(GoawayCode.PROTOCOL, f"{name} for a stream that was never opened")
        return stream

    # -- end --------------------------------------------------------------------------------------------------------

    def finish(self, stream: Stream) -> None:
        """End our direction in order, after all its bytes. A second call changes nothing."""
        if stream.sending is not SEND_OPEN:
            return
        if stream.queued:
            stream.sending = SEND_FINISHING
            return
        stream.sending = SEND_FINISHED
        self._sender.queue(pack_header(_FIN, stream.id))
        if stream.receiving is not RECEIVE_OPEN:
            self._forget(stream)

    def cut(self, stream: Stream) -> None:
        """End both directions because the source of our bytes broke off: them first, then RESET with TRUNCATED."""
        if stream.id not in self.streams:
            return
        if stream.queued:
            stream.sending = SEND_CUTTING
        else:
            self.reset(stream, ResetCode.TRUNCATED)

    def reset(self, stream: Stream, code: ResetCode) -> None:
        """End both directions now; queued bytes are dropped. A stream that is over stays so."""
        if stream.id not in self.streams:
            return
        self._end(stream, code)
        if self._is_peers(stream) and (stream.owed or code != ResetCode.NO_ERROR):
            self.count_churn()
        self._context.owner.finish_drain_if_idle()

    def _end(self, stream: Stream, code: ResetCode) -> None:
        self.settle(stream, keep_received=stream.receiving is RECEIVE_FINISHED)
        self._sender.queue(frame(FrameType.RESET, stream.id, U32.pack(code)))

    def refuse(self, stream: Stream, code: ResetCode) -> None:
        """Reset a stream within which the peer broke the protocol."""
        self.tell_reset(stream, code)  # before the end of the session, which may follow from it
        self.reset(stream, code)
        if not self._is_peers(stream):
            self.count_churn()

    def peer_finished(self, stream: Stream) -> None:
        """Take the peer's FIN."""
        if stream.receiving is not RECEIVE_OPEN:
            self.refuse(stream, ResetCode.PROTOCOL)
            return
        stream.receiving = RECEIVE_FINISHED
        (self._context.events if self._lifecycle.authenticated else self.early).append(ev.StreamFinished(stream))
        if stream.sending is not SEND_OPEN:
            self.forget_if_over(stream)

    def peer_reset(self, stream: Stream, code: int, *, in_order: bool) -> None:
        """Take the peer's RESET; `in_order`: as part of an ordinary close, so that what was received stays."""
        churn = not in_order or stream.owed
        if self._is_early(stream) or stream.sending is SEND_CUTTING:
            in_order = False  # the shell does not know of it yet, or has let go of it: it reads nothing of what came
        elif code == ResetCode.TRUNCATED and stream.receiving is RECEIVE_OPEN:
            stream.receiving = RECEIVE_FINISHED  # what came is a prefix, and all of it counts
            in_order = True
        self.settle(stream, keep_received=in_order)
        self.tell_reset(stream, code)
        if churn:
            self.count_churn()
        self._context.owner.finish_drain_if_idle()

    def was_cut(self, stream: Stream) -> None:
        """Settle a stream that was cut and whose last bytes leave, with RESET behind them."""
        self.settle(stream, keep_received=False)  # who cut it reads no more
        if self._is_peers(stream):
            self.count_churn()
        self._context.owner.finish_drain_if_idle()

    def refused_above(self, last: int) -> None:
        """Refuse the streams of this end above `last`, which the peer did not process, as its GOAWAY says."""
        for stream in list(self.streams.values()):
            if stream.id & 1 == self._side and stream.id > last:
                self.settle(stream, keep_received=False)
                self.tell_reset(stream, ResetCode.REFUSED)

    def cancel_all(self) -> None:
        """Reset what still runs: the drain deadline has passed."""
        for stream in list(self.streams.values()):
            self.tell_reset(stream, ResetCode.CANCELLED)
            self._end(stream, ResetCode.CANCELLED)
        self._context.owner.finish_drain_if_idle()

    def close(self) -> None:
        """Forget early streams, and promise nothing any more: the session is over."""
        self.early.clear()
        self.growth.clear()
        self._session_window.close(sum(stream.window.unconsumed for stream in self.unread.values()))

    def count_churn(self) -> None:
        """Count a stream that ended by RESET, or before its answer; end the session where too many do."""
        if not self.churn.take(self._context.now):
            self._context.owner.fail(GoawayCode.LIMIT, "streams end before their answers faster than is allowed")

    def settle(self, stream: Stream, *, keep_received: bool) -> None:
        """Return the credit of a stream whose directions are both over, and forget it."""
        stream.outbox.clear()
        self._context.backlog.remove(stream.held)
        stream.queued = stream.held = 0
        stream.sending = SEND_RESET
        self._sender.scheduler.remove(stream)
        if not keep_received:
            if stream.receiving is not RECEIVE_RESET:
                stream.receiving = RECEIVE_RESET
                self._decoder.abandon(stream.id)
                self._session_window.release(stream.window.unconsumed)
            stream.inbox.clear()
        self._drop(stream)

    def forget_if_over(self, stream: Stream) -> None:
        """Forget a stream of which one direction has ended in order, if the other had ended before."""
        if stream.over:
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        self._drop(stream)
        if stream.owed:
            self.count_churn()
        if self._lifecycle.draining:
            self._context.owner.finish_drain_if_idle()

    def tell_reset(self, stream: Stream, code: int) -> None:
        """Tell the shell that a stream was reset, unless it does not know of it yet."""
        if self._is_early(stream):
            self.early = [event for event in self.early if event.stream is not stream]
        else:
            self._context.events.append(ev.StreamWasReset(stream, code))

    def _is_early(self, stream: Stream) -> bool:
        """Return whether the peer opened it before it had shown who it is."""
        return not self._lifecycle.authenticated and self._is_peers(stream)

    def _is_peers(self, stream: Stream) -> bool:
        """Return whether the peer opened it."""
        return stream.id & 1 != self._side

    def _drop(self, stream: Stream) -> None:
        if self.streams.pop(stream.id, None) is not None and stream.id & 1 != self._side:
            self.peer_streams -= 1
        window = stream.window
        if stream.receiving is RECEIVE_RESET or window.received == window.consumed:
            if window.grown:
                window.settle()
        else:
            self.unread[stream.id] = stream

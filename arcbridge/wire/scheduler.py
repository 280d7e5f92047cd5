"""Chooses the stream that sends next: sparse streams first, then bulk in turns of a large quantum.

A stream whose waiting bytes fit into its *allowance* is sparse (a keystroke, a watch's event) and is served before all
bulk, so bulk need not be cut into small frames for its sake. The allowance is renewed once bulk had a whole round, so
sparse streams cannot starve it. Everything else takes turns of one quantum, equal shares of bytes (RFC 8290 §4.1 has
the same two lists). Payload may be cut anywhere, so a turn is exactly its quantum, or all that the stream has; one
that the path or the session's credit cut short is continued before the next one begins.

The scheduler also knows whether a sparse stream is active beside bulk, for `wire.congestion`. It knows no clock: `now`
is monotonic seconds and an argument.
"""

from __future__ import annotations

from arcbridge.wire.stream import SEND_FINISHED, SEND_RESET, Stream

SPARSE_HOLD = 0.5
"""Seconds for which a sparse stream counts as active after it sent something beside bulk."""

BULK_BYTES = 64 * 1024
"""Bytes that a stream sends within `SPARSE_HOLD`, or at that rate, if it is bulk."""


class Scheduler:
    """The two rings of ready streams; a stream is in one of them at most once (its `scheduled` flag)."""

    def __init__(self, frame_alone: int, frame_shared: int) -> None:
        # Lists: an empty deque has 760 bytes, for each control connection too; a list of a thousand streams moves on in
        # less time than a frame takes.
        self._sparse: list[Stream] = []
        self._bulk: list[Stream] = []
        self._alone = frame_alone
        self._shared = frame_shared
        self.ready = 0
        """Streams in both rings; an attribute, because it is read for each frame."""
        self.quantum = frame_alone
        """Bytes of a bulk stream's turn while another one waits."""
        self.served = 0
        """Bytes that bulk streams sent in their turns."""
        self._turn = self._left = 0
        """Most bytes of the turn that `next` gave, and what is left of that of the first in `_bulk`."""
        self._of_sparse = False
        """Whether `next` gave a sparse stream's turn."""
        self.last_sender: Stream | None = None
        """The stream that sent payload last."""
        self.interactive_until = 0.0
        """Monotonic seconds; while they lie ahead, a sparse stream is active beside bulk."""
        self._sparse_sender: Stream | None = None
        """The sparse stream for which that is so."""

    def __len__(self) -> int:
        return self.ready

    def set_pace(self, count: int) -> None:
        """Set the quantum to `count` bytes, what the path takes in a millisecond, within the sizes of frames.

        Frames of 16 KiB whatever the rate cost a third over 10 streams: 354 MB/s against 564
        (`fresh-and-shared` in bench/results/2026-11-25-studies.json).
        """
        self.quantum = min(max(count, self._shared), self._alone)

    def add(self, stream: Stream) -> None:
        """Put a stream at the end of its ring unless it is in one."""
        if stream.scheduled:
            return
        stream.scheduled = True
        self.ready += 1
        round_bytes = self.quantum * len(self._bulk)
        if not self._bulk or self.served - stream.renewed_at >= round_bytes:
            stream.renewed_at, stream.allowance = self.served, self._shared
        (self._sparse if stream.queued <= stream.allowance else self._bulk).append(stream)

    def next(self) -> tuple[Stream, int] | None:
        """Take the next stream out of its ring, with the most bytes it may send in this turn; then call `sent`."""
        if self._sparse:
            stream = self._sparse.pop(0)
            self._of_sparse, self._turn = True, stream.allowance
        elif self._bulk:
            stream = self._bulk.pop(0)
            self._of_sparse = False
            self._turn = min(self._left or self.quantum, self.quantum) if self._bulk else self._alone
        else:
            return None
        stream.scheduled = False
        self.ready -= 1
        return stream, self._turn

    def sent(self, stream: Stream, count: int) -> None:
        """End the turn that `next` gave, in which `count` bytes were sent; what still waits gets its place."""
        left = self._turn - count
        if self._of_sparse:
            stream.allowance = left
        else:
            self.served += count
            self._left = 0
        if not stream.queued or stream.credit <= 0:
            return
        stream.scheduled = True
        self.ready += 1
        if left <= 0:
            self._bulk.append(stream)
        elif self._of_sparse:
            self._sparse.insert(0, stream)
        else:
            self._left = left
            self._bulk.insert(0, stream)

    def remove(self, stream: Stream) -> None:
        """Forget a stream."""
        if not stream.scheduled:
            return
        stream.scheduled = False
        self.ready -= 1
        if stream in self._sparse:
            self._sparse.remove(stream)
            return
        if self._bulk[0] is stream:
            self._left = 0
        self._bulk.remove(stream)

    def sender_changed(self, stream: Stream, now: float) -> None:
        """Note that another stream than `last_sender` sent payload, which its `bytes_sent` includes already."""
        previous, self.last_sender = self.last_sender, stream
        if previous is None or previous.sending in (SEND_FINISHED, SEND_RESET):
            return
        bulk = _is_bulk(stream, now)
        if bulk is not _is_bulk(previous, now):
            self._sparse_sender = previous if bulk else stream
            self.interactive_until = now + SPARSE_HOLD
        elif bulk and self._sparse_sender in (stream, previous):
            self.interactive_until = 0.0  # it was the beginning of a copy


def _is_bulk(stream: Stream, now: float) -> bool:
    """Return whether a stream sends as much as a copy does; a change of its bytes per second is noticed within the
    hold."""
    if not stream.measured_at:
        stream.measured_at = now
    elapsed, count = now - stream.measured_at, stream.bytes_sent - stream.measured_bytes
    if elapsed > SPARSE_HOLD:
        stream.bulk = count * SPARSE_HOLD >= BULK_BYTES * elapsed
        stream.measured_at, stream.measured_bytes = now, stream.bytes_sent
    elif count >= BULK_BYTES:
        stream.bulk = True
    return stream.bulk

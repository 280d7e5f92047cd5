"""Who sends next: round robin over the streams that have bytes and credit, equal shares of bytes.

A stream alone sends frames as large as one read gave; while another waits each turn is cut to one TLS record, so a
keystroke waits for one record of somebody's copy and not for a quarter of a megabyte. Payload may be cut anywhere,
so no deficit has to be carried from turn to turn: a turn is exactly its quantum, or all that the stream has.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arcbridge.wire.stream import Stream


class Scheduler:
    """The ring of ready streams; a stream is in it at most once (its `scheduled` flag)."""

    __slots__ = ("_alone", "_ring", "_shared")

    def __init__(self, frame_alone: int, frame_shared: int) -> None:
        self._ring: deque[Stream] = deque()
        self._alone = frame_alone
        self._shared = frame_shared

    def __len__(self) -> int:
        return len(self._ring)

    def add(self, stream: Stream) -> None:
        """Put a stream at the end of the ring unless it is in it."""
        if not stream.scheduled:
            stream.scheduled = True
            self._ring.append(stream)

    def next(self) -> tuple[Stream, int] | None:
        """Take the next stream out of the ring, with the most bytes it may send in this turn."""
        if not self._ring:
            return None
        stream = self._ring.popleft()
        stream.scheduled = False
        return stream, (self._shared if self._ring else self._alone)

    def put_back(self, stream: Stream) -> None:
        """Return a stream to the front: its turn did not happen (the session's credit was spent)."""
        if not stream.scheduled:
            stream.scheduled = True
            self._ring.appendleft(stream)

    def remove(self, stream: Stream) -> None:
        """Forget a stream."""
        if stream.scheduled:
            stream.scheduled = False
            self._ring.remove(stream)

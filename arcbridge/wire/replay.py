"""Keeps what was sent and is not yet confirmed: the bytes that a resumed connection needs again.

The pieces are the very objects that were written, so keeping them costs no copy (docs/benchmark/time.md). Offsets count
the byte sequence of one direction from 0 (`wire.session`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from arcbridge.wire.backlog import Backlog

Piece = bytes | memoryview

FLUSH_OVERHEAD = 256
"""Bytes that the objects of a kept flush take beside its pieces, which may be nine bytes long."""


class Budget:
    """Bytes that all sessions of a process may keep together.

    Counted are the history of what was sent, to the byte, and what peers were promised beyond what every stream and
    session gets at first (`window.Growth`): first credit is bounded by the number of sessions and streams.
    """

    __slots__ = ("held", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        """Bytes; a session above its floor stops writing while more are held, and no new session should be accepted."""
        self.held = 0

    @property
    def full(self) -> bool:
        """Whether nothing new should be accepted."""
        return self.held >= self.most

    @property
    def left_to_promise(self) -> int:
        """Bytes that may still be promised: a quarter is kept for history, without which nothing can be sent."""
        return max(0, self.most // 4 * 3 - self.held)


class Replay:
    """The history of one direction, oldest first.

    Whole flushes are kept and released, so a little more stays in memory than is unconfirmed: at most one flush. What
    is *counted* is exactly what is unconfirmed: a peer that has everything confirms all but less than `ack_every`
    bytes, and a part of a large flush that it did confirm must not keep the history full until the next PING.
    """

    __slots__ = ("_backlog", "_budget", "_first", "_flushes", "least_full", "most", "size", "start")

    FLOOR = 1024 * 1024
    """Bytes that a session may always keep, however short the process is: four times what the peer confirms at once."""

    def __init__(self, most: int, budget: Budget, backlog: Backlog) -> None:
        """`backlog` is the session's, in which what is kept counts too."""
        self.most = most
        self.least_full = min(most, self.FLOOR)
        """Bytes below which it is never `full`."""
        self.start = 0
        """Offset of the first byte that is not confirmed."""
        self.size = 0
        """Bytes from there on."""
        self._first = 0
        """Offset of the oldest flush, in which `start` lies."""
        self._flushes: deque[tuple[int, Sequence[Piece]]] = deque()
        self._budget = budget
        self._backlog = backlog

    @property
    def end(self) -> int:
        """Offset behind the last byte that is kept: all that was sent."""
        return self.start + self.size

    @property
    def held(self) -> int:
        """Bytes that it counts for in the session's backlog."""
        return self.size + FLUSH_OVERHEAD * len(self._flushes)

    @property
    def full(self) -> bool:
        """Whether writing has to pause until the peer confirms more."""
        return self.size >= self.most or (self.size >= self.FLOOR and self._short)

    @property
    def roomy(self) -> bool:
        """Whether writing that paused may go on."""
        return self.size <= self.most // 2 and (self.size < self.FLOOR // 2 or not self._short)

    @property
    def _short(self) -> bool:
        """Whether the process, or the user, keeps as much as may be."""
        return self._budget.held >= self._budget.most or self._backlog.spent

    def append(self, pieces: Sequence[Piece], count: int) -> None:
        """Keep `count` bytes that are being sent; the pieces must not change any more."""
        self._flushes.append((count, pieces))
        self.size += count
        self._budget.held += count
        self._backlog.add(count + FLUSH_OVERHEAD)

    def acknowledge(self, offset: int) -> None:
        """Forget everything before `offset`, which the peer has and which must not be above `end`."""
        count = offset - self.start
        if count <= 0:
            return
        self.start = offset
        self.size -= count
        self._budget.held -= count
        flushes = self._flushes
        while flushes and self._first + flushes[0][0] <= offset:
            self._first += flushes.popleft()[0]
            count += FLUSH_OVERHEAD
        self._backlog.add(-count)

    def holds(self, offset: int) -> bool:
        """Return whether everything from `offset` on can be sent again."""
        return self.start <= offset <= self.end

    def since(self, offset: int) -> deque[Piece]:
        """Return the bytes from `offset` on. Raises ValueError when they are not all held."""
        if not self.holds(offset):
            raise ValueError(f"offset {offset} is not in {self.start} to {self.end}")
        again: deque[Piece] = deque()
        skip = offset - self._first
        for count, pieces in self._flushes:
            if skip >= count:
                skip -= count
                continue
            for piece in pieces:
                size = len(piece)
                if skip >= size:
                    skip -= size
                    continue
                again.append(memoryview(piece)[skip:] if skip else piece)
                skip = 0
        return again

    def clear(self) -> None:
        """Let go of everything: the session is over."""
        self._budget.held -= self.size
        self._backlog.remove(self.held)
        self.start += self.size
        self.size = 0
        self._first = self.start
        self._flushes.clear()

"""Credit: how many bytes a peer may still send.

A sender holds a plain integer; a receiver holds a `ReceiveWindow`, which decides when to grant more. Credit is a
promise, not a request to pause: what was granted can always be stored.

Policy of the receiving side, in order:

1. The window starts at `size`; the peer may have `size` bytes sent and not yet consumed.
2. Consuming grants nothing until a quarter of the window can be granted at once. Not half: what is left behind a
   grant of a little more than half never comes to half, so that only half a window moved per round trip, and the
   measurement below, doubled, was just the window that there was.
3. The window grows towards twice the delivered bandwidth times the smallest recent round trip, so that one stream
   fills a long path. It grows only when a grant is due anyway: before that a larger window would change nothing, and
   deliveries are too many to measure at each. Bandwidth is measured over at least one such round trip, so that a
   burst out of a queue does not count as bandwidth, and from the end of the measurement before, so that a reader who
   takes a full window at once after a pause does not either. The smallest round trip is used because a queue
   inflates the current one, and a window fed by that grows into the queue until a keystroke waits behind a copy.
4. It never shrinks, and never exceeds `limit`.
"""

from __future__ import annotations

MAX_CREDIT = 2**31 - 1
"""Most credit that a sender may hold; a grant beyond it is a flow-control error (RFC 9113 §6.9.1 has the same rule)."""

LEAST_ROUND_TRIP = 0.001
"""Seconds. Below it scheduling, not the path, is what delays a grant; a loopback stream needs about 2 MiB."""


class ReceiveWindow:
    """The receiving side's account of one stream, or of a whole session (with `limit == size`: fixed)."""

    __slots__ = ("_sample_bytes", "_sample_start", "consumed", "due_at", "granted", "limit", "received", "size")

    def __init__(self, size: int, limit: int, *, granted: int | None = None) -> None:
        self.size = size
        self.limit = limit
        self.granted = size if granted is None else granted
        """Total bytes that the peer was ever allowed to send."""
        self.received = 0
        """Total bytes announced by DATA headers."""
        self.consumed = 0
        """Total bytes that the consumer has."""
        self.due_at = 0
        """`consumed` below this: no grant is due. The session compares it in place, for each delivery."""
        self._sample_start: float | None = None
        self._sample_bytes = 0
        """`consumed` at the start of the measurement."""
        self._granted()

    @property
    def unconsumed(self) -> int:
        """Bytes received (or announced) that the consumer does not have yet."""
        return self.received - self.consumed

    def receive(self, count: int) -> bool:
        """Account for `count` bytes announced; false if the peer had no credit for them (nothing is changed)."""
        if self.received + count > self.granted:
            return False
        self.received += count
        return True

    def consume(self, count: int, now: float, round_trip: float) -> int:
        """Account for `count` bytes consumed; the increment to grant now, or 0.

        `now` and `round_trip` in seconds; a round trip of 0 means that none was measured yet.
        """
        self.consumed += count
        if self.consumed < self.due_at:
            return 0
        if self.size < self.limit:
            self._grow(now, round_trip)
        return self.open_up()

    def open_up(self) -> int:
        """The increment that lifts the peer's credit to the whole window now (also after a change of `size`)."""
        due = max(0, self.consumed + self.size - self.granted)
        self.granted += due
        self._granted()
        return due

    def _granted(self) -> None:
        """Set when the next grant is due: a quarter of the window further on."""
        self.due_at = self.granted - self.size + (self.size >> 2)

    def _grow(self, now: float, round_trip: float) -> None:
        moved = self.consumed - self._sample_bytes
        if self._sample_start is None:  # how long these took to come is not known
            self._sample_start = now
            self._sample_bytes = self.consumed
            return
        span = max(round_trip, LEAST_ROUND_TRIP)
        elapsed = now - self._sample_start
        if elapsed < span:
            # A whole window within one round trip: the window, not the path, is the limit.
            if moved < self.size:
                return
            elapsed = span
        wanted = int(2 * moved / elapsed * span)
        self._sample_start = now
        self._sample_bytes = self.consumed
        if wanted > self.size:
            self.size = min(wanted, self.limit)

    def assert_invariants(self) -> None:
        """Raise AssertionError when the account is impossible; used by tests and debug builds."""
        assert 0 <= self.consumed <= self.received, "consumed more than was received"
        assert self.received <= self.granted, "received more than was granted"
        assert self.granted - self.consumed <= self.size, "granted more than the window can hold"
        assert self.size <= self.limit, "the window outgrew its limit"
        assert self.due_at == self.granted - self.size + (self.size >> 2), "the next grant is due at another moment"

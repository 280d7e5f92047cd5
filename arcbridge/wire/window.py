"""Credit: how many bytes a peer may still send.

A sender holds a plain integer; a receiver holds a `ReceiveWindow`, which decides when to grant more. Credit is a
promise, not a request to pause: what was granted can always be stored.

Policy of the receiving side, in order:

1. The window starts at `size`; the peer may have `size` bytes sent and not yet consumed.
2. Consuming grants nothing until a quarter of the window, or `GRANT`, can be granted at once. Not half: what is left
   behind a grant of a little more than half never comes to half, so that only half a window moved per round trip, and
   the measurement below, doubled, was just the window that there was.
3. The window grows towards twice the delivered bandwidth times the smallest recent round trip, so that one stream
   fills a long path. It grows only when a grant is due anyway: before that a larger window would change nothing, and
   deliveries are too many to measure at each. Bandwidth is measured over one such round trip to two, so that a
   burst out of a queue does not count as bandwidth, and each measurement begins where the one before it was half
   over: the window doubles each round trip while the path carries it, and a reader who takes a full window at once
   after a pause is not fast. The smallest round trip is used because a queue inflates the current one, and a window
   fed by that grows into the queue until a keystroke waits behind a copy.
4. Until the first such measurement is complete, a window of which a quarter arrived and was consumed in less than half
   a round trip doubles at once, up to `QUICK`: a copy's first window is gone before a round trip is over.
5. A stream whose window holds it up at once gets the largest that a stream of this connection came to need.
6. It never shrinks, and never exceeds `limit`, nor what is left of the session's share and the process's budget
   (`Growth`). A reader that stops consumes nothing, so its window does not grow.
"""

from __future__ import annotations

from dataclasses import dataclass

from arcbridge.wire.backlog import Backlog
from arcbridge.wire.replay import Budget

MAX_CREDIT = 2**31 - 1
"""Most credit that a sender may hold; a grant beyond it is a flow-control error (RFC 9113 §6.9.1 has the same rule)."""

GRANT = 1024 * 1024
"""Bytes that are granted at once at the latest: a larger part of a large window is missing on a long path."""

QUICK = 2 * GRANT
"""Bytes up to which a window doubles before it was measured for a whole round trip."""

LEAST_ROUND_TRIP = 0.004
"""Seconds. Below it scheduling, not the path, is what delays a grant: as long as the sender keeps bulk under way
(`round_trip.BULK_ROUND_TRIP`)."""


class Growth:
    """What a session promised beyond first credit, within a bound of its own, its user's and the process's budget."""

    __slots__ = ("_budget", "_user", "held", "most")

    def __init__(self, most: int, budget: Budget) -> None:
        self.most = most
        self.held = 0
        self._budget = budget
        self._user = Backlog(MAX_CREDIT)

    def share(self, user: Backlog) -> None:
        """Promise within `user`, too, of which what was promised is a part from now on."""
        self._user.remove(self.held)
        self._user = user
        user.add(self.held)

    def take(self, wanted: int) -> int:
        """Promise up to `wanted` bytes more; how many it came to."""
        user = self._user
        got = max(0, min(wanted, self.most - self.held, user.most - user.held, self._budget.left_to_promise))
        self.held += got
        user.add(got)
        self._budget.held += got
        return got

    def give(self, count: int) -> None:
        """Take back `count` bytes that the peer can no longer use. After `clear` it changes nothing."""
        count = min(count, self.held)
        self.held -= count
        self._user.remove(count)
        self._budget.held -= count

    def clear(self) -> None:
        """Return what all windows grew by: the session is over."""
        self.give(self.held)
        self.most = 0


@dataclass(slots=True, init=False, eq=False, repr=False)
class ReceiveWindow:
    """The receiving side's account of one stream, or of a whole session (with `limit == size`: fixed)."""

    size: int
    limit: int
    grant: int
    growth: Growth | None
    """Asked before the window grows, which it then does no further than that lets it."""
    grown: int
    """Bytes that `growth` gave."""
    granted: int
    """Total bytes that the peer was ever allowed to send."""
    received: int
    """Total bytes announced by DATA headers."""
    consumed: int
    """Total bytes that the consumer has."""
    due_at: int
    """`consumed` below this: no grant is due. The session compares it in place, for each delivery."""
    _sample_start: float | None
    _sample_bytes: int
    """`consumed` at the start of the younger of two measurements that overlap."""
    _start_before: float
    _bytes_before: int
    """The same of the older one."""
    _due_before: float
    """When the latest grant became due, monotonic seconds; and `received` then."""
    _received_before: int

    def __init__(self, size: int, limit: int, grant: int = GRANT, growth: Growth | None = None) -> None:
        self.size = self.granted = size
        self.limit, self.grant, self.growth = limit, grant, growth
        self.due_at = size >> 2 if size >> 2 < grant else grant  # as `open_up` has it, for each stream
        self.grown = self.received = self.consumed = 0
        self._sample_start, self._start_before, self._due_before = None, 0.0, 0.0
        self._sample_bytes = self._bytes_before = self._received_before = 0

    @property
    def unconsumed(self) -> int:
        """Bytes received (or announced) that the consumer does not have yet."""
        return self.received - self.consumed

    def receive(self, count: int) -> bool:
        """Account for `count` bytes announced; return False if the peer had no credit for them (nothing is changed)."""
        if self.received + count > self.granted:
            return False
        self.received += count
        return True

    def consume(self, count: int, now: float, round_trip: float, usual: int = 0) -> int:
        """Account for `count` bytes consumed; return the increment to grant now, or 0.

        `now` and `round_trip` in seconds; a round trip of 0 means that none was measured yet. `usual`: what other
        streams over this path came to need.
        """
        self.consumed += count
        if self.consumed < self.due_at:
            return 0
        if self.size < self.limit:
            self._grow(now, round_trip, usual)
        return self.open_up()

    def open_up(self) -> int:
        """Return the increment that lifts the peer's credit to the whole window now (also after a change of `size`).

        The next grant is due a quarter of the window further on.
        """
        due = max(0, self.consumed + self.size - self.granted)
        self.granted += due
        self.due_at = self.granted - self.size + min(self.size >> 2, self.grant)
        return due

    def _grow(self, now: float, round_trip: float, usual: int) -> None:
        if self._sample_start is None:  # how long these took to come is not known
            self._sample_start = self._start_before = self._due_before = now
            self._sample_bytes = self._bytes_before = self.consumed
            self._received_before = self.received
            return
        span = max(round_trip, LEAST_ROUND_TRIP)
        if self.size < QUICK:
            # What was stored while its reader paused does not count: as much must have come meanwhile.
            came = self.received - self._received_before
            if now - self._due_before <= span / 2 and came >= self.size >> 3:
                self._grow_by(min(max(2 * self.size, usual), self.limit) - self.size)
            self._due_before, self._received_before = now, self.received
        moved = self.consumed - self._bytes_before
        elapsed = now - self._start_before
        if elapsed >= span or moved >= self.size:  # a whole window within one round trip: it is the limit, not the path
            wanted = int(2 * moved / max(elapsed, span) * span)
            if wanted > self.size:
                if 4 * wanted > 5 * self.size:  # no doubt that the window is the limit: what sufficed others will do
                    wanted = max(wanted, usual)
                self._grow_by(min(wanted, self.limit) - self.size)
        if now - self._sample_start >= span / 2:
            self._start_before, self._bytes_before = self._sample_start, self._sample_bytes
            self._sample_start, self._sample_bytes = now, self.consumed

    def _grow_by(self, more: int) -> None:
        if self.growth is not None:
            more = self.growth.take(more)
            self.grown += more
        self.size += more

    def settle(self) -> None:
        """Return what the window grew by: the stream is over and its bytes are consumed."""
        if self.growth is not None and self.grown:
            self.growth.give(self.grown)
            self.grown = 0

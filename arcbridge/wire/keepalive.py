"""Liveness: when to PING, when the connection is dead, and the smallest recent round trip.

Two ways to be dead, both within `ping_timeout`: nothing at all arrives (the way in is cut), or our PING stays
unanswered while the peer reports no progress of what we send (the way out is cut, though the way in still works).

One PING shows both ends both ways: the answer goes the other way, and the next PING tells whether it arrived. So while
nothing else moves, the side that thousands come to leaves it to its peers (`peer_pinged`).
"""

from __future__ import annotations

ROUND_TRIP_MEMORY = 5.0
"""Seconds for which a round-trip sample counts, at least; after twice that a path that became longer is believed."""

ROUND_TRIP_STALE = 1.0
"""Seconds after which an end that is sent much asks anew."""


PATIENCE = 2.0
"""Intervals without a PING of the peer after which a side that leaves it to the peer sends its own."""


class Keepalive:
    """The clock of one connection; `handle` tells what is due."""

    def __init__(self, interval: float, timeout: float, now: float, *, number: int = 0) -> None:
        """`number` is that of the last PING of the session's former connection: a late answer must not match."""
        self._interval = interval
        self._timeout = timeout
        self.last_received = now
        """When the peer has sent something last, monotonic seconds."""
        self.last_progress = now
        """When the peer has shown last that something of ours arrived, monotonic seconds."""
        self._next_ping = now + interval
        self.number = number
        self._ping_sent: float | None = None  # the oldest that is unanswered
        self._last_ping = now
        self._smallest = 0.0
        self._older = 0.0
        self._turned = now

    @property
    def round_trip(self) -> float:
        """The smallest recent round trip, seconds; 0 before the first sample."""
        if self._smallest and self._older:
            return min(self._smallest, self._older)
        return self._smallest or self._older

    def sample(self, round_trip: float, now: float) -> None:
        """Take a measured round trip into account."""
        if now - self._turned > ROUND_TRIP_MEMORY:
            self._older, self._smallest, self._turned = self._smallest, 0.0, now
        if round_trip > 0.0 and (self._smallest == 0.0 or round_trip < self._smallest):
            self._smallest = round_trip

    def ping(self, now: float) -> int:
        """Begin a PING; its number."""
        self.number += 1
        if self._ping_sent is None:
            self._ping_sent = now
        self._last_ping = now
        self._next_ping = now + self._interval
        return self.number

    def peer_pinged(self, now: float) -> None:
        """Put our PING off, because the peer's came and is answered. Not for both ends, or each would wait for the
        other."""
        if self._ping_sent is None:
            self._ping_sent = now  # the answer counts as ours: the next PING has to tell of progress
        self._next_ping = max(self._next_ping, now + PATIENCE * self._interval)

    def pong(self, number: int, now: float) -> None:
        """Take the answer to PING `number`. Only the latest counts as a sample; late ones still show life."""
        if number == self.number and self._ping_sent is not None:
            self.sample(now - self._last_ping, now)
        if 0 < number <= self.number:
            self._ping_sent = None
            self.last_progress = now

    def dead(self, now: float, *, answers: bool = True) -> str | None:
        """Return why the connection is dead, or None.

        Without `answers` the peer cannot answer yet, because what it has to send again comes first.
        """
        if now - self.last_received >= self._timeout:
            return f"nothing arrived for {self._timeout:.0f} s"
        if not answers:
            self.last_progress = now
        elif self._ping_sent is not None and now - max(self._ping_sent, self.last_progress) >= self._timeout:
            return f"nothing that was sent arrived for {self._timeout:.0f} s"
        return None

    def stale(self, now: float) -> bool:
        """Return whether the round trip was last asked for more than `ROUND_TRIP_STALE` ago."""
        return now - self._last_ping >= ROUND_TRIP_STALE

    def ping_due(self, now: float) -> bool:
        """Return whether a PING is due."""
        return now >= self._next_ping

    def next_deadline(self) -> float:
        """Return the next moment at which `dead` or `ping_due` may change."""
        deadline = min(self._next_ping, self.last_received + self._timeout)
        if self._ping_sent is not None:
            deadline = min(deadline, max(self._ping_sent, self.last_progress) + self._timeout)
        return deadline

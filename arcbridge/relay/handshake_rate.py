"""How fast a herd is let in: so many a second, in the order of their coming, and a bounded wait.

When a relay comes back, all its agents come at once, and a full handshake with two signatures costs both ends more than
anything else here. Without a bound they would take all of the loop's time for as long as it lasts: what runs would
stall, and those who wait longest would give up just before their turn. So handshakes begin at an even rate that leaves
time for everything else, a newcomer who would have to wait longer than it is prepared to is turned away at once, and
its own jitter brings it back later.

Each newcomer is given the moment of its turn when it comes (a token bucket, kept as the one time at which the next
turn is free), so there is no queue to keep: who waits sleeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class HandshakeRate:
    """`rate` turns a second, `burst` at once after a pause, none that is further away than `longest` seconds.

    `clock` is monotonic seconds.
    """

    __slots__ = ("_burst", "_clock", "_free_at", "_interval", "_longest")

    def __init__(
        self, rate: float, *, burst: int = 1, longest: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = 1.0 / rate
        self._burst = (burst - 1) * self._interval
        self._longest = longest
        self._clock = clock
        self._free_at = -self._burst
        """When the next turn would be, without the burst."""

    def turn(self) -> float | None:
        """Take the next turn: the seconds until then, 0 for now. None: it is too far away, and none was taken."""
        now = self._clock()
        free_at = max(self._free_at, now - self._burst)
        wait = free_at - now
        if wait > self._longest:
            return None
        self._free_at = free_at + self._interval
        return max(wait, 0.0)

    @property
    def backlog(self) -> float:
        """Seconds until somebody who came now would have its turn."""
        return max(self._free_at - self._clock(), 0.0)

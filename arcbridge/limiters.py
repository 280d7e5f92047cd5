"""A token bucket: how often a peer may do something that costs us and needs no credit."""

from __future__ import annotations


class Allowance:
    """`burst` at once, refilled at `rate` per second. Time is an argument."""

    __slots__ = ("_left", "_then", "burst", "rate")

    def __init__(self, burst: int, rate: float) -> None:
        self.burst = burst
        self.rate = rate
        self._left = float(burst)
        self._then = 0.0

    def take(self, now: float, count: float = 1.0) -> bool:
        """Use `count`; false when the allowance is spent (the debt is kept, so a flood stays refused)."""
        self._left = min(self.burst, self._left + max(0.0, now - self._then) * self.rate) - count
        self._then = now
        return self._left >= 0.0

    def give(self, count: float) -> None:
        """Return `count`: work of ours that explains as many of the peer's actions."""
        self._left = min(self.burst, self._left + count)

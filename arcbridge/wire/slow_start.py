"""Slow start: how far the cap grows before the rate is known, and when the path counts as full.

`SlowStart` grows a cap of its own with each count (RFC 5681 §3.1), more slowly while answers show a queue (RFC 9406,
HyStart++), and ends when the queue lasts or when the rate stops rising. It does not set the cap in force, which
`CongestionWindow` makes from it. Its own never exceeds the largest that it was given.
"""

from __future__ import annotations

from arcbridge.wire.rate_estimate import SPAN

SHORT_ROUND_TRIP = 0.0015
"""Seconds: a path whose handshake took no longer is one machine or one network."""

SHORT_FIRST = 256 * 1024
"""The first cap, bytes, on such a path: a stream's first credit."""

DELAY_LEAST, DELAY_MOST = 0.004, 0.016
"""Bounds, in seconds, of the delay beyond the usual round trip that shows a queue; between them it is an eighth of
that round trip (RFC 9406 §4.3 has the same figures). Each answer of at least `SPAN` has to show it: a scheduler delays
all that come at once."""

CONSERVATIVE_ROUNDS = 5
"""Rounds of slower growth until the path counts as full (RFC 9406 §4.3)."""

PLATEAU = 3
"""Rounds without a rate a quarter higher, until the path counts as full."""


class SlowStart:
    """The growth of one direction's cap until its path is full, and again when the path becomes faster."""

    def __init__(self, first: int, most: int, earlier: tuple[int, float] | None = None) -> None:
        """`first`, `most`: the first and the largest cap, bytes. `earlier`: a cap, bytes, that counts from the first
        answer on which shows that the path is no longer than that round trip, seconds (RFC 9040 §8.1)."""
        self._most = most
        self.growing = True
        """Whether the path is not known to be full."""
        self.cap = min(first, most)
        """The cap that slow start came to, bytes."""
        self.full_rate = 0.0
        """The rate, bytes per second, at which the path last counted as full; while it grows, the latest that was a
        quarter higher than the one before. A rate a quarter above it begins growth again."""
        self.conservative = False
        """Whether answers show a queue, so that the cap grows more slowly."""
        self._earlier = earlier
        """Cap, bytes, and round trip, seconds, of the connection before; None: there was none, or it was used."""
        self._delayed_from = 0.0
        """When the first of the latest answers that all show a queue came, monotonic seconds; 0: the latest
        shows none."""
        self._conservative_rounds = 0
        """Rounds in a row that ended with slower growth."""
        self._flat_rounds = 0
        """Rounds since the rate was last a quarter higher."""

    def grow(self, count: int) -> None:
        """Grow by the `count` bytes that the peer confirmed, or by a quarter of them."""
        self.cap = min(self.cap + (count >> 2 * self.conservative), self._most)

    def take_trip(self, trip: float, usual: float, now: float) -> None:
        """Take a round trip, seconds, where `usual` is one without a queue: is there a queue, and is the path known?"""
        if trip <= usual + min(max(usual / 8, DELAY_LEAST), DELAY_MOST):
            self._delayed_from = 0.0
        elif not self._delayed_from:
            self._delayed_from = now
        self.conservative = 0.0 < self._delayed_from <= now - SPAN
        if trip <= SHORT_ROUND_TRIP:
            self.cap = max(self.cap, min(SHORT_FIRST, self._most))
        if self._earlier is not None and trip <= 1.25 * self._earlier[1] + 0.001:
            self.cap = max(self.cap, min(self._earlier[0], self._most))
            self._earlier = None

    def end_round(self, trip: float, usual: float, rate: float, measured: bool, cap: int) -> None:
        """End a round: stop growing on a full path, grow again from `cap`, bytes, on one that became a quarter faster.

        `trip`: the smallest round trip of the round, seconds; 0: none. `rate`: the estimate, bytes per second;
        `measured`: whether this round gave a sample of it.
        """
        self._conservative_rounds = self._conservative_rounds + 1 if self.conservative else 0
        if self.growing and (trip > 1.5 * usual + 2 * SPAN or self._conservative_rounds >= CONSERVATIVE_ROUNDS):
            self._flat_rounds = PLATEAU  # a queue: the path is full
        elif rate >= 1.25 * self.full_rate:
            self.full_rate = rate
            self._flat_rounds = 0
            if not self.growing:
                self.growing, self.cap = True, cap
        elif measured and self.growing:
            self._flat_rounds += 1
        if self.growing and rate and self._flat_rounds >= PLATEAU:
            self.growing = False
            self.full_rate = rate
            self.conservative, self._delayed_from, self._earlier = False, 0.0, None

"""Computes when to try again: with full jitter and a cap, forgetting what was long ago, obeying a server's time.

Pure: a random source and durations in, a delay out. Full jitter (uniform between nothing and the bound) spreads a
herd best and costs the single client half of the bound on average.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

FIRST: Final = 0.5
"""Bound of the first delay, in seconds: a relay that was restarted is back within a second."""
CAP: Final = 30.0
"""Largest bound: what a person waits at most after the network has come back."""
HEALTHY: Final = 60.0
"""A connection that lived this long was good: the next failure is a new story."""


class Backoff:
    """Delays of one reconnect loop. `random` returns floats in [0, 1)."""

    __slots__ = ("_cap", "_first", "_random", "attempt")

    def __init__(self, *, first: float = FIRST, cap: float = CAP, random: Callable[[], float] = random.random) -> None:
        self._first = first
        self._cap = cap
        self._random = random
        self.attempt = 0
        """Failures in a row so far."""

    def next_delay(self, *, lasted: float = 0.0, hint: float | None = None) -> float:
        """Return the seconds to wait after a failure.

        `lasted` is how long the connection had been healthy before it ended (0: it never was); from `HEALTHY` on
        the count starts again. `hint` is what the server said (Retry-After, GOAWAY): never sooner than that, and
        spread behind it by as much again within the cap, so that those who were told the same do not come at once.
        """
        if lasted >= HEALTHY:
            self.attempt = 0
        # 2**attempt is bounded before it is computed: the count may run for weeks.
        bound = min(self._cap, self._first * 2.0 ** min(self.attempt, 32))
        self.attempt += 1
        if hint is not None and hint > 0:
            return hint + self._random() * min(self._cap, max(bound, hint))
        return self._random() * bound

    def reset(self) -> None:
        self.attempt = 0

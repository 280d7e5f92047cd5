"""How long a run still takes: what was expected, corrected by how long what is done has taken."""

from __future__ import annotations

import time
from collections.abc import Callable


def minutes(seconds: float) -> str:
    """Return seconds as text for people."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


class Expectation:
    """Estimates the time that is left. `clock` returns monotonic seconds."""

    def __init__(self, expected_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._expected = expected_s
        self._done = 0.0
        self._clock = clock
        self._begun = clock()

    def done(self, expected_s: float) -> None:
        """Count a step as done that was expected to take `expected_s`."""
        self._done += expected_s

    def left_s(self) -> float:
        """Estimate the seconds that are left."""
        pace = (self._clock() - self._begun) / self._done if self._done else 1.0
        return max(0.0, self._expected - self._done) * pace

    def left(self) -> str:
        """Return `left_s` as text for people."""
        return f"about {minutes(self.left_s())} left"

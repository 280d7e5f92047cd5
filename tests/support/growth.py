"""How the work of a function grows with its input, without a figure that depends on the machine's pace.

It compares the processor time of this thread for an input with that for a multiple of it: the least of several rounds
of each, in turn, so that what else runs on the machine falls on both. Ordinary words of the smaller length are a floor,
because an input that is done with in a microsecond is no measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable

ROUNDS = 4


def growth(function: Callable[[str], object], smaller: str, larger: str) -> float:
    """Return how many times the work for `larger` is that for `smaller`."""
    small, large, words = [], [], []
    ordinary = ("word " * (len(smaller) // 5 + 1))[: len(smaller)]
    for _ in range(ROUNDS):
        small.append(_spent(function, smaller))
        large.append(_spent(function, larger))
        words.append(_spent(function, ordinary))
    return min(large) / max(min(small), min(words))


def _spent(function: Callable[[str], object], text: str) -> int:
    began = time.thread_time_ns()
    function(text)
    return max(1, time.thread_time_ns() - began)

"""Two agents with one instance id: each replaces the other's connection, again and again.

The newer of two connections wins, because mostly the older one is dead and nobody has noticed (threat E10). But ids are
made at random, so when the newer one is replaced in its turn at once, two processes have one id (a machine that was
copied with its memory), and letting each win would keep both, and the relay, busy for ever. Then a third connection is
refused for a while; the agents slow down, and it is counted.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

SETTLE: Final = 10.0
"""Seconds for which an instance that has just replaced another cannot be replaced. An agent that lost its connection
in silence needs 25 to notice, so it does not come twice in less."""


class Flapping:
    """The instances that were replaced lately; at most `size`, the oldest is forgotten. `clock` is monotonic."""

    def __init__(
        self, *, settle: float = SETTLE, size: int = 4096, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settle = settle
        self._size = size
        self._clock = clock
        self._replaced: OrderedDict[tuple[str, str], float] = OrderedDict()

    def wait(self, cluster: str, instance: str) -> int:
        """Whole seconds until this instance may replace its connection again; 0: now."""
        over = self._replaced.get((cluster, instance), -self._settle) + self._settle - self._clock()
        return int(over) + 1 if over > 0 else 0

    def replaced(self, cluster: str, instance: str) -> None:
        """Note that it has replaced one now."""
        key = (cluster, instance)
        self._replaced[key] = self._clock()
        self._replaced.move_to_end(key)
        if len(self._replaced) > self._size:
            self._replaced.popitem(last=False)

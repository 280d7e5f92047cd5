"""Measures how late the event loop runs, by a timer that knows when it was due.

Nothing in arcbridge may block the loop for more than a few milliseconds; this is the instrument that shows when
something does. One timer per process, four times a second.
"""

from __future__ import annotations

import asyncio
from typing import Final

from .metrics import Buckets

INTERVAL: Final = 0.25
BOUNDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class LoopLag:
    """`start` and `stop` are called on the loop that is measured; `delays` holds seconds."""

    def __init__(self, interval: float = INTERVAL) -> None:
        self.delays = Buckets(BOUNDS)
        self._interval = interval
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to measure; nothing happens if it already does."""
        if self._timer is None:
            self._loop = asyncio.get_running_loop()
            self._arm(self._loop)

    def stop(self) -> None:
        """End measuring; the counters stay."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + self._interval
        self._timer = loop.call_at(due, self._fired, loop, due)

    def _fired(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self.delays.observe(max(0.0, loop.time() - due))
        self._arm(loop)

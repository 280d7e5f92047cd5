"""The pairs of one user: where the user takes too much of the event loop, all of them pause, and go on, together.

It measures nothing (`loop_shares` does) and touches no socket: it calls `pause` and `go_on` of its pumps. Invariant: in
each period between two pauses every pair is read that has something to read, so that none of them starves.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from arcbridge.loop_shares import LoopTime, no_call


class Pausable(Protocol):
    """`relay.pump.Pump`."""

    closed: bool

    def pause(self) -> None: ...

    def go_on(self) -> None: ...


class PumpAccount:
    """The pairs for which one payer pays; `close` once it has none."""

    __slots__ = ("_next", "_payer", "pumps")

    def __init__(self, payer: LoopTime) -> None:
        self._payer = payer
        self._next: asyncio.Handle | None = None
        """The call that pauses the pairs, or lets them go on; None: they are read."""
        self.pumps: set[Pausable] = set()
        payer.on_over = self._over

    def hold(self, pump: Pausable) -> None:
        """Pause a new pair where the others are."""
        left = self._payer.held_until - time.monotonic()
        if left > 0.0 and not pump.closed:
            pump.pause()
            self._over(left)

    def close(self) -> None:
        """Leave the payer."""
        self._payer.on_over = no_call
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _over(self, seconds: float) -> None:
        if self._next is None:
            # At the end of this turn, which reads each pair once: a pair that always comes first would starve the rest.
            self._next = asyncio.get_running_loop().call_soon(self._payer.run, self._pause)

    def _pause(self) -> None:
        for pump in self.pumps:
            pump.pause()
        self._later()

    def _go_on(self) -> None:
        if self._payer.held_until > time.monotonic():
            self._later()
            return
        self._next = None
        for pump in self.pumps:
            pump.go_on()

    def _later(self) -> None:
        left = max(self._payer.held_until - time.monotonic(), 0.0)
        # Pausing costs time, too, and is charged: else many pairs of a user would make it dear for the others.
        self._next = asyncio.get_running_loop().call_later(left, self._payer.run, self._go_on)

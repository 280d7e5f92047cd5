"""Seats at the API server: requests of one user that it works on, or whose answers it is kept waiting with.

kube-apiserver gives each request that is not long-running a seat until its answer is written (API Priority and
Fairness), and has some fifty for all ordinary users. A caller who reads no answers would hold them all, and since the
agent buffers little, the others would wait. A request has its seat here until its answer is complete, and one that
finds none waits for its turn. The module knows no request.
Invariant: turns come in the order in which they were asked for, and none is given while `most` seats are held.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque

LONG_RUNNING_VERBS = frozenset({"watch", "proxy"})
LONG_RUNNING_SUBRESOURCES = frozenset({"attach", "exec", "log", "portforward", "proxy"})
"""What the API server takes for long-running, and gives no seat: as kube-apiserver configures its
`BasicLongRunningRequestCheck`."""


class Seats:
    """The seats of one user."""

    __slots__ = ("_waiting", "held", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        """Seats that may be taken; 0: any number."""
        self.held = 0
        """Seats that are held: more than `most` only where that was lowered meanwhile."""
        self._waiting: deque[asyncio.Future[None]] = deque()

    def take(self) -> bool:
        """Take a seat, or return false where none is free or others wait for one."""
        if self.most and (self.held >= self.most or self._waiting):
            return False
        self.held += 1
        return True

    async def turn(self, longest: float) -> None:
        """Take a seat when one is free. Raises TimeoutError after `longest` seconds, more or less; cancelled, it has
        taken none."""
        if self.take():
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            # Not all at once: many that came together would be refused in one turn of the loop.
            async with asyncio.timeout(longest * random.uniform(0.8, 1.2)):
                await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.leave()  # it had been given the seat in the same turn of the loop
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def leave(self) -> None:
        """Give a seat back: to the one that has waited longest, if there is one."""
        self.held -= 1
        if self._waiting:  # seldom: this is called for each request
            self._give()

    def change(self, most: int) -> None:
        """Let `most` seats be taken from now on; those that wait get the ones that became free by it."""
        self.most = most
        self._give()

    def _give(self) -> None:
        while self._waiting and (not self.most or self.held < self.most):
            turn = self._waiting.popleft()
            if not turn.done():
                self.held += 1
                turn.set_result(None)

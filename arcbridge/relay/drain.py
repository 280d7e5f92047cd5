"""Takes a relay away: it takes no new client, what runs moves to other relays, and the port is closed last.

One step after the other; the log names each:

1. *draining*: clients are refused with "try again"; dials of other relays stop; agents get GOAWAY, so they open a
   connection elsewhere and ask their clients to resume through another relay. Joins under way have a second. The port
   stays open: a client that comes is told why it is refused, and at once.
2. *cutting*: what has not left after `PATIENCE` is cut with RST, which every end takes as a loss and resumes; each
   session at a moment of its own within `SPREAD`, or the other relays would get all of them at once.
3. *leaving*: no session is left; agents that are opening a connection elsewhere have a moment to finish.
4. *closing*: the port is closed, and the agents that are left hear goodbye. Connections that the kernel holds for this
   process are reset by that, so their ends try again and find a successor on the same port, or another relay.

Of a relay with several processes each goes through these steps by itself, but for the last, which they take *together*
(docs/change.md): an agent that was asked to come may come out at any of them, and is handed over. What the kernel
has queued for a process by then is taken first, and told why it is refused.

A relay without sessions goes through all of it within a second; a second signal does the same to one that has some.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import structlog

from arcbridge.relay.client_join import ClientJoins
from arcbridge.relay.control import ControlServer
from arcbridge.relay.counters import Counters
from arcbridge.relay.listener import Listener
from arcbridge.relay.membership import Membership
from arcbridge.relay.pump import Pump, Pumps

PATIENCE: Final = 10.0
"""Seconds for sessions to leave by themselves: an agent needs a round trip to learn of the drain, a client some seconds
to spread its move and one join. A client without another relay stays until it is cut, and is away for as long."""
SPREAD: Final = 10.0
"""Seconds over which the rest is cut. `PATIENCE`, this and the last steps are within the 30 s after which service
managers kill."""
JOINING: Final = 1.0
LEAVING: Final = 0.3
_CLOSING: Final = 0.2
_LAST: Final = 1.0
"""Seconds for connections that were queued when the port was closed."""
_TICK: Final = 0.02
_WORDS: Final = "this relay is going away"

log = structlog.get_logger("arcbridge.relay")


class Step(Enum):
    """Where a drain is; `SERVING` is before."""

    SERVING = "serving"
    DRAINING = "draining"
    CUTTING = "cutting"
    LEAVING = "leaving"
    CLOSING = "closing"


@dataclass(eq=False, repr=False)
class Drain:
    """The one drain of a relay. `draw` returns floats in [0, 1)."""

    listener: Listener
    control: ControlServer
    clients: ClientJoins
    pumps: Pumps
    counters: Counters
    membership: Membership
    draw: Callable[[], float] = field(default=random.random, kw_only=True)
    step: Step = field(default=Step.SERVING, init=False)

    def unready(self) -> str | None:
        """Return why the relay takes no new client, for the readiness check; None: it does."""
        return None if self.step is Step.SERVING else _WORDS

    async def run(self, hurry: asyncio.Event) -> None:
        """Go from the first step to the last; once `hurry` is set, the steps that are left take no time."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        self._enter(Step.DRAINING)
        self.clients.draining = True
        await self.control.drain(_WORDS)
        await self._until(lambda: not self.clients.joining, begun + JOINING, hurry)
        self.clients.refuse_pending()
        if not await self._until(self._idle, begun + PATIENCE, hurry):
            self._enter(Step.CUTTING)
            await self._cut(begun + PATIENCE + SPREAD, hurry)
        self._enter(Step.LEAVING)
        await self._until(lambda: not len(self.control), loop.time() + LEAVING, hurry)
        await self.membership.wait_to_close(hurry)
        self._enter(Step.CLOSING)
        if self.membership.shares_port:
            self.listener.leave()
            await self._until(
                lambda: not self.listener.peeking and not self.clients.joining, loop.time() + _LAST, hurry
            )
        self.listener.stop()
        self.control.close()
        await self._until(lambda: not len(self.control), loop.time() + _CLOSING, None)

    def _enter(self, step: Step) -> None:
        self.step = step
        log.info("relay stopping", step=step.value, sessions=len(self.pumps), agents=len(self.control))

    def _idle(self) -> bool:
        return not len(self.pumps) and not self.clients.joining

    async def _cut(self, end: float, hurry: asyncio.Event) -> None:
        """Cut each pump at a random moment before `end`, and those that come meanwhile then."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        moments = sorted(((begun + self.draw() * (end - begun), pump) for pump in self.pumps), key=lambda one: -one[0])

        def due() -> bool:
            while moments and moments[-1][0] <= loop.time():
                self._end(moments.pop()[1])
            return self._idle()

        await self._until(due, end, hurry)
        for pump in list(self.pumps):
            self._end(pump)

    def _end(self, pump: Pump) -> None:
        if not pump.closed:
            self.counters.pumps_cut += 1
            pump.abort("cut by the drain")

    async def _until(self, done: Callable[[], bool], end: float, hurry: asyncio.Event | None) -> bool:
        """Wait until `done`; return false at the time `end`, or at once when `hurry` is set."""
        loop = asyncio.get_running_loop()
        while not done():
            if loop.time() >= end or (hurry is not None and hurry.is_set()):
                return False
            await asyncio.sleep(_TICK)
        return True

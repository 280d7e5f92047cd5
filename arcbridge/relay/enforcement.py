"""Ends what lost its right: the joins that wait, and the sessions that run, of users and clusters that may no more.

`enforce` is called whenever something may have changed (`relay.service`). It asks `relay.access` about every session of
this process, in slices, and only when an answer can be another one than before. Whom it finds is refused at once where
he comes, and cut here after `GRACE`, with RST at both ends as any cut: an end that would resume is refused at its join.
It decides nothing itself, and it sees the sessions of this process alone: of several workers, and of the relays of a
fleet, each does it for the sessions that it holds.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Final

import structlog

from arcbridge.relay.access import Access, Loss
from arcbridge.relay.counters import Counters
from arcbridge.relay.pump import Pump, Pumps
from arcbridge.relay.rendezvous import Rendezvous

GRACE: Final = 1.0
"""Seconds between the loss and the cut: an agent that was told meanwhile ends the session itself, with a reason that
the user reads."""
SLICE: Final = 256
"""Sessions that are looked at in one turn of the loop: at some microseconds each, no turn takes a millisecond more."""

log = structlog.get_logger("arcbridge.relay")


class Enforcement:
    """See the module's docstring."""

    def __init__(self, access: Access, pumps: Pumps, rendezvous: Rendezvous, counters: Counters) -> None:
        self._access = access
        self._pumps = pumps
        self._rendezvous = rendezvous
        self._counters = counters
        self._enforced: tuple[object, ...] | None = None
        """The version of `access` for which every session was looked at."""

    async def enforce(self) -> None:
        """End what has lost its right. Takes `GRACE` longer when there is something to cut."""
        version = self._access.version
        if version == self._enforced:
            return
        self._rendezvous.recheck()
        lost = await self._lost()
        if lost:
            self._tell(lost)
            await asyncio.sleep(GRACE)
            for pump, loss in lost:
                if not pump.closed:
                    pump.abort(loss.cause)
        # Only now: a look that was interrupted is made again.
        self._enforced = version

    async def _lost(self) -> list[tuple[Pump, Loss]]:
        """Find the sessions that have lost their right. One that begins meanwhile was asked for by the rendezvous."""
        lost = []
        for number, pump in enumerate(list(self._pumps)):
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
            loss = None if pump.closed else self._access.loss(pump.identity, pump.cluster)
            if loss is not None:
                lost.append((pump, loss))
        return lost

    def _tell(self, lost: list[tuple[Pump, Loss]]) -> None:
        """Count and log: one line for each user of a cluster, and one for a whole cluster."""
        lines: Counter[tuple[str, str, str]] = Counter()
        for pump, loss in lost:
            self._counters.sessions_cut[loss.reason] += 1
            user = "" if pump.identity is None or loss.reason == "cluster" else pump.identity.username
            lines[loss.cause, pump.cluster, user] += 1
        for (cause, cluster, user), sessions in lines.items():
            who = {"user": user} if user else {}
            log.warning("sessions cut off", cluster=cluster, sessions=sessions, reason=cause, **who)

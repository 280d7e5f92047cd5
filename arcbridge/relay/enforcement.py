"""Ends what lost its right: the joins that wait, and the sessions that run, of users and clusters that may no more.

`enforce` is called whenever something may have changed (`relay.service`). It asks `relay.access` about every session of
this process, in slices, and only when an answer can be another one than before. Who has lost the right is refused at
the door from then on; the agents are asked to end the sessions, also those that have lost their connection a moment
ago; and what is left after `GRACE` is cut, with RST at both ends as any cut. So the cut needs no agent's consent.

It decides nothing itself, and it sees the sessions of this process alone: of several workers, and of the relays of a
fleet, each does it for the sessions that it holds. The agent of one may be connected elsewhere; all are told.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import structlog

from arcbridge.identity.claims import Identity
from arcbridge.relay.access import Access, Loss
from arcbridge.relay.client_join import ClientJoins
from arcbridge.relay.counters import Counters
from arcbridge.relay.fleet.base import Lost
from arcbridge.relay.pump import Pump, Pumps

GRACE: Final = 1.0
"""Seconds between the loss and the cut: an agent that was told meanwhile ends the session itself, with a reason that
the user reads."""
SLICE: Final = 32
"""Sessions that are looked at in one turn of the loop: at 20 microseconds each (measured: a policy of eleven rules,
users of fifty groups) a turn takes less than a millisecond more, and 20 000 sessions half a second."""
REMEMBERED: Final = 150.0
"""Seconds for which it is remembered whose a session was that ended here: an agent holds one that has lost its
connection for two minutes (docs/protocol.md, "Resumption"), and what runs in it runs on."""
MOST_REMEMBERED: Final = 10_000
"""Users, in a cluster each, of whom that is remembered; the one whose session ended longest ago is forgotten first."""
MOST_TOLD: Final = 2000
"""Users of whom agents are told after one change. Each takes up to four frames, and an agent takes 20 000 at once
(docs/protocol.md, "Floods"). The sessions of the others are cut as well, and wait at the agent in vain."""
_POLICY_WORDS: Final = "the relay's policy does not let you reach this cluster any more"
_AHEAD: Final = 3600
"""Seconds by which the time lies ahead that agents are told of a user whom the policy does not allow: no token of any
clock is newer, and the user reads that logging in again does not help."""

log = structlog.get_logger("arcbridge.relay")


class _LostSession(NamedTuple):
    """A session that has lost its right. `pump` None: it ended here, and may wait at its agent for another one."""

    pump: Pump | None
    identity: Identity | None
    cluster: str
    loss: Loss


@dataclass(eq=False, repr=False)
class Enforcement:
    """See the module's docstring."""

    access: Access
    pumps: Pumps
    clients: ClientJoins
    counters: Counters
    tell: Callable[[Lost], None]
    """Has the agents of a cluster end a user's sessions, wherever they are connected."""
    _enforced: tuple[object, ...] | None = field(default=None, init=False)
    """The version of `access` for which every session was looked at."""
    _enforcing: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    """Policy and registry are looked at apart, and each look ends here."""
    _ended: OrderedDict[tuple[str, str, str], tuple[Identity, float]] = field(default_factory=OrderedDict, init=False)
    """Whose sessions ended, and when (monotonic seconds), by cluster and both names of the user."""

    def ended(self, pump: Pump) -> None:
        """Remember whose session has ended here: its agent may still hold it."""
        if pump.identity is None:
            return
        key = _key(pump.identity, pump.cluster)
        self._ended[key] = (pump.identity, asyncio.get_running_loop().time())
        self._ended.move_to_end(key)
        while len(self._ended) > MOST_REMEMBERED:
            self._ended.popitem(last=False)

    def held_sessions(self) -> Iterator[tuple[Identity, str]]:
        """Yield whose sessions run in this process, each with its cluster."""
        return ((pump.identity, pump.cluster) for pump in self.pumps if pump.identity is not None)

    async def enforce(self) -> None:
        """End what has lost its right. Takes `GRACE` longer when there is something to cut."""
        async with self._enforcing:
            await self._enforce()

    async def _enforce(self) -> None:
        version = self.access.version
        if version == self._enforced:
            return
        self.clients.recheck()
        lost = await self._lost()
        self._tell_agents(lost)
        if cut := [(one.pump, one.loss) for one in lost if one.pump is not None]:
            self._note(cut)
            await asyncio.sleep(GRACE)
            for pump, loss in cut:
                if not pump.closed:
                    pump.abort(loss.cause)
        for one in lost:
            # Its agent was told. Told again it would end what the user may have begun meanwhile with another right.
            if one.identity is not None:
                self._ended.pop(_key(one.identity, one.cluster), None)
        # Only now: a look that was interrupted is made again.
        self._enforced = version

    async def _lost(self) -> list[_LostSession]:
        """Find the sessions that have lost their right. One that begins meanwhile was asked for by the rendezvous."""
        oldest = asyncio.get_running_loop().time() - REMEMBERED
        while self._ended and next(iter(self._ended.values()))[1] < oldest:
            self._ended.popitem(last=False)
        sessions: list[tuple[Pump | None, Identity | None, str]] = [
            *((pump, pump.identity, pump.cluster) for pump in self.pumps),
            *((None, identity, key[0]) for key, (identity, _) in self._ended.items()),
        ]
        lost = []
        for number, (pump, identity, cluster) in enumerate(sessions):
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
            if (loss := self.access.loss(identity, cluster)) is not None:
                lost.append(_LostSession(None if pump is None or pump.closed else pump, identity, cluster, loss))
        return lost

    def _tell_agents(self, lost: list[_LostSession]) -> None:
        """Have the agents end the sessions of these users, once for each. A revoked cluster's agents are cut off."""
        ahead = math.ceil(time.time()) + _AHEAD
        told: dict[Lost, None] = {}
        for one in lost:
            if one.identity is None or one.loss.kind == "cluster":
                continue
            entry = one.loss.revocation
            before, words = (ahead, _POLICY_WORDS) if entry is None else (entry.before, entry.reason)
            told[Lost(one.cluster, *one.identity.names, before, words)] = None
        for user in itertools.islice(told, MOST_TOLD):
            self.tell(user)
        if len(told) > MOST_TOLD:
            log.warning("agents not told of all losses", users=len(told), users_told=MOST_TOLD)

    def _note(self, lost: list[tuple[Pump, Loss]]) -> None:
        """Count and log: one line for each user of a cluster, and one for a whole cluster."""
        lines: Counter[tuple[str, str, str]] = Counter()
        for pump, loss in lost:
            self.counters.sessions_cut[loss.kind] += 1
            user = "" if pump.identity is None or loss.kind == "cluster" else pump.identity.username
            lines[loss.cause, pump.cluster, user] += 1
        for (cause, cluster, user), sessions in lines.items():
            who = {"user": user} if user else {}
            log.warning("sessions cut off", cluster=cluster, sessions=sessions, reason=cause, **who)


def _key(identity: Identity, cluster: str) -> tuple[str, str, str]:
    return cluster, *identity.names

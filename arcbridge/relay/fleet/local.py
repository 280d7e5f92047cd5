"""The fleet of one relay: everything in this process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from arcbridge.errors import JoinRefused
from arcbridge.net.join import JoinCode
from arcbridge.observe.metrics import Metrics
from arcbridge.relay.fleet.base import AgentInfo, AgentLink, Fleet, Lost
from arcbridge.wire.records import Dial, Status

FIRST_SHARE: Final = 0.4
"""Part of the time that the first of two connections gets: an agent's status takes a round trip, so a silent one is
stuck, and the second needs time to join as well."""
_RETRY_AFTER: Final = 5


class LocalFleet(Fleet):
    """Links by cluster and instance; constant work per dial in the number of a cluster's agents."""

    def __init__(self) -> None:
        self._links: dict[str, dict[str, AgentLink]] = {}
        self._turn = itertools.count()
        # When each link was last asked: round robin among those with equally many dials waiting.
        self._asked: dict[AgentLink, int] = {}

    def add_metrics(self, metrics: Metrics) -> None:
        """Register nothing: a relay alone counts its dials nowhere else."""

    async def start(self) -> None:
        """Do nothing: there is nothing to start."""

    async def close(self) -> None:
        self._links.clear()
        self._asked.clear()

    async def drain(self) -> None:
        """Do nothing: there is no other relay."""

    async def register(self, link: AgentLink) -> None:
        self.add(link)

    async def unregister(self, link: AgentLink) -> None:
        self.remove(link)

    def add(self, link: AgentLink) -> None:
        """See `register`."""
        of_cluster = self._links.setdefault(link.cluster, {})
        older = of_cluster.get(link.instance)
        if older is link:
            return
        of_cluster[link.instance] = link
        self._asked[link] = next(self._turn)
        if older is not None:
            self._asked.pop(older, None)
            older.replaced()

    def remove(self, link: AgentLink) -> None:
        """See `unregister`."""
        of_cluster = self._links.get(link.cluster, {})
        # Only itself: the entry may be a newer connection's already.
        if of_cluster.get(link.instance) is link:
            del of_cluster[link.instance]
            self._asked.pop(link, None)
            if not of_cluster:
                del self._links[link.cluster]

    async def dial(self, cluster: str, dial: Dial, timeout: float) -> Status:
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        tried: list[AgentLink] = []
        failure = no_agent(cluster, dial.instance if self.has(cluster) else "")
        while len(tried) < 2 and (link := self.pick(cluster, dial.instance, tried)) is not None:
            tried.append(link)
            left = until - loop.time()
            another = len(tried) < 2 and self.pick(cluster, dial.instance, tried) is not None
            try:
                return await self.ask(link, dial, left * FIRST_SHARE if another else left)
            except JoinRefused as error:
                failure = error
        raise failure

    async def ask(self, link: AgentLink, dial: Dial, timeout: float) -> Status:
        """Ask one agent once. Raises `JoinRefused`."""
        if link in self._asked:
            self._asked[link] = next(self._turn)
        try:
            async with asyncio.timeout(timeout):
                return await link.dial(dial)
        except TimeoutError as error:
            raise JoinRefused(
                JoinCode.AGENT_TIMEOUT,
                f"an agent of cluster {link.cluster} is connected but did not answer the dial request",
                retry_after=_RETRY_AFTER,
            ) from error

    def tell_lost(self, lost: Lost) -> None:
        """Do nothing: there is no other process."""

    async def agents(self, cluster: str) -> list[AgentInfo]:
        found = [link.info for link in self._links.get(cluster, {}).values()]
        return sorted(found, key=lambda info: info.since)

    async def count(self, clusters: Sequence[str]) -> Mapping[str, int]:
        return {cluster: len(self._links[cluster]) for cluster in clusters if cluster in self._links}

    def links(self) -> list[AgentLink]:
        return [link for of_cluster in self._links.values() for link in of_cluster.values()]

    def pick(
        self, cluster: str, instance: str, tried: Collection[AgentLink] = (), avoid: Collection[str] = ()
    ) -> AgentLink | None:
        """Return the link to ask next by promise 2: neither one of the `tried` nor of an instance to `avoid`; of
        `instance` alone where that is given. None when no agent is left."""
        of_cluster = self._links.get(cluster, {})
        candidates = [
            link
            for link in ([of_cluster[instance]] if instance in of_cluster else [] if instance else of_cluster.values())
            if not link.draining and link not in tried and link.instance not in avoid
        ]
        return min(candidates, key=lambda link: (link.pending, self._asked[link]), default=None)

    def find(self, cluster: str, instance: str) -> AgentLink | None:
        return self._links.get(cluster, {}).get(instance)

    def has(self, cluster: str, instance: str = "") -> bool:
        """Return whether the cluster, or that instance of it, has a link here; a draining one counts."""
        of_cluster = self._links.get(cluster, {})
        return bool(of_cluster) if not instance else instance in of_cluster


def lost_agent(cluster: str) -> JoinRefused:
    """Refuse a dial whose agent's connection was lost."""
    return JoinRefused(JoinCode.NO_AGENT, f"the agent of cluster {cluster} lost its connection", retry_after=2)


def no_agent(cluster: str, instance: str = "") -> JoinRefused:
    """Refuse a dial for want of an agent; `instance`: that one was wanted, and others are there."""
    if instance:
        return JoinRefused(
            JoinCode.NO_INSTANCE,
            f"the agent of cluster {cluster} that has the session is not connected",
            retry_after=_RETRY_AFTER,
        )
    return JoinRefused(
        JoinCode.NO_AGENT,
        f"no agent of cluster {cluster} is connected: check that its agent runs and can reach this relay",
        retry_after=_RETRY_AFTER,
    )

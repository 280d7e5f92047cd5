from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from arcbridge.net.join import JoinCode
from arcbridge.relay.fleet.base import AgentLink, AgentReport, Fleet, Lost
from arcbridge.relay.fleet.workers import WorkersFleet
from arcbridge.relay.siblings.channel import Head
from arcbridge.relay.siblings.group import Siblings
from arcbridge.wire.records import Dial, Status
from tests.relay.fleet.conformance import DIAL, FleetConformance, Link
from tests.relay.siblings.test_group import joined
from tests.relay.station import refused
from tests.support.eventually import until


class Worker:
    def __init__(self) -> None:
        self.siblings = Siblings()
        self.fleet = WorkersFleet(self.siblings)

    async def close(self) -> None:
        self.siblings.close()
        await self.fleet.close()


async def workers(count: int) -> list[Worker]:
    made = [Worker() for _ in range(count)]
    for first in range(count):
        for second in range(first + 1, count):
            joined(made[first].siblings, made[second].siblings, 1, (first, second))
    for one in made:
        assert await one.siblings.synced(count - 1, 5)
    return made


class TestOneWorker(FleetConformance):
    async def make(self) -> Fleet:
        return WorkersFleet(Siblings())


class Apart(Fleet):
    """Agents at one worker, clients at another."""

    def __init__(self, clients: Worker, agents: Worker) -> None:
        self.clients, self.at = clients, agents

    async def _settled(self) -> None:
        """Wait until one worker knows the other's agents: their one channel keeps the order."""
        want = {(link.cluster, link.instance): stamp for link, stamp in self.at.fleet._own.items()}
        await until(lambda: {key[1:]: one.stamp for key, one in self.clients.fleet._remote.items()} == want)

    async def close(self) -> None:
        await self.clients.close()
        await self.at.close()

    async def register(self, link: AgentLink) -> None:
        older = self.at.fleet.find(link.cluster, link.instance)
        await self.at.fleet.register(link)
        if older is not None:
            # The agent's connection unregisters like this when it was told.
            await self.at.fleet.unregister(older)
        await self._settled()

    async def unregister(self, link: AgentLink) -> None:
        await self.at.fleet.unregister(link)
        await self._settled()

    async def dial(self, cluster: str, dial: Dial, timeout: float) -> Status:
        return await self.clients.fleet.dial(cluster, dial, timeout)

    async def count(self, clusters: Sequence[str]) -> Mapping[str, int]:
        return await self.clients.fleet.count(clusters)

    def links(self) -> list[AgentLink]:
        return self.at.fleet.links()


class TestApart(FleetConformance):
    async def make(self) -> Fleet:
        clients, agents = await workers(2)
        return Apart(clients, agents)

    async def test_the_one_with_fewest_waiting(self, fleet: Fleet) -> None:
        """A worker counts the dials that it sent itself, not those of its siblings."""
        busy, idle = Link(instance="busy", answer=None), Link(instance="idle")
        await fleet.register(busy)
        waiting = [asyncio.create_task(fleet.dial("prod", DIAL, 60)) for _ in range(2)]
        await until(lambda: busy.pending == 2)
        await fleet.register(idle)
        for _ in range(3):
            await fleet.dial("prod", DIAL, 5)
        assert (len(busy.asked), len(idle.asked)) == (2, 3)
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_that_a_right_is_lost_is_told_to_all_others() -> None:
    made = await workers(3)
    heard: list[list[Lost]] = [[], [], []]
    for one, told in zip(made, heard, strict=True):
        one.fleet.on_lost = told.append
    lost = [Lost("prod", f"user {n}", f"https://issuer#{n}", n + 1, "the policy") for n in range(50)]
    for each in lost:
        made[0].fleet.tell_lost(each)
    await until(lambda: len(heard[1]) == len(heard[2]) == len(lost))
    assert heard == [[], lost, lost]
    for one in made:
        await one.close()


async def test_all_know_the_agents_of_all() -> None:
    made = await workers(3)
    for index, one in enumerate(made):
        await one.fleet.register(Link(instance=f"i{index}"))
    for one in made:
        await until(lambda one=one: len(Fleet.links(one.fleet)) == 3)
        assert await one.fleet.count(["prod", "none"]) == {"prod": 3}
        assert len(one.fleet.links()) == 1
    late = Worker()
    for index, one in enumerate(made):
        joined(late.siblings, one.siblings, 2, (3, index))
    assert await late.siblings.synced(3, 5)
    assert [link.instance for link in Fleet.links(late.fleet)] == ["i0", "i1", "i2"]
    for one in (*made, late):
        await one.close()


async def test_many_agents_are_told_of_at_once() -> None:
    """A worker that comes late hears of all; a worker that drains says of all that they leave, in one turn."""
    first, late = Worker(), Worker()
    links = [Link(f"c{number % 50}", f"i{number}") for number in range(6000)]
    for link in links:
        await first.fleet.register(link)
    joined(first.siblings, late.siblings)
    assert await late.siblings.synced(1, 30)
    assert len(Fleet.links(late.fleet)) == 6000
    for link in links:
        await first.fleet.unregister(link)
    await until(lambda: not Fleet.links(late.fleet))
    assert late.fleet._remote == {}
    assert len(first.siblings) == 1, "the channel stands"
    await first.close()
    await late.close()


async def test_the_newer_of_one_instance_stays_wherever_it_is() -> None:
    """docs/threats.md#E10 between workers; the older one's own end removes nothing of the newer."""
    first, second = await workers(2)
    older, newer = Link(), Link()
    await first.fleet.register(older)
    await until(lambda: second.fleet._remote)
    await second.fleet.register(newer)
    await until(lambda: older.was_replaced)
    await first.fleet.unregister(older)
    assert (await first.fleet.dial("prod", DIAL, 5)).token == "t"
    assert (await second.fleet.dial("prod", DIAL, 5)).token == "t"
    assert (len(older.asked), len(newer.asked), newer.was_replaced) == (0, 2, False)
    await first.close()
    await second.close()


async def test_two_that_come_at_once_leave_one() -> None:
    first, second = await workers(2)
    one, other = Link(), Link()
    await first.fleet.register(one)
    await second.fleet.register(other)
    await until(lambda: one.was_replaced or other.was_replaced)
    for _ in range(20):
        await asyncio.sleep(0)
    assert (one.was_replaced, other.was_replaced) == (True, False)
    await first.close()
    await second.close()


async def test_a_worker_that_dies_takes_its_agents_and_its_dials_along() -> None:
    first, second = await workers(2)
    silent, here = Link(instance="silent", answer=None), Link("other", "x")
    await second.fleet.register(silent)
    await first.fleet.register(here)
    await until(lambda: first.fleet._remote)
    dialling = asyncio.ensure_future(first.fleet.dial("prod", DIAL, 60))
    await until(lambda: silent.asked)
    second.siblings.close()
    assert (await refused(asyncio.wait_for(dialling, 10))).code == JoinCode.NO_AGENT
    assert await first.fleet.count(["prod"]) == {}
    assert first.fleet._remote == {}
    # The worker that asked is forgotten, so that no agent works for a dial that was given up.
    await until(lambda: not silent.pending)
    await first.close()
    await second.close()


async def test_each_worker_knows_the_shortest_way_to_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    made = await workers(3)
    links = [Link(instance=f"i{index}") for index in range(3)]
    links[0].report = AgentReport(round_trip=0.5)
    for one, link in zip(made, links, strict=True):
        await one.fleet.register(link)

    async def all_say(seconds: float) -> None:
        for one in made:
            await until(lambda one=one: one.fleet.round_trip("prod") == seconds)

    await all_say(0.5)
    for index, seconds, shortest in ((1, 0.2, 0.2), (2, 0.3, 0.2), (1, 0.4, 0.3)):
        links[index].report = AgentReport(round_trip=seconds)
        made[index].fleet.reported(links[index])
        await all_say(shortest)
    told: list[Head] = []
    for sibling in made[2].fleet._siblings:
        monkeypatch.setattr(sibling, "tell", lambda head, body=b"": told.append(head))
    links[2].report = AgentReport(round_trip=0.31)
    made[2].fleet.reported(links[2])
    assert told == [], "a little more or less is no news"
    await made[2].fleet.unregister(links[2])
    assert made[2].fleet._trips == {}
    made[2].fleet.reported(links[2])
    assert [one["t"] for one in told] == ["unlink"] * 2
    for one in made:
        await one.close()


async def test_an_agent_that_drains_is_not_asked_by_another_worker() -> None:
    """Two attempts are made: with two agents that drain both would go to these, and the third would not be asked."""
    clients, agents = await workers(2)
    links = [Link(instance=f"i{number}") for number in range(3)]
    for link in links:
        await agents.fleet.register(link)
    await until(lambda: len(clients.fleet._remote) == 3)
    for link in links[:2]:
        link.draining = True
        agents.fleet.reported(link)
    await until(lambda: sum(one.draining for one in clients.fleet._remote.values()) == 2)
    for _ in range(6):
        assert (await clients.fleet.dial("prod", DIAL, 5)).instance == "i2"
    late = Worker()
    joined(late.siblings, agents.siblings, 2, (2, 1))
    assert await late.siblings.synced(1, 5)
    assert [one.draining for one in late.fleet._remote.values()] == [True, True, False]
    for one in (clients, agents, late):
        await one.close()

"""What every fleet engine must do. An engine's test module subclasses `FleetConformance` and gives it a fleet."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from arcbridge.errors import JoinRefused
from arcbridge.net.join import JoinCode
from arcbridge.relay.fleet.base import AgentReport, Fleet
from arcbridge.wire.records import Dial, Status
from tests.relay.station import refused
from tests.support.eventually import until

DIAL = Dial(token="t", cluster="prod", address="relay:443", join_id="0" * 16, deadline=10)


class Link:
    """An agent's control connection that does what `answer` says: a code (0 is consent), or None for silence."""

    def __init__(self, cluster: str = "prod", instance: str = "i1", answer: int | None = 0) -> None:
        self.cluster = cluster
        self.instance = instance
        self.answer = answer
        self.draining = False
        self.pending = 0
        self.asked: list[Dial] = []
        self.was_replaced = False
        self.version = "1"
        self.since = time.time()
        self.report = AgentReport()

    async def dial(self, dial: Dial) -> Status:
        self.asked.append(dial)
        self.pending += 1
        try:
            if self.answer is None:
                await asyncio.Event().wait()
            if self.answer:
                raise JoinRefused(JoinCode.AGENT_REFUSED, "no")
            return Status(token=dial.token, instance=self.instance)
        finally:
            self.pending -= 1

    def replaced(self) -> None:
        self.was_replaced = True


class FleetConformance:
    @abstractmethod
    async def make(self) -> Fleet:
        """A started, empty fleet."""

    @pytest.fixture
    async def fleet(self) -> AsyncIterator[Fleet]:
        made = await self.make()
        yield made
        await made.close()

    async def test_a_cluster_without_agents_is_known_at_once(self, fleet: Fleet) -> None:
        await fleet.register(Link("other"))
        assert (await refused(asyncio.wait_for(fleet.dial("prod", DIAL, 60), 10))).code == JoinCode.NO_AGENT

    async def test_consent_names_the_token(self, fleet: Fleet) -> None:
        link = Link()
        await fleet.register(link)
        assert (await fleet.dial("prod", DIAL, 5)).token == "t"
        assert link.asked == [DIAL]

    async def test_the_wanted_instance_alone(self, fleet: Fleet) -> None:
        links = [Link(instance=f"i{n}") for n in range(5)]
        for link in links:
            await fleet.register(link)
        for _ in range(4):
            await fleet.dial("prod", Dial(token="t", instance="i3"), 5)
        assert len(links[3].asked) == 4
        error = await refused(asyncio.wait_for(fleet.dial("prod", Dial(token="t", instance="not there"), 60), 10))
        assert error.code == JoinCode.NO_INSTANCE
        links[3].answer = 1
        assert (await refused(fleet.dial("prod", Dial(token="t", instance="i3"), 5))).code == JoinCode.AGENT_REFUSED
        assert not any(link.asked for link in links if link is not links[3]), "no other agent was asked"

    async def test_in_turn(self, fleet: Fleet) -> None:
        links = [Link(instance=f"i{n}") for n in range(3)]
        for link in links:
            await fleet.register(link)
        for _ in range(9):
            await fleet.dial("prod", DIAL, 5)
        assert [len(link.asked) for link in links] == [3, 3, 3]

    async def test_the_one_with_fewest_waiting(self, fleet: Fleet) -> None:
        busy, idle = Link(instance="busy"), Link(instance="idle")
        busy.pending = 2
        await fleet.register(busy)
        await fleet.register(idle)
        for _ in range(3):
            await fleet.dial("prod", DIAL, 5)
        assert (len(busy.asked), len(idle.asked)) == (0, 3)

    @pytest.mark.parametrize("answer", [1, None])
    async def test_exactly_one_other_is_tried(self, fleet: Fleet, answer: int | None) -> None:
        bad = [Link(instance=f"bad{n}", answer=answer) for n in range(2)]
        good = Link(instance="good")
        await fleet.register(bad[0])
        await fleet.register(good)
        # Who refuses is waited for no longer than the refusal takes.
        status = await fleet.dial("prod", DIAL, 10 if answer else 1.5)
        assert status.instance == "good"
        await fleet.unregister(good)
        await fleet.register(bad[1])
        await fleet.register(Link(instance="third", answer=answer))
        error = await refused(fleet.dial("prod", DIAL, 10 if answer else 0.2))
        assert error.code == (JoinCode.AGENT_REFUSED if answer else JoinCode.AGENT_TIMEOUT)

    async def test_both_attempts_share_the_time(self, fleet: Fleet) -> None:
        await fleet.register(Link(instance="i1", answer=None))
        await fleet.register(Link(instance="i2", answer=None))
        loop = asyncio.get_running_loop()
        start = loop.time()
        await refused(fleet.dial("prod", DIAL, 1.0))
        assert 0.99 <= loop.time() - start < 1.9, "one after the other with all the time each would take two seconds"

    async def test_the_newer_of_one_instance_stays(self, fleet: Fleet) -> None:
        older, newer, foreign = Link(), Link(), Link("other")
        for link in (older, foreign, newer):
            await fleet.register(link)
        assert (older.was_replaced, newer.was_replaced, foreign.was_replaced) == (True, False, False)
        await fleet.unregister(older)
        await fleet.dial("prod", DIAL, 5)
        assert (len(older.asked), len(newer.asked)) == (0, 1)

    async def test_who_drains_or_is_gone_gets_nothing(self, fleet: Fleet) -> None:
        draining, gone = Link(instance="d"), Link(instance="g")
        await fleet.register(draining)
        await fleet.register(gone)
        draining.draining = True
        await fleet.unregister(gone)
        await fleet.unregister(gone)
        assert (await refused(fleet.dial("prod", DIAL, 5))).code == JoinCode.NO_AGENT

    async def test_one_that_drains_is_asked_for_what_its_instance_holds_alone(self, fleet: Fleet) -> None:
        draining, wanted = Link(instance="d"), replace(DIAL, instance="d")
        draining.draining = True
        await fleet.register(draining)
        assert (await refused(fleet.dial("prod", DIAL, 5))).code == JoinCode.NO_AGENT
        assert draining.asked == []
        assert (await fleet.dial("prod", wanted, 5)).token == "t"
        assert draining.asked == [wanted]

    async def test_who_is_there(self, fleet: Fleet) -> None:
        for link in (Link(instance="a"), Link(instance="b"), Link("other", "c")):
            await fleet.register(link)
        counted = await fleet.count(["prod", "other", "none"])
        assert {name: count for name, count in counted.items() if count} == {"prod": 2, "other": 1}
        assert len(fleet.links()) == 3

    async def test_cancelled_dials_leave_nothing(self, fleet: Fleet) -> None:
        link = Link(answer=None)
        await fleet.register(link)
        dials = [asyncio.create_task(fleet.dial("prod", DIAL, 60)) for _ in range(50)]
        await until(lambda: link.pending == 50)
        for dial in dials:
            dial.cancel()
        await asyncio.gather(*dials, return_exceptions=True)
        # Where the agent is at another relay or worker, that one is told of it, which takes a moment.
        await until(lambda: link.pending == 0)

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from arcbridge.errors import JoinRefused
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.join import JoinCode
from arcbridge.net.tls import ALPN_CONTROL
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import Dial, Goaway, Status
from arcbridge.wire.session import Kind, Side
from tests.net.ends import RELAY, client_context
from tests.relay.station import Agent, Station, refuse, station, swallow


async def connected(relay: Station, agents: int) -> None:
    async with asyncio.timeout(5):
        while len(relay.control) != agents:
            await asyncio.sleep(0.005)


async def test_an_agent_is_registered_and_noted(tmp_path: Path) -> None:
    async with station(tmp_path, "prod") as relay:
        async with Agent(relay, instance="pod-7") as agent:
            await agent.registered()
            assert relay.admission.waiting == 0
            (info,) = await relay.fleet.agents("prod")
            assert (info.instance, info.version) == ("pod-7", "test 1")
            async with asyncio.timeout(5):
                while not (record := await relay.registry.cluster("prod")) or not record.last_seen:
                    await asyncio.sleep(0.005)
            assert record.version == "test 1"
        await connected(relay, 0)
        assert await relay.fleet.agents("prod") == []


class Told(BaseHandler):
    def __init__(self) -> None:
        self.goaway: Goaway | None = None

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        self.goaway = goaway


async def sent_away(relay: Station, cluster: str, instance: str = "i1") -> int | None:
    """The GOAWAY code with which such an agent's connection ends; None: without a word."""
    told = Told()
    session = MuxSession(Side.INITIATOR, Kind.CONTROL, told, agent=instance)
    sock = await relay.dial()
    loop = asyncio.get_running_loop()
    await loop.create_connection(
        session.protocol, sock=sock, ssl=client_context(ALPN_CONTROL, cluster), server_hostname=RELAY
    )
    error = await asyncio.wait_for(session.wait_ended(), 5)
    return told.goaway.code if told.goaway is not None else getattr(error, "code", None)


@pytest.mark.parametrize("revoked", [True, False])
async def test_revoked_or_unknown_clusters_are_told(tmp_path: Path, revoked: bool) -> None:
    async with station(tmp_path, *(["prod"] if revoked else [])) as relay:
        if revoked:
            await relay.registry.revoke_cluster("prod")
        assert await sent_away(relay, "prod") == GoawayCode.REVOKED
        assert relay.counters.agents_refused == 1
        assert len(relay.control) == 0


@pytest.mark.parametrize("instance", ["", "x" * 129, "new\nline", "ünïcode"])
async def test_an_instance_id_is_printable_and_short(tmp_path: Path, instance: str) -> None:
    async with station(tmp_path, "prod") as relay:
        assert await sent_away(relay, "prod", instance) == GoawayCode.PROTOCOL
        assert relay.fleet.links() == []


async def test_without_a_certificate_there_is_no_control_connection(tmp_path: Path) -> None:
    async with station(tmp_path, "prod") as relay:
        assert await sent_away(relay, "") is None
        async with asyncio.timeout(5):
            while not relay.counters.rejected["handshake"]:
                await asyncio.sleep(0.005)
        assert relay.admission.waiting == 0


async def test_the_newer_of_one_instance_replaces_the_older(tmp_path: Path) -> None:
    """E10."""
    async with station(tmp_path, "prod") as relay, Agent(relay) as older:
        await older.registered()
        async with Agent(relay) as newer:
            await asyncio.wait_for(older.session.wait_ended(), 5)
            assert older.goaway is not None
            assert older.goaway.code == GoawayCode.REPLACED
            await connected(relay, 1)
            near, _ = await relay.join()
            near.close()
            assert (len(older.dials), len(newer.dials)) == (0, 1)
            assert relay.counters.agents_replaced == 1


async def test_a_revoked_cluster_is_cut_and_others_stay(tmp_path: Path) -> None:
    async with station(tmp_path, "prod", "other") as relay, Agent(relay) as agent, Agent(relay, "other", "o") as other:
        await agent.registered()
        await other.registered()
        relay.control.revoke(frozenset({"prod"}))
        await asyncio.wait_for(agent.session.wait_ended(), 5)
        assert agent.goaway is not None
        assert agent.goaway.code == GoawayCode.REVOKED
        await connected(relay, 1)
        assert not other.session.closed


async def test_draining_says_goodbye_with_a_schedule(tmp_path: Path) -> None:
    async with station(tmp_path, "prod") as relay, Agent(relay) as agent:
        await agent.registered()
        await relay.control.drain("this relay is going away")
        assert relay.fleet.links() == []
        async with asyncio.timeout(5):
            while agent.goaway is None:
                await asyncio.sleep(0.005)
        assert agent.goaway.code == GoawayCode.DRAINING
        assert agent.goaway.retry_after == 1
        # It may open its next connection before it leaves this one, but it is not dialled any more.
        assert not agent.session.closed
        with pytest.raises(JoinRefused) as caught:
            await relay.fleet.dial("prod", Dial(token="t"), 1)
        assert caught.value.code == JoinCode.NO_AGENT
        assert await sent_away(relay, "prod", "late") == GoawayCode.DRAINING
        relay.control.close()
        await asyncio.wait_for(agent.session.wait_ended(), 5)
        await connected(relay, 0)


async def test_statuses_late_twice_and_of_others_change_nothing(tmp_path: Path) -> None:
    async def odd(agent: Agent, dial: Dial) -> None:
        agent.session.send_status(Status(token="never sent", code=1))
        agent.session.send_status(Status(ready=False, instance="i1"))
        agent.session.send_status(Status(token=dial.token))
        agent.session.send_status(Status(token=dial.token, code=1))

    async with station(tmp_path, "prod") as relay, Agent(relay, on_dial=odd) as agent:
        await agent.registered()
        (link,) = relay.fleet.links()
        status = await asyncio.wait_for(link.dial(Dial(token="t1")), 5)
        assert status.code == 0
        assert (await asyncio.wait_for(link.dial(Dial(token="t2")), 5)).token == "t2"
        assert link.pending == 0


async def test_a_refusal_carries_the_agents_words_cleaned(tmp_path: Path) -> None:
    async with station(tmp_path, "prod") as relay, Agent(relay, on_dial=refuse) as agent:
        await agent.registered()
        (link,) = relay.fleet.links()
        with pytest.raises(JoinRefused, match="I am full") as caught:
            await link.dial(Dial(token="t"))
        assert caught.value.code == JoinCode.AGENT_REFUSED


async def test_dials_in_flight_end_with_the_connection_and_are_bounded(tmp_path: Path) -> None:
    async with station(tmp_path, "prod") as relay, Agent(relay, on_dial=swallow) as agent:
        await agent.registered()
        (link,) = relay.fleet.links()
        dials = [asyncio.create_task(link.dial(Dial(token=f"t{n}"))) for n in range(64)]
        while len(agent.dials) < 64:
            await asyncio.sleep(0.005)
        with pytest.raises(JoinRefused) as caught:
            await link.dial(Dial(token="one more"))
        assert caught.value.code == JoinCode.OVERLOADED
        agent.session.abort()
        results = await asyncio.wait_for(asyncio.gather(*dials, return_exceptions=True), 5)
        assert {result.code for result in results if isinstance(result, JoinRefused)} == {JoinCode.NO_AGENT}
        assert len(results) == 64

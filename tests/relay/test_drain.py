"""The drain step by step, in this process: who leaves, who is cut and when, who is told what."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from arcbridge.errors import ArcbridgeError
from arcbridge.net.join import JoinCode, client_join
from arcbridge.net.sockets import reset
from arcbridge.relay import drain as module
from arcbridge.relay.drain import Drain, Step
from arcbridge.relay.fleet.base import AgentLink
from arcbridge.relay.membership import Membership
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import JoinReply, JoinRequest
from tests.net.ends import RELAY, client_context
from tests.relay.station import Agent, Station, is_cut, refused, swallow
from tests.support.eventually import until


class Draining:
    """A drain that runs, and what it has done so far."""

    def __init__(self, relay: Station, draws: list[float] | None = None, membership: Membership | None = None) -> None:
        draws = [*(draws or [])]
        self.drain = Drain(
            relay.listener,
            relay.control,
            relay.clients,
            relay.pumps,
            relay.counters,
            membership or Membership(),
            draw=lambda: draws.pop(0) if draws else 0.5,
        )
        self.hurry = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(self.drain.run(self.hurry))

    async def reaches(self, step: Step) -> None:
        await until(lambda: self.drain.step is step)

    async def over(self) -> None:
        await asyncio.wait_for(self.task, 20)


@contextlib.asynccontextmanager
async def sessions(relay: Station, agent: Agent, count: int) -> AsyncIterator[list[socket.socket]]:
    """The clients' ends of that many joined sessions."""
    near = [(await relay.join())[0] for _ in range(count)]
    try:
        yield near
    finally:
        for sock in near:
            sock.close()


async def dialled(relay: Station, agent: Agent) -> asyncio.Task[tuple[socket.socket, JoinReply]]:
    """A client's join whose agent has been asked to come."""
    joining = asyncio.create_task(relay.join())
    await until(lambda: agent.dials)
    return joining


async def test_some_leave_and_the_rest_is_cut_one_by_one(monkeypatch: pytest.MonkeyPatch, relay: Station) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    monkeypatch.setattr(module, "SPREAD", 3600.0)
    async with Agent(relay) as agent:
        async with sessions(relay, agent, 4) as near:
            # Two are cut in the first moments of the hour, the last one in its middle.
            draining = Draining(relay, [1e-6, 2e-6, 0.5])
            reset(near[0])
            await draining.reaches(Step.CUTTING)
            assert len(relay.pumps) == 3
            await until(lambda: len(relay.pumps) <= 1)
            assert relay.counters.pumps_cut == 2
            assert [str(pump.error) for pump in relay.ended[1:]] == ["cut by the drain"] * 2
            assert not draining.task.done()
            # The last one leaves by itself: nothing keeps the relay any more.
            for sock in near[1:]:
                reset(sock)
            await draining.over()
            assert relay.counters.pumps_cut == 2
        assert len(relay.control) == 0


async def test_what_is_left_at_the_end_is_reset(monkeypatch: pytest.MonkeyPatch, relay: Station) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    monkeypatch.setattr(module, "SPREAD", 0.05)
    async with Agent(relay) as agent, sessions(relay, agent, 3) as near:
        await Draining(relay, [1.0, 1.0, 1.0]).over()
        assert relay.counters.pumps_cut == 3
        await is_cut(*near, *agent.sockets)


async def test_a_second_signal_cuts_everything(monkeypatch: pytest.MonkeyPatch, relay: Station) -> None:
    monkeypatch.setattr(module, "PATIENCE", 3600.0)
    async with Agent(relay) as agent, sessions(relay, agent, 2) as near:
        draining = Draining(relay)
        await draining.reaches(Step.DRAINING)
        draining.hurry.set()
        await draining.over()
        await is_cut(*near)
        await asyncio.wait_for(agent.session.wait_ended(), 5)


async def test_without_sessions_it_goes_through_and_says_goodbye(relay: Station) -> None:
    async with Agent(relay) as agent:
        draining = Draining(relay)
        assert draining.drain.unready() is None
        await draining.over()
        assert draining.drain.unready() == "this relay is going away"
        left = await agent.left()
        assert (left.code, left.retry_after) == (GoawayCode.DRAINING, 1)
        with pytest.raises(ArcbridgeError):
            await relay.dial()


async def test_clients_and_agents_are_told_while_it_lasts(monkeypatch: pytest.MonkeyPatch, relay: Station) -> None:
    """The port stays open: a client and an agent that come now hear why and when to come back."""
    monkeypatch.setattr(module, "PATIENCE", 3600.0)
    async with Agent(relay) as agent, sessions(relay, agent, 1) as near:
        draining = Draining(relay)
        await draining.reaches(Step.DRAINING)
        error = await refused(relay.join())
        assert (error.code, error.retry_after) == (JoinCode.DRAINING, 1)
        async with Agent(relay, instance="late") as late:
            left = await late.left()
            assert (left.code, left.retry_after) == (GoawayCode.DRAINING, 1)
        reset(near[0])
        await draining.over()


async def test_a_join_whose_agent_does_not_come_is_refused(monkeypatch: pytest.MonkeyPatch, relay: Station) -> None:
    """docs/threats.md#J21: within a second, in words, so that the client goes elsewhere."""
    monkeypatch.setattr(module, "JOINING", 0.1)
    async with Agent(relay, on_dial=swallow) as agent:
        joining = await dialled(relay, agent)
        draining = Draining(relay)
        error = await refused(asyncio.wait_for(joining, 5))
        assert (error.code, error.retry_after) == (JoinCode.DRAINING, 1)
        await draining.over()
        assert relay.clients.joining == 0


async def test_a_join_under_way_completes(monkeypatch: pytest.MonkeyPatch, relay: Station) -> None:
    monkeypatch.setattr(module, "PATIENCE", 3600.0)
    monkeypatch.setattr(module, "JOINING", 3600.0)
    async with Agent(relay, on_dial=swallow) as agent:
        joining = await dialled(relay, agent)
        draining = Draining(relay)
        await draining.reaches(Step.DRAINING)
        await agent.join(agent.dials[0].token)
        near, _ = await asyncio.wait_for(joining, 5)
        with near:
            await until(lambda: len(relay.pumps) == 1)
            draining.hurry.set()
            await draining.over()


async def test_other_relays_stop_dialling_before_the_agents_hear(relay: Station) -> None:
    """The fleet is told first; an engine that hangs does not hold the drain up."""
    told: list[str] = []

    async with Agent(relay) as agent:

        async def unregister(link: AgentLink) -> None:
            told.append("GOAWAY first" if agent.goaway is not None else link.instance)
            await asyncio.Event().wait()

        original = relay.fleet.unregister
        relay.fleet.unregister = unregister
        draining = Draining(relay)
        await until(lambda: agent.goaway is not None)
        relay.fleet.unregister = original
        assert told == ["i1"]
        await draining.over()


async def test_one_of_several_keeps_the_port_until_all_are_ready(
    monkeypatch: pytest.MonkeyPatch, relay: Station
) -> None:
    """A relay process that drains refuses new peers in words, also those that the kernel had queued."""
    monkeypatch.setattr(module, "_LAST", 10.0)
    all_ready = asyncio.Event()

    class Together(Membership):
        shares_port = True

        async def wait_to_close(self, hurry: asyncio.Event) -> None:
            asked.set()
            await all_ready.wait()

    asked = asyncio.Event()
    draining = Draining(relay, membership=Together())
    await asyncio.wait_for(asked.wait(), 5)
    assert (await refused(relay.join())).code == JoinCode.DRAINING
    assert draining.drain.step is Step.LEAVING
    queued = socket.create_connection((relay.address.host, relay.address.port))
    queued.setblocking(False)
    all_ready.set()
    request = JoinRequest(role="client", cluster="prod", token="alice")
    assert (await refused(client_join(queued, client_context(), RELAY, request))).code == JoinCode.DRAINING
    await draining.over()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((relay.address.host, relay.address.port))

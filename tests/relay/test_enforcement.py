"""Sessions and joins that lost their right are ended, and no other: over real sockets, with a real rendezvous."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from arcbridge.net.join import JoinCode
from arcbridge.net.sockets import receive, send_all
from arcbridge.relay import enforcement
from arcbridge.relay.enforcement import SLICE, Enforcement
from arcbridge.relay.fleet.base import Lost
from arcbridge.relay.registry.base import UserRevocation
from arcbridge.wire.records import Dial, Status
from tests.net.ends import tcp_pair
from tests.relay.station import Agent, Station, is_cut, refused, station, swallow
from tests.support.eventually import until


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enforcement, "GRACE", 0.0)


class Enforced:
    """A relay with an agent for each of two clusters, and what enforces there."""

    def __init__(self, relay: Station, agents: dict[str, Agent]) -> None:
        self.relay = relay
        self.agents = agents
        self.told: list[Lost] = []
        self.enforcement = Enforcement(relay.access, relay.pumps, relay.clients, relay.counters, self.told.append)
        relay.on_pump_ended = self.enforcement.ended

    async def session(self, user: str, cluster: str = "prod") -> tuple[socket.socket, socket.socket]:
        """Return both ends of a session that carries bytes."""
        agent = self.agents[cluster]
        before = len(agent.sockets)
        near, _ = await self.relay.join(user, cluster)
        await until(lambda: len(agent.sockets) != before)
        far = agent.sockets[-1]
        await carries(near, far)
        return near, far

    def revoke(self, user: str, before: float | None = None) -> None:
        at = int(time.time() + 1 if before is None else before)
        self.relay.access.learn_users({**(self.relay.access.users or {}), user: UserRevocation(user, at, "gone")})


@pytest.fixture
async def at(tmp_path: Path) -> AsyncIterator[Enforced]:
    async with (
        station(tmp_path, "prod", "other") as relay,
        Agent(relay, "prod", "i1") as one,
        Agent(relay, "other", "i2") as two,
    ):
        yield Enforced(relay, {"prod": one, "other": two})


async def carries(near: socket.socket, far: socket.socket) -> None:
    await send_all(near, b"ping")
    assert await asyncio.wait_for(receive(far, 4), 5) == b"ping"


async def test_who_is_out_of_the_policy_is_cut_at_both_ends_and_refused(at: Enforced) -> None:
    alice, bob, elsewhere = await at.session("alice"), await at.session("bob"), await at.session("alice", "other")
    await at.enforcement.enforce()
    at.relay.policy.allowed.discard(("alice", "prod"))
    await at.enforcement.enforce()
    await is_cut(*alice)
    assert (await refused(at.relay.join("alice", instance="i1"))).code == JoinCode.FORBIDDEN
    for near, far in (bob, elsewhere):
        await carries(near, far)
        near.close()
    assert at.relay.counters.sessions_cut == {"policy": 1, "user": 0, "cluster": 0}


async def test_a_revoked_login_is_cut_in_every_cluster_and_a_newer_one_is_not(at: Enforced) -> None:
    ends = [*await at.session("alice"), *await at.session("alice", "other")]
    bob = await at.session("bob")
    at.revoke("alice")
    await at.enforcement.enforce()
    await is_cut(*ends)
    await carries(*bob)
    assert (await refused(at.relay.join("alice"), r"revoked \(gone\): log in again")).code == JoinCode.FORBIDDEN
    # The user logs in again: a token from after the revocation.
    at.revoke("alice", before=time.time() - 15)
    (await at.session("alice"))[0].close()
    bob[0].close()
    assert at.relay.counters.sessions_cut == {"policy": 0, "user": 2, "cluster": 0}


async def test_a_revoked_cluster_is_cut_and_so_is_a_session_whose_user_another_relay_knows(at: Enforced) -> None:
    ends = [*await at.session("alice"), *await at.session("bob")]
    other = await at.session("alice", "other")
    client, relay_client = await tcp_pair()
    agent, relay_agent = await tcp_pair()
    at.relay.pumps.join(relay_client, relay_agent, cluster="prod")
    at.relay.access.clusters = frozenset({"prod"})
    with structlog.testing.capture_logs() as lines:
        await at.enforcement.enforce()
    await is_cut(*ends, client, agent)
    await carries(*other)
    other[0].close()
    assert at.relay.counters.sessions_cut["cluster"] == 3
    assert [line for line in lines if line["event"] == "sessions cut off"] == [
        {"event": "sessions cut off", "cluster": "prod", "sessions": 3, "reason": "the cluster is revoked",
         "log_level": "warning"}
    ]  # fmt: skip


async def test_a_client_that_waits_for_its_agent_is_refused_at_once(at: Enforced) -> None:
    at.agents["prod"].on_dial = swallow
    joining = asyncio.create_task(at.relay.join("alice"))
    await until(lambda: at.relay.clients.pending)
    at.revoke("alice")
    await at.enforcement.enforce()
    assert (await refused(asyncio.wait_for(joining, 5), "log in again")).code == JoinCode.FORBIDDEN
    assert not at.relay.clients.pending


async def test_a_right_that_is_lost_while_the_agent_comes_lets_no_byte_pass(at: Enforced) -> None:
    """Between the policy's answer at the beginning of a join and its end nothing looks at it but the join itself."""

    async def lose_right(agent: Agent, dial: Dial) -> None:
        agent.relay.policy.allowed.discard(("alice", "prod"))
        agent.session.send(Status(token=dial.token))
        with contextlib.suppress(Exception):
            await agent.join(dial.token)

    at.agents["prod"].on_dial = lose_right
    assert (await refused(at.relay.join("alice"))).code == JoinCode.FORBIDDEN
    assert not len(at.relay.pumps)
    assert at.relay.counters.joins["forbidden"] == 1


async def test_agents_are_told_whose_sessions_to_end_also_those_that_wait_for_a_connection(at: Enforced) -> None:
    """A user who has just lost his connection has no pump, and a shell that runs on at the agent."""
    near, far = await at.session("alice")
    near.close()
    await asyncio.wait_for(receive(far, 10), 5)
    far.close()
    running = await at.session("alice", "other")
    bob = await at.session("bob")
    await until(lambda: len(at.relay.pumps) <= 2)
    now = time.time()
    at.relay.policy.allowed.discard(("alice", "prod"))
    await at.enforcement.enforce()
    (told,) = at.told
    assert (told.cluster, told.username, told.subject) == ("prod", "alice", "https://issuer.test#alice")
    assert told.before > now + 60
    assert told.reason == "the relay's policy does not let you reach this cluster any more"
    at.told.clear()
    # Once: another change does not end what the user may have begun meanwhile.
    at.relay.policy.allowed.discard(("alice", "unknown"))
    await at.enforcement.enforce()
    assert at.told == []
    at.revoke("alice", before=now + 1)
    await at.enforcement.enforce()
    (told,) = at.told
    assert (told.cluster, told.before, told.reason) == ("other", int(now + 1), "gone")
    await is_cut(*running)
    at.told.clear()
    at.revoke("mallory")
    await at.enforcement.enforce()
    assert at.told == []
    await carries(*bob)
    bob[0].close()


async def test_a_change_that_takes_the_right_of_very_many_floods_no_agent(
    monkeypatch: pytest.MonkeyPatch, at: Enforced
) -> None:
    monkeypatch.setattr(enforcement, "MOST_TOLD", 1)
    ends = [*await at.session("alice"), *await at.session("bob")]
    at.relay.policy.allowed.clear()
    with structlog.testing.capture_logs() as lines:
        await at.enforcement.enforce()
    assert len(at.told) == 1
    assert [line["users"] for line in lines if line["event"].startswith("agents not told")] == [2]
    await is_cut(*ends)


async def test_a_session_that_ended_long_ago_is_forgotten(monkeypatch: pytest.MonkeyPatch, at: Enforced) -> None:
    monkeypatch.setattr(enforcement, "REMEMBERED", 0.0)
    near, far = await at.session("alice")
    near.close()
    far.close()
    await until(lambda: not len(at.relay.pumps))
    await asyncio.sleep(0.001)
    at.revoke("alice")
    await at.enforcement.enforce()
    assert at.told == []


async def test_of_sessions_that_ended_a_bounded_number_is_remembered(
    monkeypatch: pytest.MonkeyPatch, at: Enforced
) -> None:
    monkeypatch.setattr(enforcement, "MOST_REMEMBERED", 1)
    for user in ("alice", "bob"):
        near, far = await at.session(user)
        near.close()
        far.close()
        await until(lambda: not len(at.relay.pumps))
    at.revoke("alice")
    at.revoke("bob")
    await at.enforcement.enforce()
    assert [one.username for one in at.told] == ["bob"]


async def test_sessions_are_looked_at_once_for_each_change_and_in_slices(
    monkeypatch: pytest.MonkeyPatch, at: Enforced
) -> None:
    asked: list[Any] = []
    near, far = await at.session("bob")
    (pump,) = at.relay.pumps
    monkeypatch.setattr(at.relay.access, "loss", lambda identity, cluster: asked.append(identity))
    for _ in range(3):
        await at.enforcement.enforce()
    assert asked == [pump.identity]
    at.relay.policy.allowed.discard(("alice", "prod"))
    # As many as make three slices: another task has its turn in between.
    monkeypatch.setattr(at.enforcement, "pumps", [pump] * (2 * SLICE + 10))
    turns: list[int] = []

    async def other() -> None:
        while True:
            turns.append(len(asked))
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    asked.clear()
    await at.enforcement.enforce()
    task.cancel()
    assert len(asked) == 2 * SLICE + 10
    assert max(after - before for before, after in itertools.pairwise([0, *turns, len(asked)])) <= SLICE
    near.close()
    far.close()

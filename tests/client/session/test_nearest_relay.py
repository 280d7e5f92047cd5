"""When relays are asked how far they are, what a first start waits for, and when a session is to move."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.relay.path_lengths import PathLengths
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays
from arcbridge.client.session import nearest_relay as module
from arcbridge.client.session import relay_http
from arcbridge.client.session.connection import ClusterAccess
from arcbridge.client.session.nearest_relay import NearestRelay
from arcbridge.errors import Unreachable
from arcbridge.net.round_trips import RoundTrips
from tests.client.session.test_session_manager import login
from tests.support.clock import Clock

NEAR, FAR, DEAD = (RelayAccess(f"https://{name}:443") for name in ("near", "far", "dead"))


class Asked:
    """Stands for the request to a relay: what each answers, and which were asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trips = {NEAR: 0.010, FAR: 0.150}
        self.row: dict[str, Any] = {"agents": 1, "round_trip": 0.005}
        self.status = 200
        self.relays: list[RelayAccess] = []
        self.slow: set[RelayAccess] = set()
        monkeypatch.setattr(relay_http, "request", self)

    async def __call__(self, relay: RelayAccess, *args: Any, measured: Any) -> tuple[int, bytes]:
        self.relays.append(relay)
        if relay in self.slow:
            await asyncio.Event().wait()
        if relay not in self.trips:
            raise Unreachable("it is away")
        measured(self.trips[relay])
        return self.status, json.dumps(self.row).encode()


class World:
    def __init__(self, directory: Path, asked: Asked) -> None:
        self.asked, self.clock = asked, Clock()
        everyone = [NEAR, FAR, DEAD]
        lengths = PathLengths(everyone, RoundTrips(directory / "round-trips.json", self.clock), "prod")
        self.relays = Relays(everyone, lengths=lengths)
        self.nearest = NearestRelay(ClusterAccess(self.relays, "prod", Tokens(login(directory), None)))

    def later(self, seconds: float) -> None:
        """Let so much time pass, by both clocks."""
        self.clock.now += seconds
        for relay in self.nearest._asked_at:
            self.nearest._asked_at[relay] -= seconds


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, Asked(monkeypatch))


async def test_a_first_start_asks_and_knows(world: World) -> None:
    await world.nearest.learn()
    assert set(world.asked.relays) == {NEAR, FAR, DEAD}
    assert world.relays.order()[0] is NEAR
    assert round(world.relays.lengths.length(NEAR), 3) == 0.015
    assert world.relays.order()[-1] is DEAD
    await world.nearest.learn()
    assert len(world.asked.relays) == 3, "once in a process"


async def test_a_first_start_waits_for_no_relay_that_is_farther(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 3600.0)
    world.asked.slow = {FAR, DEAD}
    async with asyncio.timeout(30):
        await world.nearest.learn()  # until three times the way through the near one is over
    assert world.relays.order()[0] is NEAR


async def test_a_start_that_knows_asks_nobody(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.nearest.learn()
    world.relays.lengths.learn(DEAD, 0.2, 0.0)
    await world.nearest.look(NEAR, 0.0)
    again = World(tmp_path, Asked(monkeypatch))
    await again.nearest.learn()
    assert again.asked.relays == []
    assert again.relays.order()[0] is NEAR


async def test_relays_that_share_nothing(world: World) -> None:
    """One that has no agent of the cluster, or does not know it, is tried last."""
    world.asked.row = {"agents": 0, "round_trip": 0.0}
    await world.nearest.learn()
    assert world.relays.lengths.length(NEAR) == math.inf
    world.clock.now += 1
    world.relays.lengths.learn(FAR, 0.150, 0.005)
    assert world.relays.order()[0] is FAR
    world.asked.relays.clear()
    world.later(module.ASK_AGAIN)
    assert await world.nearest.look(FAR, 0.155) is None
    assert NEAR in world.asked.relays, "an agent may be back there"
    world.asked.row = {"agents": 1, "round_trip": 0.005}
    world.later(module.ASK_AGAIN)
    assert await world.nearest.look(FAR, 0.155) is NEAR


async def test_it_goes_back_when_the_near_one_is_back(world: World) -> None:
    await world.nearest.learn()
    trip = world.asked.trips.pop(NEAR)
    world.asked.relays.clear()
    world.later(module.ASK_AGAIN)
    assert await world.nearest.look(FAR, 0.155) is None
    assert NEAR in world.asked.relays
    world.asked.relays.clear()
    world.asked.trips[NEAR] = trip
    world.later(module.ASK_AGAIN - 1)
    assert await world.nearest.look(FAR, 0.155) is None
    assert world.asked.relays == [], "not asked more often"
    world.later(1)
    assert await world.nearest.look(FAR, 0.155) is NEAR


async def test_where_it_is_near_others_are_asked_once_an_hour(world: World) -> None:
    world.asked.trips[DEAD] = 0.2
    await world.nearest.learn()
    world.asked.relays.clear()
    for _ in range(50):
        world.later(module.LOOK)
        assert await world.nearest.look(NEAR, 0.015) is None
    assert world.asked.relays == []
    for _ in range(15):
        world.later(module.LOOK)
        assert await world.nearest.look(NEAR, 0.015) is None
    assert sorted(map(str, world.asked.relays)) == sorted(map(str, [FAR, DEAD]))


@pytest.mark.parametrize("row", [{}, {"agents": 1, "round_trip": "near"}, {"agents": 1, "round_trip": 1e300},
                                 {"agents": 1, "round_trip": -1}, {"agents": 1, "round_trip": None}])  # fmt: skip
async def test_j33_an_answer_that_says_nothing(world: World, row: dict[str, Any]) -> None:
    world.asked.row = row
    await world.nearest.learn()
    assert world.relays.lengths.length(NEAR) == 0.010


async def test_a_relay_that_refuses_is_not_preferred_for_it(world: World) -> None:
    world.asked.status = 429
    await world.nearest.learn()
    assert await world.nearest.look(FAR, 0.155) is None


async def test_one_relay_is_asked_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch)
    relays = Relays([NEAR], lengths=PathLengths([NEAR], RoundTrips(), "prod"))
    nearest = NearestRelay(ClusterAccess(relays, "prod", Tokens(login(tmp_path), None)))
    await nearest.learn()
    assert not nearest.asks
    assert asked.relays == []
    assert relays.lengths.length(NEAR) == math.inf

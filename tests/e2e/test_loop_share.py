"""A user has found a request that costs the agent 50 ms of its event loop; others are served all the same.

The agent is the real one but for that one defect, which is put into it before it starts.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcbridge.mux.session import MuxSession
from arcbridge.relay.data_dir import open_authority
from bench.hostile.place import OBJECT, Person, Place, get
from tests.support.reports import metrics
from tests.support.world import ALICE, CLUSTER_AUDIENCE, RELAY_AUDIENCE, ApiServer, User, World

MALLORY = User("finder", ALICE.groups)
DEAR = f"{OBJECT}/pods/dear"
AT_ONCE = 20
"""Requests that the finder has under way."""
HONEST = 20
"""Requests of the honest user, one behind the other."""
DEFECT = f'''
import sys
if "agent" in sys.orig_argv:
    import time
    from arcbridge.agent.kube import attempt
    authorize = attempt.authorize
    def dear(api, caller, facts, *words):
        ends = time.thread_time() + 0.05 * (facts.target == "{DEAR}")
        while time.thread_time() < ends:
            pass
        return authorize(api, caller, facts, *words)
    attempt.authorize = dear
'''


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An organisation of this module's own, whose agent has the defect."""
    directory = tmp_path_factory.mktemp("defect")
    (directory / "sitecustomize.py").write_text(DEFECT)
    with World(api, directory=tmp_path_factory.mktemp("loop")) as world:
        world.agent_prefixes[0] = ["env", f"PYTHONPATH={directory}"]
        yield world.start()


def place_of(world: World, *users: User) -> Place:
    people = (
        Person(user.name, world.token(user, RELAY_AUDIENCE), world.token(user, CLUSTER_AUDIENCE)) for user in users
    )
    relay_ca = open_authority(Path(world.relay_config.parent) / "data").certificate_pem
    return Place(relay_port=world.relay_port, relay_ca=relay_ca, cluster=world.cluster, people=tuple(people))


async def attack(session: MuxSession, found: Counter[str]) -> None:
    """Send the dear request again and again."""
    while True:
        found[await get(session, DEAR, 60.0)] += 1


async def under_attack(place: Place) -> tuple[list[str], Counter[str]]:
    """Return how the honest user's requests ended, and those of the finder meanwhile."""
    finder, honest = [await place.establish(person) for person in place.people]
    found: Counter[str] = Counter()
    attackers = [asyncio.ensure_future(attack(finder, found)) for _ in range(AT_ONCE)]
    try:
        async with asyncio.timeout(90):
            while not found["429"]:
                # Somebody has to wait for the loop: a finder who is alone may take all of it.
                assert await get(honest, OBJECT, 60.0) == "200"
            before = found.copy()
            return [await get(honest, OBJECT, 60.0) for _ in range(HONEST)], found - before
    finally:
        for task in attackers:
            task.cancel()
        await asyncio.gather(*attackers, return_exceptions=True)
        for session in (finder, honest):
            session.close()
            await session.wait_ended()


def test_the_finder_of_a_dear_request_is_refused_and_others_are_served(world: World) -> None:
    honest, meanwhile = asyncio.run(under_attack(place_of(world, MALLORY, ALICE)))
    assert honest == ["200"] * HONEST, "not one refusal"
    # Each dear request is a turn of the loop of its own, and the honest user has one between two of them.
    assert meanwhile.total() - meanwhile["429"] <= HONEST
    now = {name.removeprefix("arcbridge_agent_"): value for name, value in metrics(world.agent_observe).items()}
    assert now['limit_refusals_total{limit="loop_share"}'] >= 1
    assert now["loop_over_share_seconds_total"] > 0.0
    lines = [line for line in world.agent.lines() if "limit reached" in line]
    assert lines
    assert all(MALLORY.name in line and "loop_share" in line for line in lines)

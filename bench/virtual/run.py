"""One run: a world lives for its hour and suffers the outages of its seed; then its end is looked at."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import structlog

from arcbridge.pki import authority
from arcbridge.relay import control
from arcbridge.relay.registry.sqlite import SqliteRegistry
from bench.virtual import model as reference
from bench.virtual.loop import VirtualLoop, now
from bench.virtual.model import WANTED, Model, percentile
from bench.virtual.plan import Outage, Size, outages
from bench.virtual.world import ROUND_TRIPS, World

USERS_COME = 240.0
"""Seconds after which the first users come: the agents are there by then."""
SAMPLED = 5.0
"""Seconds between two counts of the relays' agents."""


def simulate(
    size: Size, seed: int, tell: Callable[[str], None] = lambda text: None, *, plan: Sequence[Outage] | None = None
) -> dict[str, Any]:
    """Run once; return the result with its `violations`. Nothing of it depends on this machine's speed.

    `tell` is given what happens, for people. `plan`: other outages than those of the seed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="arcbridge-virtual-") as directory,
        _alone(size, seed),
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
    ):
        return runner.run(_hour(size, seed, outages(size, seed) if plan is None else plan, Path(directory), tell))


@contextlib.contextmanager
def _alone(size: Size, seed: int) -> Iterator[None]:
    """Make chance that of a seed, let relays admit at once what fits the size, log nothing, and spare what costs
    much and decides nothing: looking for garbage, and reading one certificate again and again."""
    state, logs, thresholds = random.getstate(), structlog.get_config(), gc.get_threshold()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    gc.set_threshold(100_000, 50, 1000)
    random.seed(seed)
    load = functools.lru_cache(50_000)(authority._load_certificate)
    try:
        with patch.object(control, "BURST", size.burst), patch.object(authority, "_load_certificate", load):
            yield
    finally:
        random.setstate(state)
        structlog.configure(**logs)
        gc.set_threshold(*thresholds)


async def _hour(
    size: Size, seed: int, plan: Sequence[Outage], directory: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    model = Model(size, {index: index % size.regions for index in range(size.relays)})
    registry = await SqliteRegistry.open(directory)
    world = World(size, registry, model)
    for relay in world.relays:
        await relay.start()
    world.populate()
    begun = now()
    tell(f"{size.agents} agents come")
    for user in world.users:
        asyncio.get_running_loop().call_later(
            USERS_COME + random.random() * 60, functools.partial(world.tasks.start, user.live())
        )
    world.tasks.start(_sample(world, begun, tell))
    for outage in plan:
        await asyncio.sleep(begun + outage.at - now())
        tell(f"{now() - begun:.0f} s: {outage}")
        await world.suffer(outage)
    await asyncio.sleep(begun + size.seconds - now())
    result = _result(world, seed)
    result["violations"] = model.violations() + violations_at_end(world)
    for task in world.tasks:
        task.cancel()
    await asyncio.sleep(1.0)  # what they had under way ends
    await registry.close()
    return result


async def _sample(world: World, begun: float, tell: Callable[[str], None]) -> None:
    while True:
        counts = [len(relay.control) if relay.listens else 0 for relay in world.relays]
        world.model.samples.append((now(), counts))
        if len(world.model.samples) % 12 == 0:
            tell(f"{now() - begun:.0f} s: {counts}")
        await asyncio.sleep(SAMPLED)


def violations_at_end(world: World) -> list[str]:
    """Return what is wrong after a quarter of an hour in which nothing has gone wrong."""
    found: list[str] = []
    counts = dict.fromkeys(range(world.size.relays), 0)
    both_ends: set[tuple[int, str]] = {
        (relay.index, link.instance) for relay in world.relays for link in relay.fleet.links()
    }
    for agent in world.agents:
        up = [world.by_address[address] for address in agent.up]
        if len(up) != WANTED or set(agent.up) != set(agent.control.choice.preferred):
            found.append(f"agent {agent.number} has {len(up)} connections, not to the relays that it prefers")
        for relay in up:
            counts[relay.index] += 1
            if (relay.index, agent.instance) not in both_ends:
                found.append(f"agent {agent.number} is connected to relay {relay.index}, which does not know it")
            both_ends.discard((relay.index, agent.instance))
        found += _far(world, agent.region, [relay.region for relay in up])
    found += [f"relay {index} has agent {instance}, which is not connected to it" for index, instance in both_ends]
    mean = sum(counts.values()) / len(counts)
    allowed = reference.SPREAD + world.model.chance
    found += [
        f"spread: relay {index} has {n}, the mean is {mean:.0f}"
        for index, n in counts.items()
        if abs(n / mean - 1) > allowed
    ]
    return found[:20]


def _far(world: World, region: int, chosen: list[int]) -> list[str]:
    """Return what is wrong with relays that are chosen for being near, where all are up: one is far for no reason."""
    trips = ROUND_TRIPS[region]
    nearest = sorted(trips[relay.region] for relay in world.relays)[:WANTED]
    return [
        f"near: an agent of region {region} is connected to region {one}"
        for one, near in zip(sorted(chosen, key=trips.__getitem__), nearest, strict=False)
        if trips[one] > max(near * 1.2, near + 10)
    ]


def _result(world: World, seed: int) -> dict[str, Any]:
    model = world.model
    last = model.samples[-1][1]
    return {
        "agents": world.size.agents,
        "seed": seed,
        "agents_per_second": world.size.pace,
        "outages": [
            {
                "outage": f"{story.outage.kind} at {story.outage.at:.0f} s, {story.outage.seconds:.0f} s",
                "relays": len(story.outage.relays),
                "agents": len(story.back),
                "connections_of_an_agent": round(story.attempts / world.size.agents, 1),
                "back_s": {f"{part:g}": round(percentile(story.back, part / 100), 1) for part in (50, 90, 99, 100)},
                "home_s": {f"{part:g}": round(percentile(story.home, part / 100), 1) for part in (50, 90, 99, 100)},
            }
            for story in model.stories
        ],
        "handshakes": model.handshakes,
        "peak_handshakes_per_s": model.peak,
        "connections": model.attempts,
        "peak_connections_per_s": model.peak_attempts,
        "turned_away": dict(model.turned_away),
        "agents_of_relays": last,
        "spread_percent": round(100 * max(abs(n * len(last) / sum(last) - 1) for n in last), 2),
        "cut_by_drains": model.cut[0],
        "users_served": model.served,
        "users_refused": dict(model.refused),
        "without_session_s": {f"{part:g}": round(percentile(model.without, part / 100), 1) for part in (50, 99, 100)},
        "trace": model.trace,
    }

"""The facts of the page: one computation for all, the numbers of `cluster list`, and the former ones where it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import structlog

from arcbridge.errors import StateError
from arcbridge.pki.authority import Authority
from arcbridge.relay import admin
from arcbridge.relay.admin import Administered
from arcbridge.relay.operations import Question, Row
from arcbridge.relay.page.facts import EVERY, FactBook
from arcbridge.relay.registry.sqlite import SqliteRegistry
from arcbridge.settings.config import RelayConfig
from tests.support.clock import Clock

AGENT = {"agent": "a", "ready": True, "failing": "", "sessions": 1, "round_trip": 0.01, "relay_ca": ""}


class World:
    """A relay of a fleet of two, and its book."""

    def __init__(self, registry: SqliteRegistry, directory: Path, clock: Clock) -> None:
        self.clock, self.failure = clock, ""
        self.asked: list[str] = []
        self.rows: dict[str, list[Row]] = {
            # One agent is connected to both relays, as in a fleet.
            "agents": [
                {**AGENT, "cluster": "a", "relay": "r1"}, {**AGENT, "cluster": "a", "relay": "r2"},
                {**AGENT, "cluster": "b", "relay": "r2", "failing": "audit:audit"},
            ],
            "policy": [
                *({"relay": "r1", "worker": n, "hash": "h1", "held": "", "version": "2", "certificate_expires": 9.0 + n}
                  for n in (0, 1)),
                {"relay": "r2", "worker": None, "hash": "h2", "held": "h3", "certificate_expires": 1e300},
            ],
            "checks": [
                {"state": "ok", "hop": "registry", "detail": "", "worker": 0},
                *({"state": "warning", "hop": "descriptors", "detail": "few", "worker": n} for n in (0, 1)),
                {"state": "failed", "hop": "policy", "detail": "bad", "worker": 1},
            ],
        }  # fmt: skip

        async def ask(question: Question) -> list[Row]:
            self.asked.append(question["ask"])
            await asyncio.sleep(0)
            if self.failure:
                raise StateError(self.failure)
            return self.rows.get(question["ask"], [])

        async def authority() -> Authority:
            raise AssertionError("not asked for")

        config = RelayConfig(data_dir=directory)
        self.relay = Administered(config, lambda _: nullcontext(registry), authority, ask, nullcontext, clock)
        self.book = FactBook(lambda: self.relay, "", clock=clock, monotonic=clock)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    clock = Clock(1_900_000_000.0)
    registry = await SqliteRegistry.open(tmp_path, clock=clock)
    ca = Authority.create("cluster", clock=clock).certificate_pem
    for name in ("a", "b", "c"):
        token = await registry.create_join_token(name, expires_at=clock.now + 60)
        await registry.redeem_join_token(token, name * 64, ca)
    yield World(registry, tmp_path, clock)
    await registry.close()


async def test_the_sums_are_those_of_cluster_list(world: World) -> None:
    facts = await world.book.get()
    listed = {row["name"]: row for row in (await admin.list_clusters(world.relay)).rows}
    for one in facts.clusters:
        row = listed[one.name]
        assert (one.agents, one.ready, one.sessions, one.round_trip) == (
            row["agents"], row["ready"], row["sessions"], row["round_trip"]
        )  # fmt: skip
    assert [(one.name, one.judged.state, one.agents) for one in facts.clusters] == [
        ("b", "degraded", 1), ("c", "never seen", 0), ("a", "serving", 1)
    ]  # fmt: skip
    assert [tuple(one) for one in facts.relays] == [
        ("r1", 2, 1, ("h1",), "", ("2",), 9.0), ("r2", 1, 2, ("h2",), "h3", (), 0.0)
    ]  # fmt: skip
    assert [(row["hop"], row["workers"]) for row in facts.findings] == [("policy", [1]), ("descriptors", [0, 1])]
    assert (facts.of(["a", "b"])[0].name, len(facts.of(["*"])), facts.changes) == ("b", 3, None)


async def test_k13_one_computation_for_all_and_no_sooner(world: World) -> None:
    """docs/threats.md#K13."""
    assert world.asked == []
    found = await asyncio.gather(*(world.book.get() for _ in range(50)))
    assert (len({id(one) for one in found}), world.book.computed) == (1, 1)
    world.clock.now += EVERY / 2
    assert await world.book.get() is found[0]
    waiting = asyncio.create_task(world.book.after(found[0]))
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()
    world.clock.now += EVERY
    fresh = await world.book.after(found[0])
    assert (fresh.at, world.book.computed) == (world.clock.now, 2)
    # One that leaves takes nothing from the others.
    world.clock.now += 60
    first, second = (asyncio.create_task(world.book.get()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).at == world.clock.now
    await world.book.close()


async def test_what_cannot_be_read_leaves_the_former_facts(world: World) -> None:
    before = await world.book.get()
    world.failure = "the other processes do not answer"
    world.clock.now += 60
    facts = await world.book.get()
    assert (facts.clusters, facts.at) == (before.clusters, before.at)
    assert facts.failure == "the relay cannot read its own state: the other processes do not answer"


async def test_k13_a_mistake_is_computed_no_more_often(world: World) -> None:
    """docs/threats.md#K13: it is in the log, and the former facts stay."""
    before = await world.book.get()
    world.rows["checks"] = [{"state": "failed", "hop": ["not", "hashable"]}]
    world.clock.now += 60
    with structlog.testing.capture_logs() as logs:
        found = [await world.book.get() for _ in range(3)]
    assert [(one["event"], one["reason"]) for one in logs] == [("page facts not computed", "TypeError")]
    assert ({one.clusters for one in found}, world.book.computed) == ({before.clusters}, 2)
    assert found[0].failure == "the relay cannot read its own state: the relay's log has the cause"
    world.rows["checks"] = []
    world.clock.now += 60
    assert (await world.book.get()).failure == ""


@pytest.mark.parametrize("count", [10_000])
async def test_k13_ten_thousand_clusters_come_less_often(world: World, count: int) -> None:
    """docs/threats.md#K13."""
    world.rows["agents"] = []
    many = [row for row in (await admin.list_clusters(world.relay)).rows] * (count // 3)

    async def list_clusters(relay: Administered, patterns: object = ()) -> admin.ClusterList:
        return admin.ClusterList(many, "", True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admin, "list_clusters", list_clusters)
        first = await world.book.get()
        world.clock.now += EVERY + 10
        assert await world.book.get() is first
        world.clock.now += 10
        assert await world.book.get() is not first

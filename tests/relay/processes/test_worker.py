"""One worker's side of the supervisor's channel, without a process of its own."""

from __future__ import annotations

import asyncio
import json
import pickle
import random
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arcbridge.net.address import Address
from arcbridge.observe import logging as logs
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.reloads import Outcome
from arcbridge.relay.audit.log import WorkerAudit
from arcbridge.relay.membership import Service
from arcbridge.relay.operations import Operations, rows_of
from arcbridge.relay.processes.worker import Assignment, WorkerMembership, _Worker, work
from arcbridge.relay.siblings.channel import QUEUE, Channel, Received, in_parts, pair
from arcbridge.relay.siblings.group import Siblings
from arcbridge.settings.config import RelayConfig, RelayLimitsConfig, RelayUserLimitsConfig
from tests.relay.conftest import relay_config
from tests.relay.siblings.test_group import joined
from tests.support.eventually import until


class Supervisor:
    def __init__(self) -> None:
        ours, theirs = pair()
        self.said: list[Received] = []
        self.channel = Channel(ours, self.said.append, lambda: None)
        self.channel.start()
        self.stopping, self.hurry = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(work(theirs, self.stopping, self.hurry))

    def kinds(self) -> set[str]:
        return {message.head["t"] for message in self.said}

    async def hears(self, kind: str) -> Received:
        await until(lambda: kind in self.kinds())
        return next(message for message in self.said if message.head["t"] == kind)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RelayConfig:
    monkeypatch.setattr(logs, "configure", lambda *_, **__: None)
    return relay_config(tmp_path, "")


def assign(supervisor: Supervisor, config: RelayConfig) -> None:
    for part, last in in_parts(pickle.dumps(Assignment(config, 0, 1, "127.0.0.1", 0))):
        supervisor.channel.send({"t": "assign", "last": last}, part)
    supervisor.channel.send({"t": "serve", "siblings": 0})


async def test_from_the_assignment_to_the_common_end(config: RelayConfig) -> None:
    supervisor = Supervisor()
    assign(supervisor, config)
    assert (await supervisor.hears("serving")).head["relay_ca_pin"].startswith("sha256:")
    assert (await supervisor.hears("beat")).head["failures"] == {}
    supervisor.channel.send({"t": "metrics", "n": 3})
    answer = await supervisor.hears("metrics")
    assert (answer.head["n"], answer.head["last"]) == (3, True)
    assert b"arcbridge_relay_pumps_open" in answer.body
    assert b"process_cpu_seconds_total" in answer.body
    supervisor.channel.send({"t": "stop"})
    await supervisor.hears("idle")
    await asyncio.sleep(0.05)
    assert not supervisor.task.done(), "it keeps the port until all are ready"
    supervisor.channel.send({"t": "close"})
    await asyncio.wait_for(supervisor.task, 10)
    supervisor.channel.close()


@pytest.mark.parametrize(
    "end", [lambda one: one.channel.send({"t": "hurry"}), lambda one: one.channel.close()], ids=["hurry", "orphan"]
)
async def test_an_end_without_the_others(config: RelayConfig, end: Callable[[Supervisor], None]) -> None:
    supervisor = Supervisor()
    assign(supervisor, config)
    await supervisor.hears("serving")
    end(supervisor)
    await asyncio.wait_for(supervisor.task, 10)
    supervisor.channel.close()


async def test_a_supervisor_that_dies_at_once() -> None:
    supervisor = Supervisor()
    supervisor.channel.close()
    await asyncio.wait_for(supervisor.task, 10)


async def test_an_error_at_the_start_is_told_and_not_raised(config: RelayConfig) -> None:
    config.policy.write_text("nonsense")
    supervisor = Supervisor()
    assign(supervisor, config)
    told = (await supervisor.hears("failed")).head
    assert told["usage"]
    assert "policy.toml" in told["message"]
    await asyncio.wait_for(supervisor.task, 10)
    supervisor.channel.close()


async def test_sixteen_questions_about_ten_thousand_sessions_are_answered_and_the_worker_lives(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once the answers are more than the channel holds, which would be taken for a supervisor that is dead."""
    rows = [{"session": f"{number:016x}", "user": f"oidc:{'u' * 200}{number}"} for number in range(10_000)]
    assert 16 * len(json.dumps(rows)) > QUEUE
    monkeypatch.setattr(Operations, "answer", lambda operations, question: rows)
    supervisor = Supervisor()
    assign(supervisor, config)
    await supervisor.hears("serving")
    for number in range(16):
        supervisor.channel.send({"t": "ask", "n": number, "question": {"ask": "sessions"}})
    async with asyncio.timeout(60):
        while sum(1 for message in supervisor.said if message.head.get("last")) < 16:
            assert not supervisor.task.done()
            assert not supervisor.channel.closed
            await asyncio.sleep(0.01)
    for number in range(16):
        of_one = [one.body for one in supervisor.said if one.head["t"] == "answered" and one.head["n"] == number]
        assert [row for body in of_one for row in rows_of(body)] == rows
    supervisor.stopping.set()
    supervisor.hurry.set()
    await asyncio.wait_for(supervisor.task, 10)


async def test_a_defect_in_a_reload_is_told_and_ends_nothing(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*_: object) -> None:
        raise RuntimeError("a defect")

    supervisor = Supervisor()
    assign(supervisor, config)
    await supervisor.hears("serving")
    monkeypatch.setattr("arcbridge.relay.certificate.ServerCertificate.read", defect)
    for part, last in in_parts(pickle.dumps(config)):
        supervisor.channel.send({"t": "reload", "n": 7, "last": last}, part)
    assert (await supervisor.hears("reloaded")).head["error"] == "internal error (RuntimeError)"
    assert not supervisor.task.done()
    supervisor.stopping.set()
    supervisor.hurry.set()
    await asyncio.wait_for(supervisor.task, 10)


async def together(hurry: asyncio.Event) -> None: ...


def made(count: int, index: int = 0) -> WorkerMembership:
    return WorkerMembership(index, count, Address("127.0.0.1", 443), Siblings(), together)


async def test_limits_are_divided_and_never_nothing() -> None:
    limits = RelayLimitsConfig(unauthenticated=1000, unauthenticated_per_address=100, sessions=20_001, pending_joins=2)
    part = made(3).share(limits)
    assert (part.unauthenticated, part.unauthenticated_per_address, part.sessions) == (334, 34, 6667)
    assert (part.pending_joins, part.agents_per_second) == (1, 100)
    assert part.join_deadline == limits.join_deadline
    assert made(1).share(limits) == limits


async def test_a_user_within_the_limit_is_refused_by_no_worker() -> None:
    """The kernel chooses a worker for each connection: a user's part leaves room for an uneven choice."""
    limits = RelayLimitsConfig(
        sessions_per_user=200,
        joins_per_minute_per_user=8,
        groups={"ci": RelayUserLimitsConfig(2000, 0)},
        users={"robot": RelayUserLimitsConfig(1, 600)},
        actors={"bot": RelayUserLimitsConfig(1, 600)},
    )
    part = made(4).share(limits)
    assert part.sessions_per_user == 50 + 22
    assert part.joins_per_minute_per_user == 2 + 5
    assert part.groups == {"ci": RelayUserLimitsConfig(500 + 68, 0)}
    assert part.users == {"robot": RelayUserLimitsConfig(1, 150 + 37)}
    assert part.actors == {"bot": RelayUserLimitsConfig(1, 150 + 37)}
    assert part.connections_per_second_per_address == 50
    refused = 0
    for seed in range(1000):
        chosen = Counter(random.Random(seed).choices(range(4), k=200))
        refused += max(chosen.values()) > part.sessions_per_user
    assert refused <= 10


async def test_waits_for_those_that_were_there_before() -> None:
    one, other = made(2), made(2, 1)
    one.expected = 1
    one.siblings_deadline = 3600.0
    waiting = asyncio.ensure_future(one.siblings_ready())
    await asyncio.sleep(0)
    assert not waiting.done()
    joined(one.siblings, other.siblings)
    await asyncio.wait_for(waiting, 5)
    one.siblings.close()
    other.siblings.close()
    # A worker that does not answer must not keep this one from serving.
    one.siblings_deadline = 0.01
    await asyncio.wait_for(one.siblings_ready(), 5)


async def test_what_the_supervisor_asks_for() -> None:
    membership = made(2)
    assert json.loads(membership.snapshot()) == []
    assert membership.failures() == {}
    metrics, checks = Metrics("relay"), Checks()
    metrics.gauge("held", "Held.", None, lambda: 7)
    checks.add("registry", lambda: "it is gone")
    async with AsyncExitStack() as stack:
        service = Service(
            RelayConfig(), metrics, checks, SimpleNamespace(), membership.fleet, lambda checked: Outcome()
        )
        assert await membership.publish(service, stack) == ""
    assert ["arcbridge_relay_held", [[[], 7]]] in [[e["name"], e["series"]] for e in json.loads(membership.snapshot())]
    assert membership.failures() == {"registry": "it is gone"}


def test_what_the_supervisor_says_of_the_audit_log_reaches_it() -> None:
    """A worker that does not serve yet has none, and is told once it does."""
    told = Received({"t": "audit", "failure": "No space left on device"}, b"", None)
    audit = WorkerAudit(lambda line, number: None, on_failure="refuse", worker=0)
    workers: list[Any] = [SimpleNamespace(), SimpleNamespace(membership=SimpleNamespace(audit=audit))]
    for worker in workers:
        _Worker._received(worker, told)
    assert audit.failure == "No space left on device"

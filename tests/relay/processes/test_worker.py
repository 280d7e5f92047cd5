"""One worker's side of the supervisor's channel, without a process of its own."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from arcbridge.observe import logging as logs
from arcbridge.relay.operations import Operations, rows_of
from arcbridge.relay.processes.worker import Assignment, work
from arcbridge.relay.siblings.channel import QUEUE, Channel, Received, in_parts, pair
from arcbridge.settings.config import RelayConfig
from tests.relay.conftest import relay_config
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
    assert (await supervisor.hears("serving")).head["ca_pin"].startswith("sha256:")
    assert (await supervisor.hears("beat")).head["failures"] == {}
    supervisor.channel.send({"t": "metrics", "n": 3})
    answer = await supervisor.hears("metrics")
    assert answer.head["n"] == 3
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
    assert config.policy is not None
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

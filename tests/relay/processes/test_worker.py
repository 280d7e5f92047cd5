"""One worker's side of the supervisor's channel, without a process of its own."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from arcbridge.config import RelayConfig
from arcbridge.observe import logging as logs
from arcbridge.relay.processes.worker import Assignment, work
from arcbridge.relay.siblings.channel import Channel, Received, pair
from tests.identity.issuer import CONFIG


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
        async with asyncio.timeout(10):
            while kind not in self.kinds():
                await asyncio.sleep(0.005)
        return next(message for message in self.said if message.head["t"] == kind)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RelayConfig:
    monkeypatch.setattr(logs, "configure", lambda *_, **__: None)
    (tmp_path / "authentication.yaml").write_text(CONFIG)
    (tmp_path / "policy.toml").write_text("")
    return RelayConfig(
        public_address="127.0.0.1:443",
        data_dir=tmp_path / "data",
        authentication=tmp_path / "authentication.yaml",
        policy=tmp_path / "policy.toml",
    )


def assign(supervisor: Supervisor, config: RelayConfig) -> None:
    supervisor.channel.send({"t": "assign"}, pickle.dumps(Assignment(config, 0, 1, "127.0.0.1", 0)))
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

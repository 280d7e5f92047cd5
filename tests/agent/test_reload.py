"""A running agent's reload: what is taken over, what needs a restart, and that a mistake changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from structlog.testing import capture_logs

from arcbridge.agent.accounts import Accounts
from arcbridge.agent.denylist import Denylist
from arcbridge.agent.kube.warm_connections import WarmConnections
from arcbridge.agent.service import serve
from arcbridge.agent.targets import TcpTargets
from arcbridge.audit.verify import verify
from arcbridge.checks.self_checks import SelfChecks
from arcbridge.mux import memory
from arcbridge.settings.config import AgentConfig, AgentLimitsConfig, ObserveConfig, SessionConfig, TargetConfig
from tests.identity.issuer import CONFIG
from tests.support.eventually import until
from tests.support.world import fixed_port

from .fake_relay import FakeRelay


class Running:
    """An agent that serves, and reads `config` again at SIGHUP."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.stopping, self.hurry = asyncio.Event(), asyncio.Event()
        self.task: asyncio.Task[None]

    async def start(self) -> None:
        ready = asyncio.Event()
        serving = serve(self.config, ready.set, self.stopping, self.hurry, reread=lambda: self.config)
        self.task = asyncio.create_task(serving)
        waiting = asyncio.create_task(ready.wait())
        async with asyncio.timeout(30):
            await asyncio.wait([self.task, waiting], return_when=asyncio.FIRST_COMPLETED)
        if self.task.done():
            self.task.result()

    async def stop(self) -> None:
        self.stopping.set()
        self.hurry.set()
        await asyncio.wait_for(self.task, 30)

    async def reload(self, result: str) -> dict[str, object]:
        """Have the agent reload; return what its log says of it."""
        event = {"ok": "settings reloaded", "failed": "settings not reloaded"}[result]
        before = await self.count(result)
        with capture_logs() as lines:
            os.kill(os.getpid(), signal.SIGHUP)
            async with asyncio.timeout(30):
                while await self.count(result) == before:
                    await asyncio.sleep(0.01)
        (told,) = [dict(line) for line in lines if line["event"] == event]
        return told

    async def count(self, result: str) -> float:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{self.config.observe.listen}/metrics") as response,
        ):
            lines = (await response.text()).splitlines()
        name = f'arcbridge_agent_reloads_total{{result="{result}"}}'
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.fixture
async def agent(config: AgentConfig, tmp_path: Path) -> AsyncIterator[Running]:
    (tmp_path / "authentication.yaml").write_text(CONFIG)
    (tmp_path / "deny.toml").write_text("")
    async with FakeRelay.serving() as relay:
        relay.tokens["id.secret"] = "one"
        running = Running(
            replace(
                config,
                relays=(relay.address,),
                relay_ca_pin=relay.pin,
                authentication=tmp_path / "authentication.yaml",
                denylist_file=tmp_path / "deny.toml",
                observe=ObserveConfig(listen=f"127.0.0.1:{fixed_port()}"),
            )
        )
        await running.start()
        yield running
        await running.stop()


async def test_what_changes_is_told_and_what_needs_a_restart_too(agent: Running) -> None:
    agent.config.denylist_file.write_text('[[deny]]\nuser = "oidc:alice"\n')
    agent.config = replace(
        agent.config,
        token_mode=False,
        targets={"db": TargetConfig("db.test:5432", users=("oidc:alice",))},
        limits=AgentLimitsConfig(streams=7),
        session=SessionConfig(max_age=60.0, end_upgraded_streams=False, drain=60.0),
        control_connections=1,
    )
    told = await agent.reload("ok")
    assert told["taken"] == [
        "token_mode",
        "targets",
        "limits.streams",
        "session.max_age",
        "session.end_upgraded_streams",
        "denylist_file",
    ]
    assert told["needs_restart"] == ["control_connections", "session.drain"]
    assert told["log_level"] == "warning"
    told = await agent.reload("ok")
    assert (told["taken"], told["needs_restart"]) == ([], ["control_connections", "session.drain"])


async def test_a_mistake_changes_nothing(agent: Running) -> None:
    agent.config.authentication.write_text(CONFIG.replace("kind: Auth", "kind: Other"))
    good, agent.config = agent.config, replace(agent.config, limits=AgentLimitsConfig(streams=-1))
    told = await agent.reload("failed")
    assert "authentication.yaml, line" in str(told["reason"])
    assert "(and 1 more" in str(told["reason"])
    assert not agent.task.done()
    agent.config = good
    good.authentication.write_text(CONFIG)
    assert (await agent.reload("ok"))["taken"] == []


async def test_v20_a_reload_ends_what_it_does_not_allow(agent: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new list judges connections once it is certain to stay; tests/agent/test_targets.py has what ends."""
    asked: list[list[str]] = []
    monkeypatch.setattr(TcpTargets, "end_disallowed", lambda targets: asked.append(list(targets._targets)))
    good = agent.config
    agent.config = replace(good, targets={"db": TargetConfig("db.test:5432", users=("oidc:alice",))})
    await agent.reload("ok")
    assert asked == [["tcp:db"]]
    monkeypatch.setattr(Denylist, "take", lambda *_: 1 / 0)
    agent.config = good
    await agent.reload("failed")
    assert asked == [["tcp:db"]]
    monkeypatch.undo()


async def test_what_issuers_are_judged_by_waits_for_a_restart_with_them(agent: Running) -> None:
    """Without an authentication file the verifier goes on as it is: nothing that it judges by is taken over."""
    good = agent.config
    agent.config = replace(
        good, authentication=None, forbidden_audiences=("arcbridge-relay",), max_token_lifetime=3600.0, token_mode=True
    )
    for _ in range(2):
        told = await agent.reload("ok")
        assert told["taken"] == []
        assert told["needs_restart"] == ["authentication", "forbidden_audiences", "max_token_lifetime"]
    # With the file they are taken over at once.
    agent.config = replace(agent.config, authentication=good.authentication)
    told = await agent.reload("ok")
    assert told["taken"] == ["forbidden_audiences", "max_token_lifetime"]
    assert told["needs_restart"] == []


async def test_whatever_goes_wrong_the_last_good_settings_stay(agent: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    good, before = agent.config, memory.backlog.most
    real, failed = Accounts.change, False

    def change(accounts: Accounts, limits: AgentLimitsConfig) -> None:
        nonlocal failed
        real(accounts, limits)
        if not failed:
            failed = True
            raise RuntimeError("a defect")

    monkeypatch.setattr(Accounts, "change", change)
    agent.config = replace(good, token_mode=False, limits=AgentLimitsConfig(streams=7, agent_waiting_bytes=1 << 26))
    told = await agent.reload("failed")
    assert told["reason"] == "RuntimeError"
    assert memory.backlog.most == before
    agent.config = good
    assert (await agent.reload("ok"))["taken"] == []


async def test_the_bound_on_warm_connections_holds_at_once(agent: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[int] = []
    monkeypatch.setattr(WarmConnections, "change", lambda warm, most: bounds.append(most))
    agent.config = replace(agent.config, limits=AgentLimitsConfig(agent_warm_connections=9))
    assert (await agent.reload("ok"))["taken"] == ["limits.agent_warm_connections"]
    assert bounds == [9]
    await agent.stop()
    assert set(bounds[1:]) == {0}, "a drain ends all"


@pytest.mark.parametrize("result", ["ok", "failed"])
async def test_everything_is_looked_at_again(agent: Running, result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator has just mended shows at once, and not within a minute."""
    looked: list[tuple[str, ...]] = []
    monkeypatch.setattr(SelfChecks, "look_soon", lambda checks, *names: looked.append(names))
    if result == "failed":
        agent.config = replace(agent.config, limits=AgentLimitsConfig(streams=-1))
    await agent.reload(result)
    assert () in looked


async def test_the_audit_log_is_opened_anew_and_its_chain_goes_on(agent: Running, tmp_path: Path) -> None:
    file, moved = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    file.rename(moved)
    await agent.reload("ok")
    await until(lambda: file.exists() and file.stat().st_size)
    assert b'"event":"chain-end","cause":"rotated"' in moved.read_bytes()
    (begun,) = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert (begun["event"], begun["cause"]) == ("chain", "rotated")
    await agent.stop()
    report = verify([moved, file])
    assert report.findings == []
    assert len(report.chains) == 2

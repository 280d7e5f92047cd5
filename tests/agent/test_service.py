"""The agent as a whole: settings, start, and the end in order."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from arcbridge.agent.service import credential_store, enroll, own_namespace, serve, session_limits
from arcbridge.errors import ConfigError
from arcbridge.settings.config import AgentConfig, AgentStateConfig, SessionConfig
from tests.support.eventually import until

from .fake_relay import FakeRelay

GOOD = AgentConfig(relays=("https://relay:443",), state=AgentStateConfig(directory=Path("state")))


def test_a_secret_without_a_namespace_outside_of_a_pod(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"state\.secret"):
        own_namespace(tmp_path)
    with pytest.raises(ConfigError, match=r"^kubernetes\.drain_label: needs it \(this is not a pod\)$"):
        own_namespace(tmp_path, wanted_by="kubernetes.drain_label: needs it")
    (tmp_path / "namespace").write_text("arc\n")
    assert own_namespace(tmp_path) == "arc"
    with pytest.raises(ConfigError, match=r"state\.secret"):
        credential_store(replace(GOOD, state=AgentStateConfig(secret="a/b")), None)


async def test_start_serve_and_stop(config: AgentConfig, tmp_path: Path) -> None:
    async with FakeRelay.serving() as relay:
        relay.tokens["id.secret"] = "one"
        config = replace(config, relays=(relay.address,), relay_ca_pin=relay.pin)
        await enroll(config)
        before = asyncio.all_tasks()
        ready, stopping, hurry = asyncio.Event(), asyncio.Event(), asyncio.Event()
        running = asyncio.ensure_future(serve(config, ready.set, stopping, hurry))
        async with asyncio.timeout(30):
            await ready.wait()
            await relay.connected.wait()
        assert [path for path, _ in relay.calls] == ["/v1/enrol"]
        stopping.set()
        await asyncio.wait_for(running, 30)
        # What is cancelled ends in one of the loop's next turns; the relay's and the API server's own go on.
        await until(lambda: not [task for task in asyncio.all_tasks() - before if "_serve" not in repr(task)])
        assert (tmp_path / "audit.jsonl").exists()


async def test_stopped_while_no_relay_answers(config: AgentConfig) -> None:
    stopping = asyncio.Event()
    with structlog.testing.capture_logs() as lines:
        running = asyncio.ensure_future(serve(config, lambda: pytest.fail("not ready"), stopping, asyncio.Event()))
        await until(lambda: any(line["event"] == "enrolment waits" for line in lines))
    stopping.set()
    await asyncio.wait_for(running, 5)


@pytest.mark.parametrize("resumption", [True, False])
async def test_resumption_is_a_setting(config: AgentConfig, monkeypatch: pytest.MonkeyPatch, resumption: bool) -> None:
    made: list[Any] = []

    def record(*args: Any, **settings: Any) -> None:
        made.append(settings)
        raise InterruptedError

    monkeypatch.setattr("arcbridge.agent.service.Sessions", record)
    with pytest.raises(InterruptedError):
        await serve(replace(config, resumption=resumption), lambda: None, asyncio.Event(), asyncio.Event())
    assert (made[0]["limits"].replay > 0) is resumption
    assert made[0]["settings"].max_age == 12 * 3600


@pytest.mark.parametrize("text", [None, "[[deny]]\n", "oidc:alice\n"], ids=["missing", "no user", "not TOML"])
async def test_v15_no_start_with_a_denylist_that_cannot_be_used(
    config: AgentConfig, tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "denylist.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        await serve(
            replace(config, denylist_file=path), lambda: pytest.fail("not ready"), asyncio.Event(), asyncio.Event()
        )


def test_the_drain_of_the_settings_is_that_of_the_sessions() -> None:
    limits = session_limits(replace(GOOD, session=SessionConfig(drain=585.0), resumption=False))
    assert (limits.drain_timeout, limits.replay) == (585.0, 0)
    assert session_limits(GOOD).drain_timeout == 30.0

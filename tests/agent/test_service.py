"""The agent as a whole: settings, start, and the end in order."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arcbridge.agent.service import credential_store, enroll, own_namespace, serve, session_limits
from arcbridge.errors import ConfigError
from arcbridge.settings.config import (
    AgentConfig,
    AgentStateConfig,
    AuditConfig,
    KubernetesConfig,
    SessionConfig,
)
from tests.support.eventually import until
from tests.support.fake_apiserver import FakeApiServer

from .fake_relay import FakeRelay

GOOD = AgentConfig(relays=("https://relay:443",), state=AgentStateConfig(directory=Path("state")))


def test_a_secret_without_a_namespace_outside_of_a_pod(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"state\.secret"):
        own_namespace(tmp_path)
    (tmp_path / "namespace").write_text("arc\n")
    assert own_namespace(tmp_path) == "arc"
    with pytest.raises(ConfigError, match=r"state\.secret"):
        credential_store(replace(GOOD, state=AgentStateConfig(secret="a/b")), None)


async def test_start_serve_and_stop(tmp_path: Path) -> None:
    async with FakeApiServer.serving(tmp_path) as api, FakeRelay.serving() as relay:
        relay.tokens["id.secret"] = "one"
        (tmp_path / "join-token").write_text("id.secret")
        config = AgentConfig(
            relays=(relay.address,),
            relay_ca_pin=relay.pin,
            join_token_file=tmp_path / "join-token",
            kubernetes=KubernetesConfig(server=api.url, ca_file=api.ca_file, token_file=api.token_file),
            state=AgentStateConfig(directory=tmp_path / "state"),
            audit=AuditConfig(file=str(tmp_path / "audit.jsonl")),
        )
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


async def test_stopped_while_no_relay_answers(tmp_path: Path) -> None:
    async with FakeApiServer.serving(tmp_path) as api:
        (tmp_path / "join-token").write_text("id.secret")
        (tmp_path / "ca.crt").write_text(api.ca_file.read_text())
        config = AgentConfig(
            relays=("127.0.0.1:1",),
            relay_ca_file=tmp_path / "ca.crt",
            join_token_file=tmp_path / "join-token",
            kubernetes=KubernetesConfig(server=api.url, ca_file=api.ca_file, token_file=api.token_file),
            state=AgentStateConfig(directory=tmp_path / "state"),
            audit=AuditConfig(file=""),
        )
        stopping = asyncio.Event()
        running = asyncio.ensure_future(serve(config, lambda: pytest.fail("not ready"), stopping, asyncio.Event()))
        await asyncio.sleep(0.2)
        stopping.set()
        await asyncio.wait_for(running, 5)


@pytest.mark.parametrize(("resumption", "resumable"), [(True, True), (False, False)])
async def test_resumption_is_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumption: bool, resumable: bool
) -> None:
    made: list[Any] = []

    class Recorded(Exception):
        pass

    def record(*args: Any, **settings: Any) -> None:
        made.append(settings)
        raise Recorded

    monkeypatch.setattr("arcbridge.agent.service.Sessions", record)
    (tmp_path / "join-token").write_text("id.secret")
    async with FakeApiServer.serving(tmp_path) as api:
        config = AgentConfig(
            relays=("127.0.0.1:1",),
            join_token_file=tmp_path / "join-token",
            kubernetes=KubernetesConfig(server=api.url, ca_file=api.ca_file, token_file=api.token_file),
            state=AgentStateConfig(directory=tmp_path / "state"),
            audit=AuditConfig(file=""),
            resumption=resumption,
        )
        with pytest.raises(Recorded):
            await serve(config, lambda: None, asyncio.Event(), asyncio.Event())
    assert (made[0]["limits"].replay > 0) is resumable
    assert made[0]["settings"].max_age == 12 * 3600


@pytest.mark.parametrize("text", [None, "[[deny]]\n", "oidc:alice\n"], ids=["missing", "no user", "not TOML"])
async def test_v15_no_start_with_a_denylist_that_cannot_be_used(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "denylist.toml"
    if text is not None:
        path.write_text(text)
    (tmp_path / "join-token").write_text("id.secret")
    async with FakeApiServer.serving(tmp_path) as api:
        config = AgentConfig(
            relays=("127.0.0.1:1",),
            join_token_file=tmp_path / "join-token",
            kubernetes=KubernetesConfig(server=api.url, ca_file=api.ca_file, token_file=api.token_file),
            state=AgentStateConfig(directory=tmp_path / "state"),
            audit=AuditConfig(file=""),
            denylist_file=path,
        )
        with pytest.raises(ConfigError, match=str(path)):
            await serve(config, lambda: pytest.fail("not ready"), asyncio.Event(), asyncio.Event())


def test_the_drain_of_the_settings_is_that_of_the_sessions() -> None:
    limits = session_limits(replace(GOOD, session=SessionConfig(drain=585.0), resumption=False))
    assert (limits.drain_timeout, limits.replay) == (585.0, 0)
    assert session_limits(GOOD).drain_timeout == 30.0

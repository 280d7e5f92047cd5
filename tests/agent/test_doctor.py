"""The agent's doctor beside no agent: each hop in its order, and nothing is changed. Real processes: tests/e2e."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from pathlib import Path

import pytest

from arcbridge.agent.doctor import diagnose
from arcbridge.agent.kube import upstream_pool
from arcbridge.agent.settings import check
from arcbridge.checks.diagnosis import Finding, FindingState
from arcbridge.settings.config import AgentConfig, AgentStateConfig, AuditConfig, KubernetesConfig, TracingConfig
from arcbridge.settings.problems import Place
from tests.identity.issuer import CONFIG, URL
from tests.support.fake_apiserver import Exchange, FakeApiServer, reply


def bad(found: list[Finding]) -> set[str]:
    return {one.code for one in found if one.state in (FindingState.FAILED, FindingState.WARNING)}


async def test_nothing_is_made(config: AgentConfig, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    found = await diagnose(config)
    assert "relay_unreachable" in bad(found)
    assert not {"api_unreachable", "api_ca", "agent_credential", "audit"} & bad(found)
    assert set(tmp_path.iterdir()) == before
    assert next(one for one in found if one.hop == "API server").state is FindingState.OK


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"relays": ()}, "config"),
        ({"audit": AuditConfig(file="/proc/nothing/audit.jsonl")}, "audit"),
        (
            {"kubernetes": KubernetesConfig(server="https://127.0.0.1:1", token_file=Path("/proc/self/none"))},
            "kubernetes",
        ),
    ],
    ids=["settings", "audit", "token file"],
)
async def test_what_is_wrong_is_found(config: AgentConfig, change: dict[str, object], code: str) -> None:
    assert code in bad(await diagnose(dataclasses.replace(config, **change)))


async def test_all_settings_that_a_start_would_refuse_are_named_with_their_places(config: AgentConfig) -> None:
    wrong = dataclasses.replace(config, relays=(), control_connections=0, proof="perhaps")
    found = await diagnose(wrong, lambda setting: Place("agent.toml", len(setting)))
    assert [(one.hop, one.state, one.code) for one in found] == [("settings", FindingState.FAILED, "config")] * 3
    assert found[0].detail.startswith("agent.toml, line 6: relays: required but not set")


async def test_an_authentication_file_that_a_start_refuses_is_told_in_the_words_of_the_check(
    config: AgentConfig, tmp_path: Path
) -> None:
    file = tmp_path / "authentication.yaml"
    file.write_text(CONFIG.replace(URL, "https://login.example.org"))
    settings = dataclasses.replace(config, authentication=file)
    (expected,) = (one for one in check(settings).problems.errors if one.setting == "authentication")
    assert "login.example.org is the example's name" in str(expected)
    found = [(one.hop, one.detail) for one in await diagnose(settings) if one.code == "config"]
    assert found == [("authentication", str(expected))]


async def test_an_agent_that_no_caller_could_log_in_to(config: AgentConfig) -> None:
    found = {one.hop: one for one in await diagnose(dataclasses.replace(config, token_mode=False))}
    assert "no caller could log in" in found["authentication"].detail


async def test_an_api_server_that_does_not_answer_is_asked_once(
    config: AgentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen: its kernel takes connections. Each question waited for its own deadline, ten seconds."""
    monkeypatch.setattr(upstream_pool, "CONNECT_DEADLINE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        there = dataclasses.replace(config.kubernetes, server=f"https://127.0.0.1:{frozen.getsockname()[1]}")
        for state in (config.state, AgentStateConfig(secret="arcbridge/agent")):
            found = await diagnose(dataclasses.replace(config, kubernetes=there, state=state))
            assert "api_unreachable" in bad(found)
            skipped = [one.hop for one in found if one.detail == "the API server does not answer"]
            assert skipped[:2] == ["agent's credential at the API server", "right to impersonate"]
            assert skipped[2:] == ["agent's credential at the relay"] * bool(state.secret)
            frozen.accept()[0].close()
            frozen.setblocking(False)
            with pytest.raises(BlockingIOError):
                frozen.accept()


async def test_what_needs_no_other_thing_is_looked_at_beside_it(config: AgentConfig, fake: FakeApiServer) -> None:
    """The API server answers only once the collector was looked at."""
    looked = asyncio.Event()

    async def collect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        looked.set()
        writer.close()

    async def version(exchange: Exchange) -> None:
        await looked.wait()
        await exchange.send(reply(200, b"{}"))

    fake.routes["/version"] = version
    async with await asyncio.start_server(collect, "127.0.0.1", 0) as collector:
        where = f"http://127.0.0.1:{collector.sockets[0].getsockname()[1]}/v1/traces"
        found = await diagnose(dataclasses.replace(config, tracing=TracingConfig(endpoint=where)))
    assert next(one for one in found if one.hop == "API server").state is FindingState.OK


async def test_the_collector_of_spans_is_looked_at(config: AgentConfig, tmp_path: Path) -> None:
    away = dataclasses.replace(config, tracing=TracingConfig(endpoint="https://127.0.0.1:1/v1/traces"))
    (found,) = (one for one in await diagnose(away) if one.hop == "spans")
    assert (found.state, found.code) == (FindingState.FAILED, "spans")
    assert not [one for one in await diagnose(config) if one.hop == "spans"]

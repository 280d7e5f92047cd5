"""What the agent's tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from arcbridge.agent.kube.apiserver import ApiServer, endpoint_of
from arcbridge.audit import writer
from arcbridge.settings.config import AgentConfig, AgentStateConfig, AuditConfig, KubernetesConfig
from tests.support.fake_apiserver import FakeApiServer

from .pair import Held, holding


@pytest.fixture(autouse=True)
def _audit_is_written_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests read a log behind its `close`, which in production gives up after 2 s: then a busy machine loses records.
    No test closes a log whose disk takes nothing."""
    monkeypatch.setattr(writer, "CLOSE_WAIT", 60.0)


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeApiServer]:
    """An API server."""
    async with FakeApiServer.serving(tmp_path) as made:
        yield made


@pytest.fixture
def config(fake: FakeApiServer, tmp_path: Path) -> AgentConfig:
    """The settings of an agent before that API server, whose relay does not listen."""
    (tmp_path / "join-token").write_text("id.secret")
    return AgentConfig(
        relays=("https://127.0.0.1:1",),
        relay_ca_pin=f"sha256:{'1' * 64}",
        join_token_file=tmp_path / "join-token",
        kubernetes=KubernetesConfig(server=fake.url, ca_file=fake.ca_file, token_file=fake.token_file),
        state=AgentStateConfig(directory=tmp_path / "state"),
        audit=AuditConfig(file=str(tmp_path / "audit.jsonl")),
    )


@pytest.fixture
async def api(config: AgentConfig) -> AsyncIterator[ApiServer]:
    """The agent's connections to that API server."""
    made = ApiServer(endpoint_of(config.kubernetes, {}))
    yield made
    await made.close()


@pytest.fixture
async def held() -> AsyncIterator[Held]:
    """Alice's session at an agent."""
    async with holding() as made:
        yield made

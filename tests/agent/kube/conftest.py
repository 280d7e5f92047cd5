"""The proxy before an API server that records bytes, by both entrances."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from arcbridge.agent.kube.apiserver import ApiServer, endpoint_of
from arcbridge.settings.config import KubernetesConfig
from tests.support.fake_apiserver import FakeApiServer

from .bench import Bench, running
from .desk import Desk


@pytest.fixture(params=["fast path", "general path"])
async def bench(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    """Every case runs twice: with both entrances in place, and with the general one alone."""
    if request.param == "general path":
        monkeypatch.setattr("arcbridge.agent.kube.fast_path.plain_head", lambda *_: None)
    async with running(tmp_path) as made:
        yield made


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with FakeApiServer.serving(tmp_path) as fake:
        config = KubernetesConfig(server=fake.url, ca_file=fake.ca_file, token_file=fake.token_file)
        api = ApiServer(endpoint_of(config, {}))
        yield Desk(fake, api)
        await api.close()

"""The proxy before an API server that records bytes, by both entrances."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from .bench import Bench, reachable, running
from .desk import Desk

BY_BOTH = {"test_proxy", "test_proxy_audit", "test_proxy_hostile", "test_port_forward"}
"""Files whose cases run twice: with both entrances in place, and with the general one alone."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench" in metafunc.fixturenames and metafunc.module.__name__.rpartition(".")[2] in BY_BOTH:
        metafunc.parametrize("bench", ["fast path", "general path"], indirect=True)


@pytest.fixture
async def bench(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    if getattr(request, "param", "") == "general path":
        monkeypatch.setattr("arcbridge.agent.kube.fast_path.plain_head", lambda *_: None)
    async with running(tmp_path) as made:
        yield made


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with reachable(tmp_path) as (fake, api):
        yield Desk(fake, api)

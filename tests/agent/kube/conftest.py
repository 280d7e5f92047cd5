"""The proxy before an API server that records bytes, by both entrances."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from .bench import Bench, running


@pytest.fixture(params=["fast path", "general path"])
async def bench(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    """Every case runs twice: with both entrances in place, and with the general one alone."""
    if request.param == "general path":
        monkeypatch.setattr("arcbridge.agent.kube.fast_path.plain_head", lambda *_: None)
    async with running(tmp_path) as made:
        yield made

"""An HTTP API to ask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from arcbridge.relay.http.login_settings import login_document
from arcbridge.settings.config import RelayLoginConfig
from tests.relay.api_station import Relay, serving


@pytest.fixture
async def relay(tmp_path: Path, everything_logged: list[str]) -> AsyncIterator[Relay]:
    async with serving(tmp_path, None) as relay:
        yield relay


@pytest.fixture
async def login_relay(tmp_path: Path, everything_logged: list[str]) -> AsyncIterator[Relay]:
    """A relay that says where clients log in."""
    config = RelayLoginConfig("https://login.example.org", "arcbridge", cluster_audience="arcbridge-{cluster}")
    async with serving(tmp_path, login_document(config)) as relay:
        yield relay

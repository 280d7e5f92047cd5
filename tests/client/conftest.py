"""The other side of a client, and the loops: uvloop, and asyncio's own, which serves where uvloop cannot be had."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import structlog

from arcbridge.client.relay import relays as relays_module
from arcbridge.client.session import resumable_session
from arcbridge.net.backoff import Backoff
from tests.client.echo_stream import Lines
from tests.client.far_side import FarSide

BOTH = (
    "serving.pod_ports.test_pod_forward",
    "serving.test_endpoint",
    "serving.test_forward",
    "session.test_connection",
    "session.test_resumable_session",
    "session.test_resumable_session_moving",
    "session.test_session_manager",
    "session.test_session_manager_behind_auth_ok",
)
"""The modules whose tests run on both loops."""
assert all((Path(__file__).parent / f"{name.replace('.', '/')}.py").is_file() for name in BOTH), "a module was renamed"


@pytest.hookimpl
def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    module = getattr(item, "module", None)
    if module is None or module.__name__.removeprefix("tests.client.") not in BOTH:
        return {"asyncio": asyncio.new_event_loop}
    try:
        import uvloop
    except ImportError:
        return {"asyncio": asyncio.new_event_loop}
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
async def far() -> AsyncIterator[FarSide]:
    async with FarSide() as side:
        yield side


@pytest.fixture
async def second(far: FarSide) -> AsyncIterator[FarSide]:
    """Another relay before the same agent."""
    async with FarSide(far) as side:
        yield side


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the waits that only spread load, and wait for a relay that is only slow, as on a busy machine."""
    monkeypatch.setattr(resumable_session, "STABLE_AFTER", 0.0)
    monkeypatch.setattr(resumable_session, "MOVE_SPREAD", 0.0)
    monkeypatch.setattr(resumable_session, "Backoff", lambda *, cap: Backoff(first=0.01, cap=0.05))
    monkeypatch.setattr(relays_module, "HEAD_START", 60.0)


@pytest.fixture
def lines() -> Iterator[Lines]:
    with structlog.testing.capture_logs() as found:
        yield found

"""What touches sockets is tested on uvloop, and on asyncio's own loop, which serves where uvloop cannot be had."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

BOTH = ("test_connection", "test_endpoint", "test_forward", "test_life", "test_session")


@pytest.hookimpl
def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    module = getattr(item, "module", None)
    if module is None or module.__name__.rpartition(".")[2] not in BOTH:
        return {"asyncio": asyncio.new_event_loop}
    try:
        import uvloop
    except ImportError:
        return {"asyncio": asyncio.new_event_loop}
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

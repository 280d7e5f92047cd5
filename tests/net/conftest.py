from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.descriptors import held


@pytest.fixture
async def faults() -> AsyncIterator[list[dict[str, Any]]]:
    """Collect errors that reach the loop, which a test has to take out. No descriptor, reader or timer is left."""
    loop = asyncio.get_running_loop()
    found: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: found.append(context))
    gc.collect()
    before = held()
    yield found
    gc.collect()
    await asyncio.sleep(0)
    assert found == []
    assert held() <= before
    if isinstance(loop, asyncio.SelectorEventLoop):  # uvloop shows neither
        assert [timer for timer in loop._scheduled if not timer.cancelled()] == []
        assert list(loop._selector.get_map()) == [loop._ssock.fileno()]

"""Which loops the command-line tests run on."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping

import pytest

if sys.platform != "win32":
    import uvloop

ONE_LOOP = ("test_client", "test_login")
"""Files whose tests start processes, which choose their loop themselves: the loop of the test makes no difference."""


@pytest.hookimpl
def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    module = getattr(item, "module", None)
    if sys.platform == "win32":
        return {"asyncio": asyncio.new_event_loop}
    if module is not None and module.__name__.rpartition(".")[2] in ONE_LOOP:
        return {"asyncio": asyncio.new_event_loop}
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}

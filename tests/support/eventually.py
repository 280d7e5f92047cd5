"""Wait in a test for a state that another task brings about; `reports.until` does so where nothing else runs here."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable


async def until(condition: Callable[[], object], timeout: float = 30) -> None:
    """Wait until `condition`, or the coroutine that it returns, gives a true value. Raises TimeoutError."""
    async with asyncio.timeout(timeout):
        while True:
            answer = condition()
            if await answer if inspect.isawaitable(answer) else answer:
                return
            await asyncio.sleep(0.002)


async def settled(condition: Callable[[], bool], timeout: float = 5) -> None:
    """Let the loop run until `condition` holds, or `timeout` has passed: what is left then is the caller's to name."""
    with contextlib.suppress(TimeoutError):
        await until(condition, timeout)

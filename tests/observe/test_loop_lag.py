"""The event loop's delay is seen by its own timer."""

from __future__ import annotations

import asyncio
import time

from arcbridge.observe.loop_lag import LoopLag


async def test_a_blocked_loop_shows() -> None:
    lag = LoopLag(0.01)
    lag.start()
    lag.start()
    time.sleep(0.12)  # noqa: ASYNC251 - blocking the loop is what is measured
    while not lag.delays.count:
        await asyncio.sleep(0)
    lag.stop()
    assert lag.delays.total >= 0.1
    seen = lag.delays.count
    await asyncio.sleep(0.05)
    assert lag.delays.count == seen
    lag.stop()

"""Ends asyncio tasks of parts that close.

It starts none and keeps none. Invariant: what was cancelled here runs no more when the caller goes on.
"""

from __future__ import annotations

import asyncio
from typing import Any


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and return when all have ended, however each did."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

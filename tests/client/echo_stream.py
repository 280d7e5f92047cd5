"""What the tests of resumption share: a stream whose every byte is checked, and what a user sees in the log."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from arcbridge.client.session.session_manager import SessionManager
from tests.support.stream_io import StreamIO

WAITS, BACK = "connection lost, waiting to resume", "session resumed"
MOVED, OVER = "session moved to another connection", "session could not be resumed"

Lines = list[dict[str, Any]]


def events(lines: Lines, *wanted: str) -> list[str]:
    """Return those of `wanted` that a user sees (above debug), in order."""
    return [line["event"] for line in lines if line["event"] in wanted and line["log_level"] != "debug"]


class Stream:
    """A stream to the far side's echo that checks what comes back."""

    def __init__(self) -> None:
        self.io = StreamIO()

    @classmethod
    async def open(cls, session: SessionManager) -> Stream:
        stream = cls()
        (await session.ready()).open("tcp:echo", stream.io)
        await stream.check(b"first")
        return stream

    async def check(self, data: bytes) -> None:
        async with asyncio.timeout(20):
            writing = asyncio.ensure_future(self.io.write(data))
            assert await self.io.read_exactly(len(data)) == data
            await writing

    async def during(self, cut: Callable[[], Awaitable[None]], size: int = 1 << 20) -> None:
        """Call `cut` while bytes are on their way in both directions; all of them must come back."""
        data = os.urandom(size)
        async with asyncio.timeout(20):
            writing = asyncio.ensure_future(self.io.write(data))
            first = await self.io.read_exactly(size // 4)
            await cut()
            assert first + await self.io.read_exactly(size - size // 4) == data
            await writing

    async def end(self) -> Exception | None:
        """Read to the stream's end; return the error that it ends with, or None for an end in order."""
        async with asyncio.timeout(20):
            try:
                while await self.io.read():
                    pass
            except Exception as error:
                return error
        return None

"""A request's body on its way to the API server: streamed, counted, and known to be over or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web


class RequestBody:
    """The body of one request, read once.

    `finished` once all of it was read, `error` when the caller's framing broke in the middle; `count` in bytes.
    """

    def __init__(self, request: web.BaseRequest) -> None:
        self._content = request.content
        self._protocol = request.protocol
        self._continue_due = request.headers.get("Expect", "") != ""
        self._reading = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.count = 0
        self.finished = False
        self.error: Exception | None = None

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yields what arrives, as it arrives. A caller that waits for `100 Continue` gets it before the first read."""
        if self._continue_due and self._protocol.transport is not None:
            self._protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while True:
            self._idle.clear()
            try:
                chunk = await self._content.readany()
            except Exception as error:
                self.error = error
                raise
            finally:
                self._idle.set()
            if not chunk:
                self.finished = True
                return
            self.count += len(chunk)
            yield chunk
            if self._content.at_eof():
                self.finished = True
                return

    async def idle(self) -> None:
        """Until nobody reads: aiohttp's server reads the rest itself after an early answer, and two may not wait."""
        await self._idle.wait()

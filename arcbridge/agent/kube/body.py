"""Reads a request's body on its way to the API server: streams and counts it, and knows whether all of it came.

It collects nothing: a chunk is handed on before the next one is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aiohttp import HttpVersion11, web

from arcbridge.agent.kube.pod_body import Inspection


class RequestBody:
    """The body of one request, read once."""

    def __init__(self, request: web.BaseRequest, inspection: Inspection | None = None) -> None:
        """`inspection` sees each chunk; the body's end waits for it."""
        self._inspection = inspection
        self._content = request.content
        self._protocol = request.protocol
        self._continue_due = request.headers.get("Expect", "") != "" and request.version >= HttpVersion11
        self._idle = asyncio.Event()
        self._idle.set()
        self.count = 0
        """Bytes read so far."""
        self.finished = False
        """All of it was read."""
        self.error: Exception | None = None
        """What broke it off: the caller's framing, or the loss of the stream."""

    async def chunks(self, *, answered: bool = False) -> AsyncIterator[bytes]:
        """Yield what arrives, as it arrives. A caller that waits for `100 Continue` gets it before the first read,
        unless the answer has begun: it would stand in the middle of that."""
        if self._continue_due and not answered and self._protocol.transport is not None:
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
            last = not chunk or self._content.at_eof()
            self.count += len(chunk)
            if self._inspection is not None:
                self._inspection.feed(chunk)
                if last:
                    await self._inspection.complete()
            if chunk:
                yield chunk
            if last:
                self.finished = True
                return

    async def idle(self) -> None:
        """Wait until no read is under way: aiohttp's server reads the rest itself after an early answer, and two reads
        may not wait at once."""
        await self._idle.wait()

"""A stream as coroutines: read, write, finish, reset. For tests and studies; the product's protocols are callbacks."""

from __future__ import annotations

import asyncio

from arcbridge.errors import StreamReset
from arcbridge.mux.stream import WRITE_HIGH, StreamTransport
from arcbridge.wire.frames import ResetCode


class StreamIO(asyncio.Protocol):
    """The awaitable face of a stream, for one reader and one writer at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.transport: StreamTransport | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._eof = False
        self._error: Exception | None = None
        self._over = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._may_write = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, StreamTransport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        if self._size >= WRITE_HIGH and self.transport is not None:
            self.transport.pause_reading()
        self._wake_reader()

    def eof_received(self) -> bool:
        self._eof = True
        self._wake_reader()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        self._error = exc
        if exc is None:
            self._eof = True
        self._wake_reader()
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    def pause_writing(self) -> None:
        self._may_write = False

    def resume_writing(self) -> None:
        self._may_write = True
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    async def read(self, most: int = 65536) -> bytes:
        """Read up to `most` bytes; `b""` only after FIN and everything before it.

        Raises StreamReset, SessionEnded or ConnectionLost. A cancelled read has taken no byte.
        """
        while not self._chunks:
            if self._eof:
                return b""
            if self._error is not None:
                raise self._error
            self._reader = self._loop.create_future()
            await self._reader
        chunk = self._chunks[0]
        if len(chunk) > most:
            self._chunks[0] = chunk[most:]
            chunk = chunk[:most]
        else:
            self._chunks.pop(0)
        self._size -= len(chunk)
        if self._size < WRITE_HIGH and self.transport is not None:
            self.transport.resume_reading()
        return chunk

    async def read_exactly(self, count: int) -> bytes:
        """Read exactly `count` bytes. Raises EOFError when the direction ends before."""
        parts = []
        while count:
            part = await self.read(count)
            if not part:
                raise EOFError(f"the stream ended {count} bytes early")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    async def read_all(self) -> bytes:
        """Read everything until FIN."""
        parts = []
        while part := await self.read():
            parts.append(part)
        return b"".join(parts)

    async def write(self, data: bytes) -> None:
        """Send all, waiting for credit before. A cancelled write has sent nothing.

        Raises StreamReset, SessionEnded or ConnectionLost; StreamReset with NO_ERROR where the peer, or we, closed.
        """
        while not self._may_write and not self._over:
            self._writer = self._loop.create_future()
            await self._writer
        assert self.transport is not None
        if self.transport.is_closing():  # also between its end and the call that tells it
            raise self.transport.error or StreamReset(ResetCode.NO_ERROR, "the stream was closed")
        self.transport.write(data)

    def finish(self) -> None:
        """End our direction in order."""
        assert self.transport is not None
        self.transport.write_eof()

    def reset(self, code: ResetCode = ResetCode.CANCELLED) -> None:
        """End the stream now."""
        assert self.transport is not None
        self.transport.abort(code)

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

"""One HTTP/1.1 connection to a cluster's API server, straight over a stream of a session.

For what the client asks itself, `doctor`: no local endpoint, no other program, one request after the
other. It is no general client: a body is read to its length or its last chunk, and heads are bounded. Invariant: a body
that was cut is an error and never shorter without one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from arcbridge.errors import ConnectionLost, RemoteProtocolError
from arcbridge.mux.session import MuxSession
from arcbridge.mux.stream import StreamTransport

TARGET = "kubernetes"
_HEAD_LIMIT = 64 * 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. `headers` have lower-case names, of several of one name the last."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    size: int = 0
    """Bytes of the body, also where they were not kept."""


class StreamHttp(asyncio.Protocol):
    """`open`, then `request` as often as needed, then `close`. Raises ArcbridgeError when the stream ends."""

    def __init__(self) -> None:
        self._transport: StreamTransport | None = None
        self._received = bytearray()
        self._arrived = asyncio.Event()
        self._lost: Exception | None = None
        self._over = False

    @classmethod
    def open(cls, session: MuxSession) -> StreamHttp:
        """Open a stream to the API server; raises SessionEnded."""
        connection = cls()
        connection._transport = session.open(TARGET, connection)
        return connection

    # -- asyncio's callbacks ------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._arrived.set()

    def eof_received(self) -> bool:
        self._over = True
        self._arrived.set()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._over, self._lost = True, exc
        self._arrived.set()

    # -- requests -----------------------------------------------------------------------------------------------------

    async def request(
        self, method: str, path: str, body: bytes = b"", *, arrived: Callable[[int], None] | None = None
    ) -> Answer:
        """Send a request and return its answer; with `arrived` the body is counted there and not kept."""
        assert self._transport is not None
        lines = [f"{method} {path} HTTP/1.1", "Host: kubernetes", "Accept: application/json", "User-Agent: arcbridge"]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        if self._over:
            raise self._error()
        self._transport.write("\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body)
        status, headers = await self._head()
        kept = bytearray()
        size = 0

        def take(count: int) -> None:
            nonlocal size
            size += count
            if arrived is None:
                kept.extend(self._received[:count])
            else:
                arrived(count)
            del self._received[:count]

        if "chunked" in headers.get("transfer-encoding", "").lower():
            while length := _size(await self._line()):
                await self._exactly(length, take)
                await self._line()
            while await self._line():
                pass  # trailers
        elif status not in (204, 304):
            await self._exactly(_length(headers.get("content-length", "0")), take)
        return Answer(status, headers, bytes(kept), size)

    def close(self) -> None:
        """End the stream."""
        if self._transport is not None:
            self._transport.abort()

    async def _head(self) -> tuple[int, dict[str, str]]:
        while True:
            start = (await self._line()).split(b" ", 2)
            if len(start) < 2 or not start[0].startswith(b"HTTP/1.") or not start[1].isdigit():
                raise RemoteProtocolError("the other end of the stream does not speak HTTP")
            headers = {}
            while line := await self._line():
                name, _, value = line.decode("latin-1").partition(":")
                headers[name.strip().lower()] = value.strip()
            if int(start[1]) >= 200:
                return int(start[1]), headers

    async def _line(self) -> bytes:
        while (end := self._received.find(b"\r\n")) < 0:
            if len(self._received) > _HEAD_LIMIT:
                raise RemoteProtocolError("the head of an answer is too long")
            await self._more()
        line = bytes(self._received[:end])
        del self._received[: end + 2]
        return line

    async def _exactly(self, length: int, take: Callable[[int], None]) -> None:
        while length:
            if not self._received:
                await self._more()
            count = min(length, len(self._received))
            take(count)
            length -= count

    async def _more(self) -> None:
        if self._over:
            raise self._error()
        self._arrived.clear()
        await self._arrived.wait()

    def _error(self) -> Exception:
        return self._lost or ConnectionLost("the stream ended before its answer was whole")


def _length(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise RemoteProtocolError("an answer has a length that is none")
    return int(text)


def _size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError as error:
        raise RemoteProtocolError("an answer has a chunk whose length is none") from error

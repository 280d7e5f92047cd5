"""One HTTP/1.1 connection to a cluster's API server, straight over a stream of a session.

For what the client asks itself, `doctor`: no local endpoint, no other program, one request after the
other. It is no general client: a body is read to its length or its last chunk, and heads are bounded. Invariant: a body
that was cut is an error and never shorter without one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from arcbridge.errors import ConnectionLost, RemoteProtocolError
from arcbridge.mux.session import MuxSession

TARGET = "kubernetes"
_HEAD_LIMIT = 64 * 1024
_ENDED = "the stream ended before its answer was whole"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. `headers` have lower-case names, of several of one name the last."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    size: int = 0
    """Bytes of the body, also where they were not kept."""


class StreamHttp:
    """A stream to the API server: `request` as often as needed, then `close`. Raises ArcbridgeError when it ends."""

    def __init__(self, session: MuxSession) -> None:
        """Open the stream; raises SessionEnded."""
        self._reader = asyncio.StreamReader(_HEAD_LIMIT)
        self._transport = session.open(TARGET, asyncio.StreamReaderProtocol(self._reader))

    async def request(
        self, method: str, path: str, body: bytes = b"", *, arrived: Callable[[int], None] | None = None
    ) -> Answer:
        """Send a request and return its answer; with `arrived` the body is counted there and not kept."""
        lines = [f"{method} {path} HTTP/1.1", "Host: kubernetes", "Accept: application/json", "User-Agent: arcbridge"]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        self._transport.write("\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body)
        status, headers = await self._head()
        kept, size = bytearray(), 0
        async for piece in self._body(status, headers):
            size += len(piece)
            if arrived is None:
                kept += piece
            else:
                arrived(len(piece))
        return Answer(status, headers, bytes(kept), size)

    def close(self) -> None:
        """End the stream."""
        self._transport.abort()

    async def _head(self) -> tuple[int, dict[str, str]]:
        while True:
            start, *lines = (await self._until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            version, status, *_ = [*start.split(" ", 2), ""]
            if not version.startswith("HTTP/1.") or not status.isdigit():
                raise RemoteProtocolError("the other end of the stream does not speak HTTP")
            if int(status) >= 200:
                fields = (line.partition(":") for line in lines)
                return int(status), {name.strip().lower(): value.strip() for name, _, value in fields}

    async def _body(self, status: int, headers: dict[str, str]) -> AsyncIterator[bytes]:
        if "chunked" in headers.get("transfer-encoding", "").lower():
            while length := _size(await self._until(b"\r\n")):
                async for piece in self._exactly(length):
                    yield piece
                await self._until(b"\r\n")
            while await self._until(b"\r\n"):
                pass  # trailers
        elif status not in (204, 304):
            async for piece in self._exactly(_length(headers.get("content-length", "0"))):
                yield piece

    async def _exactly(self, length: int) -> AsyncIterator[bytes]:
        while length:
            piece = await self._reader.read(min(length, _HEAD_LIMIT))
            if not piece:
                raise ConnectionLost(_ENDED)
            length -= len(piece)
            yield piece

    async def _until(self, end: bytes) -> bytes:
        """Return what comes before `end`."""
        try:
            return (await self._reader.readuntil(end)).removesuffix(end)
        except asyncio.IncompleteReadError as error:
            raise ConnectionLost(_ENDED) from error
        except asyncio.LimitOverrunError as error:
            raise RemoteProtocolError("the head of an answer is too long") from error


def _length(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise RemoteProtocolError("an answer has a length that is none")
    return int(text)


def _size(line: bytes) -> int:
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError as error:
        raise RemoteProtocolError("an answer has a chunk whose length is none") from error

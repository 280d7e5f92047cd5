"""HTTP over a stream: bodies to their end, and none that was cut."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from arcbridge.client.session.stream_http import Answer, StreamHttp
from arcbridge.errors import ArcbridgeError, ConnectionLost, RemoteProtocolError, StreamReset
from arcbridge.mux.session import MuxSession


class Far:
    """The other end of a stream, and the session that opens it."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.aborted = False
        self.protocol: asyncio.Protocol | None = None

    def open(self, target: str, protocol: asyncio.Protocol) -> Far:
        assert target == "kubernetes"
        self.protocol = protocol
        return self

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.aborted = True


class Case:
    def __init__(self) -> None:
        self.far = Far()
        self.http = StreamHttp(cast(MuxSession, self.far))

    def say(self, *pieces: bytes) -> None:
        assert self.far.protocol is not None
        for piece in pieces:
            self.far.protocol.data_received(piece)

    async def ask(self, *pieces: bytes, arrived: Callable[[int], None] | None = None) -> Answer:
        task = asyncio.ensure_future(self.http.request("GET", "/version", arrived=arrived))
        for piece in pieces:
            await asyncio.sleep(0)
            self.say(piece)
        return await task


OK = b"HTTP/1.1 200 OK\r\nAudit-ID: a-1\r\n"


async def test_a_body_with_a_length_however_it_comes() -> None:
    whole = OK + b"Content-Length: 5\r\n\r\nhello"
    for cut in range(1, len(whole)):
        case = Case()
        answer = await case.ask(whole[:cut], whole[cut:])
        assert (answer.status, answer.body, answer.size, answer.headers["audit-id"]) == (200, b"hello", 5, "a-1")
    assert case.far.written.startswith(b"GET /version HTTP/1.1\r\nHost: kubernetes\r\n")


async def test_a_chunked_body_and_the_next_answer() -> None:
    case = Case()
    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: x\r\n\r\n"
    assert (await case.ask(chunked)).body == b"abcde"
    assert (await case.ask(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n")).status == 204
    case.http.close()
    assert case.far.aborted


async def test_a_body_that_is_counted_and_not_kept() -> None:
    counts: list[int] = []
    answer = await Case().ask(OK + b"Content-Length: 6\r\n\r\nabc", b"def", arrived=counts.append)
    assert (answer.body, answer.size, sum(counts)) == (b"", 6, 6)


@pytest.mark.parametrize(
    "head",
    [b"hello there\r\n\r\n", OK + b"Content-Length: -1\r\n\r\n", OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"],
)
async def test_what_is_no_http(head: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        await Case().ask(head)


async def test_a_head_without_end() -> None:
    with pytest.raises(RemoteProtocolError, match="too long"):
        await Case().ask(b"x" * (65 * 1024))


@pytest.mark.parametrize("error", [None, StreamReset(5)], ids=["end", "reset"])
async def test_a_body_that_was_cut(error: ArcbridgeError | None) -> None:
    case = Case()
    task = asyncio.ensure_future(case.http.request("GET", "/version"))
    await asyncio.sleep(0)
    case.say(OK + b"Content-Length: 5\r\n\r\nhel")
    assert case.far.protocol is not None
    case.far.protocol.eof_received()
    case.far.protocol.connection_lost(error)
    with pytest.raises(ConnectionLost if error is None else StreamReset):
        await task
    with pytest.raises(ArcbridgeError):
        await case.http.request("GET", "/version")

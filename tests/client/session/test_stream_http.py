"""HTTP over a stream: bodies to their end, and none that was cut."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from arcbridge.client.session.stream_http import api_client
from arcbridge.errors import ConnectionLost, RemoteProtocolError, StreamReset
from arcbridge.mux.session import MuxSession

OK = b"HTTP/1.1 200 OK\r\nAudit-ID: a-1\r\n"


class Far(asyncio.Transport):
    """The session that opens a stream, the stream, and what its other end says to each request."""

    def __init__(self, *answers: bytes | StreamReset | None) -> None:
        super().__init__()
        self.answers = list(answers)
        self.opened = 0
        self.written = b""
        self.closed = False

    def open(self, target: str, protocol: asyncio.Protocol) -> Far:
        assert target == "kubernetes"
        self.opened += 1
        self.protocol = protocol
        protocol.connection_made(self)
        return self

    def write(self, data: Any) -> None:
        self.written += data
        while self.answers:
            answer = self.answers.pop(0)
            if not isinstance(answer, bytes):
                self.protocol.connection_lost(answer)
                break
            self.protocol.data_received(answer)
            if answer.endswith(b"!"):
                break

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    abort = close


async def bodies(far: Far, count: int = 1) -> list[tuple[int, bytes]]:
    found = []
    async with api_client(cast(MuxSession, far)) as http:
        for _ in range(count):
            async with http.get("/version") as answer:
                found.append((answer.status, await answer.read()))
    assert far.closed
    return found


async def test_answers_come_over_one_stream() -> None:
    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nd!\r\n0\r\nTrailer: x\r\n\r\n"
    far = Far(OK + b"Content-Length: 6\r\n\r\n", b"hello!", chunked[:-10], chunked[-10:])
    assert await bodies(far, 2) == [(200, b"hello!"), (200, b"abcd!")]
    assert far.opened == 1
    head = far.written.partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert (head[0], b"User-Agent: arcbridge" in head) == (b"GET /version HTTP/1.1", True)
    assert not any(line.startswith(b"Accept-Encoding") for line in head), "what is measured is not compressed"


@pytest.mark.parametrize(
    "answer",
    [
        b"hello there\r\n\r\n",
        OK + b"Content-Length: -1\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        OK + b"X: " + b"x" * 65 * 1024 + b"\r\n\r\n",
    ],
    ids=["no HTTP", "no length", "no chunk", "endless head"],
)
async def test_what_is_no_http(answer: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="does not speak HTTP, or the head of its answer is too long"):
        await bodies(Far(answer))


@pytest.mark.parametrize(
    "answers",
    [
        (OK + b"Content-Length: 5\r\n\r\nhel", None),
        (OK + b"Content-Length: 5\r\n\r\nhel", StreamReset(5)),
        (None, None),  # what was not answered at all is asked once more
    ],
    ids=["cut", "cut by a reset", "no answer"],
)
async def test_what_is_no_whole_answer_is_an_error(answers: tuple[bytes | StreamReset | None, ...]) -> None:
    with pytest.raises(ConnectionLost, match="the stream ended before its answer was whole"):
        await bodies(Far(*answers))


async def test_an_answer_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcbridge.client.session.stream_http.ANSWER_DEADLINE", 0.01)
    with pytest.raises(ConnectionLost, match="the answer was not whole within 0 s"):
        await bodies(Far())


async def test_a_reset_instead_of_an_answer_is_known_as_one() -> None:
    with pytest.raises(StreamReset):
        await bodies(Far(StreamReset(5)))

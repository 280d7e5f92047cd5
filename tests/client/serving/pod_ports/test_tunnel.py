"""The upgrade to a port-forward: what of an API server's answer opens it, and what is said of any other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.serving.pod_ports import tunnel as module
from arcbridge.client.serving.pod_ports.tunnel import Program, Tunnel
from arcbridge.errors import ArcbridgeError, ConnectionLost, PermissionRefused, RemoteProtocolError, StreamReset
from tests.client.far_side import FarSide
from tests.client.serving.pod_ports.api import SWITCH
from tests.client.session.test_session_manager import make, running
from tests.support.eventually import until


class Answers(asyncio.Protocol):
    """Gives these bytes for an answer, in pieces, and then ends, or not."""

    def __init__(self, pieces: Iterable[bytes], ends: bool) -> None:
        self._pieces = pieces
        self._ends = ends
        self.received = b""
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.stream: Any = transport

    def data_received(self, data: bytes) -> None:
        first, self.received = not self.received, self.received + data
        if first:
            for piece in self._pieces:
                self.stream.write(piece)
            if self._ends:
                self.stream.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


async def opened(far: FarSide, directory: Path, *pieces: bytes, ends: bool = True) -> Answers:
    """Open a tunnel and close it; return its other end."""
    answers = Answers(pieces, ends)
    far.protocol = lambda target: answers
    async with running(make(far, directory)) as session:
        tunnel = Tunnel(await session.ready())
        try:
            async with asyncio.timeout(20):
                await tunnel.open("shop", "web-1", 80)
        finally:
            tunnel.close()
            await until(lambda: answers.lost)
    return answers


async def test_the_request_has_no_credential_and_asks_for_one_protocol(far: FarSide, tmp_path: Path) -> None:
    answers = await opened(far, tmp_path, *(SWITCH[n : n + 1] for n in range(len(SWITCH))), ends=False)
    head = answers.received.partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert head[0] == b"POST /api/v1/namespaces/shop/pods/web-1/portforward HTTP/1.1"
    names = [line.partition(b":")[0].lower() for line in head[1:]]
    assert names == [b"host", b"user-agent", b"connection", b"upgrade", b"x-stream-protocol-version", b"content-length"]


@pytest.mark.parametrize(
    ("pieces", "kind", "said"),
    [
        ([b"HTTP/1.1 403 Forbidden\r\nContent-Length: 17\r\n\r\n", b'{"message":"no!"}'], PermissionRefused, "no!"),
        ([b"HTTP/1.1 404 Gone\r\nTransfer-Encoding: chunked\r\n\r\n11\r\n", b'{"message":"no!"}\r\n0\r\n\r\n'],
         ArcbridgeError, "no!"),
        ([b"HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\n\r\n"], ArcbridgeError, "status 101"),
        ([b"HTTP/1.1 500 Oh\r\n\r\n"], ArcbridgeError, "status 500"),
        ([b"HTTP/1.1 429 Wait\r\n\r\n", b"x" * 1_000_000], ArcbridgeError, "status 429"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], RemoteProtocolError, "no HTTP"),
        ([b"HTTP/1.1 101 Switch"], RemoteProtocolError, "not whole"),
        ([b"HTTP/1.1 101 Yes\r\n", *[b"x: %b\r\n" % (b"y" * 1000)] * 1000], RemoteProtocolError, "not whole"),
        ([b"HTTP/1.1 101 Yes\r\n", *[b"x: y\r\n"] * 1000, b"\r\n"], RemoteProtocolError, "no HTTP"),
        ([], RemoteProtocolError, "not whole"),
    ],
)  # fmt: skip
async def test_answers_that_open_nothing(
    far: FarSide, tmp_path: Path, pieces: list[bytes], kind: type[ArcbridgeError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        await opened(far, tmp_path, *pieces)


async def test_an_answer_that_does_not_come(far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_TIMEOUT", 0.1)
    for pieces in ((), (b"HTTP/1.1 101 ",), (b"HTTP/1.1 403 No\r\nContent-Length: 9\r\n\r\n",)):
        with pytest.raises(ConnectionLost, match="was not opened within"):
            await opened(far, tmp_path, *pieces, ends=False)


async def test_a_stream_that_is_reset(far: FarSide, tmp_path: Path) -> None:
    class Resets(Answers):
        def data_received(self, data: bytes) -> None:
            self.stream.abort()

    answers = Resets((), False)
    far.protocol = lambda target: answers
    async with running(make(far, tmp_path)) as session:
        tunnel = Tunnel(await session.ready())
        with pytest.raises(StreamReset):
            await tunnel.open("shop", "web-1", 80)


async def test_what_a_program_has_sent_is_kept_up_to_a_bound_and_until_the_pod_speaks() -> None:
    class Nothing:
        def write(self, data: bytes) -> None: ...
        async def drain(self) -> None: ...
        def is_closing(self) -> bool:
            return False

    def program(*chunks: bytes) -> Program:
        reader = asyncio.StreamReader()
        for chunk in chunks:
            reader.feed_data(chunk)
        writer: Any = Nothing()
        return Program(reader, writer)

    one = program(b"GET /")
    await one.read()
    assert (one.sent, one.repeatable) == (b"GET /", True)
    await one.write(b"200")
    assert (one.sent, one.repeatable) == (b"", False)
    large = program(bytes(200_000))
    for _ in range(3):
        await large.read()
        assert len(large.sent) <= module.CHUNK
    assert not large.repeatable

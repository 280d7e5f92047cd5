"""Upgrades: joined behind a 101 alone, and nothing that a connection carries later reaches the stream else."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import pytest

from arcbridge.client.serving.gateway import upgrade as module
from arcbridge.http_fields import TOKEN_PROTOCOL
from arcbridge.wire.frames import ResetCode
from tests.client.far_side import CLUSTER
from tests.client.serving.gateway.station import REFUSED, Station, headers, station
from tests.support.eventually import until

TARGET = "/api/v1/namespaces/default/pods/web/exec?command=sh&stdin=true"


def head(token: str = "alice", *more: str, protocol: str = "websocket") -> bytes:
    lines = [f"GET /clusters/{CLUSTER}{TARGET} HTTP/1.1", "Host: g", "Connection: Upgrade", f"Upgrade: {protocol}"]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    return "\r\n".join([*lines, *more, "", ""]).encode()


async def connect_and_send(place: Station, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await place.connect()
    writer.write(sent)
    return reader, writer


async def switched(place: Station, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await connect_and_send(place, sent)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    return reader, writer


@pytest.mark.parametrize("protocol", ["websocket", "SPDY/3.1"])
async def test_an_upgrade_is_carried(tmp_path: Path, protocol: str) -> None:
    async with station(tmp_path) as (place, _):
        reader, writer = await switched(place, head("alice", "Sec-WebSocket-Key: abc", protocol=protocol))
        sent = place.far.heads[0].decode().split("\r\n")
        assert sent[0] == f"GET {TARGET} HTTP/1.1"
        assert {"Host: kubernetes", "Connection: Upgrade", f"Upgrade: {protocol}", "Sec-WebSocket-Key: abc"} <= {*sent}
        assert "alice" not in place.far.heads[0].decode()
        for size in (1, 1000, 300_000):
            writer.write(b"x" * size)
            assert await reader.readexactly(size) == b"x" * size
        writer.close()
        await until(lambda: place.sessions.requests == 0 and not place.server.open)
        assert place.server.requests == {"upgraded": 1}


async def test_the_token_of_a_browser_does_not_go_on(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        token = TOKEN_PROTOCOL + base64.urlsafe_b64encode(b"alice").decode().rstrip("=")
        _, writer = await switched(place, head("", f"Sec-WebSocket-Protocol: {token}, v5.channel.k8s.io"))
        assert place.far.auths[0].token == "alice"
        assert b"\r\nSec-WebSocket-Protocol: v5.channel.k8s.io" in place.far.heads[0]
        assert TOKEN_PROTOCOL.encode() not in place.far.heads[0]
        writer.close()


async def test_what_follows_an_answer_that_does_not_switch_reaches_no_stream(tmp_path: Path) -> None:
    """A hostile cluster keeps the connection open, and the tool in front sends another caller's request on it."""
    async with station(tmp_path) as (place, _):
        place.far.switches = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno"
        reader, writer = await connect_and_send(place, head("alice"))
        assert (await reader.readuntil(b"no")).startswith(b"HTTP/1.1 403 ")
        writer.write(b"GET /clusters/other/api HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer bob-secret\r\n\r\n")
        place.far.streams[0].write(b"!")  # behind which the gateway has read what the caller sent
        assert await reader.readexactly(1) == b"!"
        place.far.streams[0].close()
        assert await reader.read() == b""
        assert place.far.after_upgrade == []
        writer.close()


async def test_an_early_byte_reaches_no_stream_before_the_switch(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, client):
        place.far.switches = b""
        reader, writer = await connect_and_send(place, head("alice"))
        await place.far.switched.wait()
        writer.write(b"early")
        async with client.get(place.path(), headers=headers("alice")) as later:  # in the same session, behind it
            assert later.status == 200
        assert place.far.after_upgrade == []
        place.far.streams[0].write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(5) == b"early"
        writer.close()


@pytest.mark.parametrize("token", ["", REFUSED])
async def test_a_refused_upgrade_gets_a_status_and_the_connection_ends(tmp_path: Path, token: str) -> None:
    async with station(tmp_path) as (place, _):
        reader, writer = await connect_and_send(place, head(token) + head("bob"))
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert answer.count(b"HTTP/1.1 ") == 1
        assert place.far.heads == []
        writer.close()


async def test_an_upgrade_that_is_not_answered_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_DEADLINE", 0.05)
    async with station(tmp_path) as (place, _):
        place.far.switches = b""
        reader, writer = await connect_and_send(place, head())
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"did not answer the upgrade in time" in answer
        await until(lambda: place.far.streams[0].is_closing())
        writer.close()


async def test_the_head_of_an_answer_is_bounded(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        place.far.switches = b"HTTP/1.1 101 Switching Protocols\r\n" + b"a: b\r\n" * 100_000
        reader, writer = await connect_and_send(place, head())
        assert b" 503 " in await reader.readline()
        writer.close()


async def test_a_stream_that_is_refused(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        place.far.resets.append(ResetCode.FORBIDDEN)
        reader, writer = await connect_and_send(place, head())
        assert b" 403 " in await reader.readline()
        writer.close()


async def test_a_session_that_ends_cuts_what_it_carried(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        reader, writer = await switched(place, head())
        place.far.streams[0].abort()
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        await until(lambda: place.sessions.requests == 0 and not place.server.open)
        writer.close()

"""The connections of the API: their deadlines, what is counted, and how they end."""

import asyncio

import pytest

from tests.relay.api_station import Relay


async def test_a_silent_connection_is_closed(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcbridge.relay.http.server.HEAD_DEADLINE", 0.05)
    for sent in (b"", b"GET /v1/ca HTTP/1.1\r\nHost:"):
        try:
            assert await relay.raw(sent) == b""
        except ConnectionError:
            pass  # the abort may arrive as a reset
    assert relay.server.slow == 2


async def test_a_slow_body_is_refused(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcbridge.relay.http.server.BODY_DEADLINE", 0.05)
    answer = await relay.raw(b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_malformed_requests_are_counted(relay: Relay) -> None:
    await relay.raw(b"\x16\x03\x01\r\n\r\n")
    assert relay.server.malformed == 1


async def test_j27_a_head_that_is_too_long_is_answered_before_its_end(relay: Relay) -> None:
    answer = await relay.raw(b"GET /v1/ca HTTP/1.1\r\nHost: x\r\n" + (b"X-Y: " + b"a" * 9000 + b"\r\n") * 10)
    assert b" 400 Bad Request\r\n" in answer
    assert b"the request's head is too long" in answer
    assert relay.server.malformed == 1
    assert relay.server.slow == 0


async def test_closing_ends_connections_and_leaves_no_task(relay: Relay) -> None:
    before = len(asyncio.all_tasks())
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port, ssl=relay.context())
    writer.write(b"GET /v1/ca HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    await relay.server.close(1.0)
    await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert len(asyncio.all_tasks()) <= before

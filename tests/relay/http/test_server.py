"""The connections of the API: their deadlines, what is counted, and how they end."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import cast

import pytest

from arcbridge.net.sockets import receive
from arcbridge.net.tls import ALPN_HTTP, ALPN_JOIN
from arcbridge.net.tlspipe import CLOSE_DEADLINE, TlsPipe
from arcbridge.relay.admission import Ticket
from arcbridge.relay.counters import Counters
from arcbridge.relay.http.server import HttpHandler
from tests.net.ends import RELAY, client_context, completed_work, server_contexts, tcp_pair
from tests.relay.api_station import Relay
from tests.relay.station import EchoUpper, echoes, places, station

LONG = 1 << 20


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


async def test_a_connection_counts_until_it_is_over(tmp_path: Path) -> None:
    async with station(tmp_path) as relay:
        with await relay.dial() as sock:
            await echoes(sock)
            assert relay.admission.waiting == 1
        await relay.settled()


class Burst(asyncio.Protocol):
    """Sends more than the buffers of a connection hold, and closes, as the API does behind an answer in HTTP/1.0."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(bytes(LONG))
        transport.close()


async def test_an_answer_reaches_a_peer_with_a_slow_link() -> None:
    near, far = await tcp_pair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    ticket = places(1, 1).enter("127.0.0.1")
    assert isinstance(ticket, Ticket)
    handler = HttpHandler(lambda: server_contexts()[ALPN_HTTP], lambda ticket: Burst(), Counters())
    with near:
        serving = asyncio.create_task(handler.serve(far, ticket))
        pipe = TlsPipe(near, client_context(ALPN_HTTP), server_hostname=RELAY)
        await pipe.handshake()
        await pipe.write(b"GET")  # the handshake's last step goes with it
        await asyncio.sleep(CLOSE_DEADLINE + 0.5)
        arrived = 0
        while chunk := await pipe.read():
            arrived += len(chunk)
        assert arrived == LONG
    await asyncio.wait_for(serving, 5)


async def test_another_protocol_than_the_peeked_one_reaches_nothing() -> None:
    """docs/threats.md#J13: a context that negotiated something else, as if peek and handshake had disagreed."""
    made: list[EchoUpper] = []

    def protocol(ticket: Ticket) -> EchoUpper:
        made.append(EchoUpper())
        return made[-1]

    near, far = await tcp_pair()
    handler = HttpHandler(lambda: server_contexts()[ALPN_JOIN], protocol, Counters())
    ticket = places(1, 1).enter("127.0.0.1")
    assert isinstance(ticket, Ticket)
    with near:
        serving = asyncio.create_task(handler.serve(far, ticket))
        pipe = TlsPipe(near, client_context(ALPN_JOIN), server_hostname=RELAY)
        await pipe.handshake()
        await pipe.flush()
        with pytest.raises((OSError, EOFError)):
            await pipe.read()
        await asyncio.wait_for(serving, 5)
    assert made == []


async def test_handshake_and_decryption_are_charged_to_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#L43: the event loop makes it in callbacks of its own, as it decrypts requests."""
    payers = completed_work(monkeypatch)
    near, far = await tcp_pair()
    handler = HttpHandler(lambda: server_contexts()[ALPN_HTTP], lambda ticket: EchoUpper(), Counters())
    ticket = places(1, 1).enter("127.0.0.1")
    assert isinstance(ticket, Ticket)
    payer = ticket.loop_time
    with near:
        serving = asyncio.create_task(handler.serve(far, ticket))
        await echoes(near)
        assert len(payers) >= 2, "what it took from the ClientHello to its end, and what came behind it"
        assert set(payers) == {payer}
    await asyncio.wait_for(serving, 5)


async def test_a_failed_handshake_is_counted_and_closed() -> None:
    near, far = await tcp_pair()
    counters = Counters()
    ticket = places(1, 1).enter("127.0.0.1")
    assert isinstance(ticket, Ticket)
    with near:
        near.send(b"this is no TLS at all")
        await HttpHandler(lambda: server_contexts()[ALPN_HTTP], lambda ticket: EchoUpper(), counters).serve(far, ticket)
        assert counters.rejected["handshake"] == 1
        try:
            while await asyncio.wait_for(receive(near, 100), 5):
                pass
        except ConnectionResetError:
            pass

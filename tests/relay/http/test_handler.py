from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from arcbridge.net.sockets import receive
from arcbridge.net.tls import ALPN_HTTP, ALPN_JOIN
from arcbridge.net.tlspipe import TlsPipe
from arcbridge.relay.admission import Ticket
from arcbridge.relay.counters import Counters
from arcbridge.relay.http.handler import HttpHandler
from tests.net.ends import RELAY, client_context, server_contexts, tcp_pair
from tests.relay.station import EchoUpper, places, station


async def test_a_connection_counts_until_it_is_over(tmp_path: Path) -> None:
    async with station(tmp_path) as relay:
        with await relay.dial() as sock:
            pipe = TlsPipe(sock, client_context(ALPN_HTTP), server_hostname=RELAY)
            await pipe.handshake()
            await pipe.write(b"x")
            assert await pipe.read() == b"X"
            assert relay.admission.waiting == 1
        await relay.settled()


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


async def test_the_handshake_is_charged_to_the_address() -> None:
    """docs/threats.md#L43: the event loop makes it in callbacks of its own, and nothing else is charged here."""
    near, far = await tcp_pair()
    handler = HttpHandler(lambda: server_contexts()[ALPN_HTTP], lambda ticket: EchoUpper(), Counters())
    ticket = places(1, 1).enter("127.0.0.1")
    assert isinstance(ticket, Ticket)
    payer = ticket.loop_time
    with near:
        serving = asyncio.create_task(handler.serve(far, ticket))
        pipe = TlsPipe(near, client_context(ALPN_HTTP), server_hostname=RELAY)
        await pipe.handshake()
        await pipe.write(b"x")
        assert await pipe.read() == b"X"
        assert payer.spent > 0.0
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

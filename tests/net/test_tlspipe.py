from __future__ import annotations

import asyncio
import ssl

import pytest

from arcbridge.net.sockets import receive, send_all
from arcbridge.net.tls import ALPN_JOIN
from arcbridge.net.tlspipe import TlsPipe
from tests.net.ends import RELAY, client_context, server_contexts, tcp_pair


async def test_data_then_an_orderly_end_in_both_directions() -> None:
    near, far = await tcp_pair()
    with near, far:
        client = TlsPipe(near, client_context(), server_hostname=RELAY)
        server = TlsPipe(far, server_contexts()[ALPN_JOIN], server_side=True)

        async def serve() -> bytes:
            await server.handshake()
            assert await server.read() == b"question"
            data = bytearray()
            while chunk := await server.read():
                data += chunk
            assert await server.close() == b""
            return bytes(data)

        async def ask() -> bytes:
            await client.handshake()
            assert client.alpn == ALPN_JOIN
            await client.write(b"question")
            await client.write(bytes(300_000))
            return await client.close()

        # The question may arrive together with what follows it; read() returns at most one record.
        received, left_over = await asyncio.gather(serve(), ask())
        assert received == bytes(300_000)
        assert left_over == b""
        await send_all(near, b"raw")
        assert await receive(far, 10) == b"raw"


async def test_an_end_without_close_notify_is_no_clean_end() -> None:
    near, far = await tcp_pair()
    with near, far:
        client = TlsPipe(near, client_context(), server_hostname=RELAY)
        server = TlsPipe(far, server_contexts()[ALPN_JOIN], server_side=True)

        async def leave() -> None:
            await client.handshake()
            await client.write(b"x")
            near.close()

        async def serve() -> None:
            await server.handshake()
            await server.read()
            await server.read()

        with pytest.raises(EOFError):
            await asyncio.gather(serve(), leave())


async def test_the_peer_learns_why_a_handshake_failed() -> None:
    near, far = await tcp_pair()
    with near, far:
        client = TlsPipe(near, client_context(), server_hostname="wrong.test")
        server = TlsPipe(far, server_contexts()[ALPN_JOIN], server_side=True)
        results = await asyncio.gather(client.handshake(), server.handshake(), return_exceptions=True)
        assert isinstance(results[0], ssl.SSLCertVerificationError)
        assert isinstance(results[1], ssl.SSLError)
        assert "ALERT" in str(results[1])

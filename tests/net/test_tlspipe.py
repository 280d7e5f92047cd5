from __future__ import annotations

import asyncio
import ssl

import pytest

from arcbridge.net.tls import ALPN_JOIN
from arcbridge.net.tlspipe import TlsPipe
from tests.net.ends import RELAY, client_context, server_contexts, tcp_pair


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

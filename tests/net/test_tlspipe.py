from __future__ import annotations

import asyncio
import ssl

import pytest

from arcbridge.net.sockets import SocketReader, send_all
from arcbridge.net.tls import ALPN_JOIN
from arcbridge.net.tlspipe import TlsPipe
from arcbridge.tasks import cancel_and_wait
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


async def test_j29_a_peer_that_sends_records_without_payload_is_left() -> None:
    """docs/threats.md#J29: OpenSSL asks for more as long as it comes, and the bytes are always there already."""
    near, far = await tcp_pair()
    with near, far:
        server = TlsPipe(far, server_contexts()[ALPN_JOIN], server_side=True)
        server._tls = WantsMore()  # Python's ssl sends no KeyUpdate
        sending = asyncio.get_running_loop().create_task(send_all(near, bytes(2_000_000)))
        with pytest.raises(EOFError, match="without payload"):
            await server.read()
        assert server._incoming.pending <= 28 * 1024
        await cancel_and_wait(sending)


async def test_j29_a_peer_that_sends_without_end_holds_nobody_up() -> None:
    near, far = await tcp_pair()
    with near, far:
        reader = SocketReader(far)
        server = TlsPipe(far, server_contexts()[ALPN_JOIN], server_side=True, reader=reader)
        server._tls = Drips()
        loop = asyncio.get_running_loop()
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        working, sending = loop.create_task(others()), loop.create_task(send_all(near, bytes(2_000_000)))
        while server._fills < 60:
            assert await server.read()
        assert turns >= server._fills - 8
        await cancel_and_wait(working, sending)
        reader.deadline = loop.time()
        with pytest.raises(TimeoutError):
            await server._fill()
        reader.stop()


class WantsMore:
    """A connection whose records bring nothing."""

    def read(self, _size: int) -> bytes:
        raise ssl.SSLWantReadError


class Drips:
    """A connection of which each read of the socket brings a little."""

    def __init__(self) -> None:
        self._asked = 0

    def read(self, _size: int) -> bytes:
        self._asked += 1
        if self._asked % 2:
            raise ssl.SSLWantReadError
        return bytes(1024)

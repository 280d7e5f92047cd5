"""KeyUpdates on the connections of sessions, which a real OpenSSL sends."""

from __future__ import annotations

import asyncio
import ctypes
import ssl
from contextlib import suppress

import aiofastnet
import pytest

from arcbridge.errors import ConnectionLost
from arcbridge.net.key_updates import MOST
from arcbridge.net.session_tls import accept_session, connect_session
from arcbridge.wire.limits import Limits
from tests.mux.ends import make_sessions, tcp_pair, tls_contexts


@pytest.mark.parametrize("side", ["client", "agent"])
@pytest.mark.parametrize("count", [MOST // 2, 2000], ids=["few", "many"])
async def test_j34_key_updates_are_bounded(side: str, count: int) -> None:
    """docs/threats.md#J34: with a few of them a session is none the worse; many end its connection within one read."""
    ends = make_sessions(limits=Limits(replay=0))
    session = ends.client if side == "client" else ends.agent
    server, client = tls_contexts()
    near, far = await tcp_pair()
    far.setblocking(True)

    def peer() -> None:
        answers = side == "client"
        context, name = (server, None) if answers else (client, "agent.test")
        with context.wrap_socket(far, server_side=answers, server_hostname=name) as tls, suppress(OSError):
            send_key_updates(tls, count)
            tls.sendall(b"\x00")  # the beginning of a frame: it asks for nothing
            while tls.recv(65536):
                pass

    peering = asyncio.ensure_future(asyncio.to_thread(peer))
    if side == "client":
        await connect_session(near, client, ends.client.protocol(), "agent.test", handshake_deadline=5.0)
    else:
        await accept_session(near, server, ends.agent.protocol(), handshake_deadline=5.0)
    async with asyncio.timeout(10):
        if count > MOST:
            assert isinstance(await session.wait_ended(), ConnectionLost)
        else:
            while not session.stats.bytes_received:
                await asyncio.sleep(0.01)  # between two looks
    assert session.stats.bytes_received == (count < MOST)
    for one in (ends.client, ends.agent):
        one.abort()
        await one.wait_ended()
    await peering


def send_key_updates(tls: ssl.SSLSocket, count: int) -> None:
    """Write KeyUpdates, which Python's `ssl` does not."""
    libs = aiofastnet.OPENSSL_DYN_LIBS
    assert libs is not None
    openssl = ctypes.CDLL(libs.libssl)
    openssl.SSL_key_update.argtypes = ctypes.c_void_p, ctypes.c_int
    openssl.SSL_do_handshake.argtypes = (ctypes.c_void_p,)
    # Behind the object's head is its socket, and then OpenSSL's connection.
    at = id(tls._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
    connection = ctypes.c_void_p.from_address(at).value
    for _ in range(count):
        openssl.SSL_key_update(connection, 0)
        openssl.SSL_do_handshake(connection)

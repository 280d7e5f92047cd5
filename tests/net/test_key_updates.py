"""KeyUpdates on the connections of sessions, which a real OpenSSL sends."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from arcbridge.errors import ConnectionLost
from arcbridge.net.key_updates import MOST
from arcbridge.net.session_tls import SessionStart, accept_session
from arcbridge.wire.limits import Limits
from tests.mux.ends import make_sessions, tcp_pair, tls_contexts
from tests.net.tlsends import send_key_updates


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
        await SessionStart(near, client, "agent.test").finish(ends.client.protocol(), 5.0)
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

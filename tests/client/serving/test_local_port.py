"""A local port: which programs it serves, and what it says of those that it does not."""

from __future__ import annotations

import asyncio
import socket

import pytest
import structlog

from arcbridge.client.serving import local_port
from arcbridge.client.serving.local_port import ForwardStats, LocalPort
from arcbridge.net.loopback import listen_at
from arcbridge.net.peer_user import PeerUser
from tests.client.echo_stream import Lines


@pytest.mark.parametrize("user", [PeerUser.OTHER, PeerUser.GONE])
async def test_w13_programs_of_other_users_are_refused(
    monkeypatch: pytest.MonkeyPatch, lines: Lines, user: PeerUser
) -> None:
    """A program that has gone is refused as well, because whose it was cannot be told; that is not worth a warning."""
    monkeypatch.setattr(local_port, "peer_user", lambda sock: user)
    taken: asyncio.Queue[socket.socket] = asyncio.Queue()
    listening, stats = listen_at("127.0.0.1", 0), ForwardStats()
    port = LocalPort([listening], taken.put_nowait, stats, structlog.get_logger(), any_user=False)
    port.start()
    sock = socket.create_connection(listening.getsockname()[:2], timeout=10)
    with sock, pytest.raises(ConnectionResetError):
        await asyncio.to_thread(sock.recv, 1)
    assert (stats.accepted, stats.failed, taken.qsize()) == (1, 1, 0)
    told = str(lines)
    assert ("--any-user lets them in" in told, "'warning'" in told) == (user is PeerUser.OTHER,) * 2
    port._any_user = True
    with socket.create_connection(listening.getsockname()[:2], timeout=10):
        (await asyncio.wait_for(taken.get(), 10)).close()
    port.close()

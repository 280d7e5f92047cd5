from __future__ import annotations

import asyncio
import socket

from arcbridge.net.ready import reset
from arcbridge.relay.tcp_state import has_ended, is_dead
from tests.net.ends import tcp_pair


async def becomes(sock: socket.socket, *, ended: bool, dead: bool) -> bool:
    async with asyncio.timeout(5):
        while (has_ended(sock), is_dead(sock)) != (ended, dead):
            await asyncio.sleep(0.001)
    return True


async def test_open_half_closed_and_reset() -> None:
    near, far = await tcp_pair()
    with near, far:
        assert (has_ended(near), is_dead(near)) == (False, False)
        far.send(b"unread")
        far.shutdown(socket.SHUT_WR)
        assert await becomes(near, ended=True, dead=False)
        reset(far)
        assert await becomes(near, ended=True, dead=True)


async def test_where_the_system_cannot_tell_it_is_neither(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    near, far = await tcp_pair()
    with near:
        reset(far)
        assert await becomes(near, ended=True, dead=True)
        monkeypatch.delattr(socket, "TCP_INFO")
        assert (has_ended(near), is_dead(near)) == (False, False)

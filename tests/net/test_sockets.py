from __future__ import annotations

import asyncio
import socket

import pytest

from arcbridge.net.sockets import readable, receive, reset, send_all, writable
from tests.net.ends import tcp_pair


async def test_bytes_and_end() -> None:
    near, far = await tcp_pair()
    with near, far:
        waiting = asyncio.create_task(receive(far, 10))
        await asyncio.sleep(0)
        await send_all(near, b"hello")
        assert await waiting == b"hello"
        near.close()
        assert await receive(far, 10) == b""


async def test_a_full_socket_is_waited_for() -> None:
    near, far = await tcp_pair()
    with near, far:
        data = bytes(16 << 20)
        sending = asyncio.create_task(send_all(near, data))
        got = 0
        while got < len(data):
            got += len(await receive(far, 1 << 20))
        await sending
        await writable(near)


async def test_reset_is_seen_as_reset() -> None:
    near, far = await tcp_pair()
    with far:
        reset(near)
        with pytest.raises(ConnectionResetError):
            await receive(far, 10)
    reset(near)


async def test_a_cancelled_wait_takes_nothing_and_leaves_no_callback() -> None:
    near, far = await tcp_pair()
    with near, far:
        for wait in (readable(far), receive(far, 10)):
            waiting = asyncio.create_task(wait)
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert not asyncio.get_running_loop().remove_reader(far.fileno())
        near.send(b"x")
        assert await receive(far, 10) == b"x"


async def test_a_closed_socket_is_an_error_not_a_wait() -> None:
    sock = socket.socket()
    sock.close()
    for wait in (readable(sock), writable(sock)):
        with pytest.raises(ConnectionAbortedError):
            await wait

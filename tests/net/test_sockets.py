from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from typing import cast

import pytest

from arcbridge.net.sockets import AcceptLoop, readable, receive, send_all, unacknowledged, writable
from tests.net.ends import tcp_pair


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


class Accepting:
    """An accept loop on `count` loopback ports, and what it was told."""

    def __init__(self, count: int = 1) -> None:
        self.sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        for sock in self.sockets:
            sock.setblocking(False)
        self.accepted: list[socket.socket] = []
        self.exhausted: list[bool] = []
        self.arrived = asyncio.Event()
        self.loop = AcceptLoop(self.sockets, self._accepted, lambda _, error, again: self.exhausted.append(again))

    def _accepted(self, sock: socket.socket, host: str) -> None:
        assert host == "127.0.0.1"
        assert not sock.getblocking()
        self.accepted.append(sock)
        self.arrived.set()

    async def connect(self, index: int = 0) -> None:
        self.arrived.clear()
        with socket.create_connection(self.sockets[index].getsockname()):
            async with asyncio.timeout(5):
                await self.arrived.wait()

    def close(self) -> None:
        self.loop.close()
        for sock in self.accepted:
            sock.close()


async def test_connections_are_accepted_until_it_is_closed() -> None:
    accepting = Accepting(2)
    accepting.loop.start()
    await accepting.connect(0)
    await accepting.connect(1)
    ports = [sock.getsockname() for sock in accepting.sockets]
    accepting.close()
    accepting.close()
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(port)


async def test_what_is_queued_can_be_taken_at_once() -> None:
    accepting = Accepting()
    waiting = [socket.create_connection(accepting.sockets[0].getsockname()) for _ in range(3)]
    while accepting.loop.accept():
        pass
    assert len(accepting.accepted) == 3
    accepting.close()
    for sock in waiting:
        sock.close()


async def test_a_second_one_is_looked_for_behind_sixteen_single_ones() -> None:
    accepting = Accepting()
    waiting = [socket.create_connection(accepting.sockets[0].getsockname()) for _ in range(20)]
    for count in range(1, 17):
        assert accepting.loop.accept()
        assert len(accepting.accepted) == count
    assert not accepting.loop.accept()
    assert len(accepting.accepted) == 20
    accepting.close()
    for sock in waiting:
        sock.close()


class Exhausted:
    """A listening socket that finds no descriptor `times` times, and then an aborted connection."""

    def __init__(self, sock: socket.socket, times: int) -> None:
        self._sock = sock
        self._errors = [OSError(errno.EMFILE, "none left")] * times + [ConnectionAbortedError()]
        self.fileno = sock.fileno
        self.close = sock.close
        self.getsockname = sock.getsockname
        self.family, self.type, self.proto = sock.family, sock.type, sock.proto

    def _accept(self) -> tuple[int, object]:
        if self._errors:
            raise self._errors.pop(0)
        return self._sock._accept()


async def test_without_descriptors_it_pauses_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcbridge.net.sockets.ACCEPT_PAUSE", 0.01)
    accepting = Accepting()
    accepting.loop._listening = (cast(socket.socket, Exhausted(accepting.sockets[0], 2)),)
    accepting.loop.start()
    await accepting.connect()
    assert accepting.exhausted == [False, True]
    accepting.close()


async def test_closed_while_it_pauses_it_stays_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcbridge.net.sockets.ACCEPT_PAUSE", 0.0)
    accepting = Accepting()
    accepting.loop._listening = (cast(socket.socket, Exhausted(accepting.sockets[0], 1)),)
    assert not accepting.loop.accept()
    accepting.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert accepting.exhausted == [False]


async def test_bytes_that_the_peer_s_kernel_has_not_taken_are_unacknowledged() -> None:
    near, far = await tcp_pair()
    with near, far:
        assert not unacknowledged(near)
        with contextlib.suppress(BlockingIOError):
            while True:
                near.send(bytes(1 << 20))
        assert unacknowledged(near), "no buffer has room for it"

"""Waiting for a raw non-blocking socket, and the options that every connection of arcbridge gets."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Final

_USER_TIMEOUT_MS: Final = 30_000
"""Above PING's 25 s, so that the ends notice first and can say why. It also counts a peer that ACKs but does not
read (a zero window), which is wanted between the roles and must not be set on kubectl's own sockets."""
_NOTSENT_LOWAT: Final = 128 * 1024
"""Unsent bytes the kernel may hold per socket: what waits in there a keystroke can no longer overtake. Smaller should
cost wake-ups on fast links; on a noisy loopback two runs each of 64 KiB to 1 MiB showed no difference in CPU per byte
beyond the noise, and throughput varied too much to tell. The value is a start, not a result. It bounds this socket
alone: what waits in all of them on the way, the relay's and the modem's included, is bounded by `wire.congestion`."""


def tune(sock: socket.socket) -> None:
    """No delay, keepalive (30 s, then 3 probes 10 s apart), user timeout, a shallow send queue. Non-blocking."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 30),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", _USER_TIMEOUT_MS),
        ("TCP_NOTSENT_LOWAT", _NOTSENT_LOWAT),
    ):
        # macOS and Windows lack some of them; none is needed for correctness.
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def disable_user_timeout(sock: socket.socket) -> None:
    """For a peer that is no role of ours: it may stop reading for as long as it likes without losing the connection.

    TCP_USER_TIMEOUT counts a zero window as no answer; between the roles that is wanted, because they always read.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        sock.setsockopt(socket.IPPROTO_TCP, option, 0)


def reset(sock: socket.socket) -> None:
    """Close with RST, so that the peer sees a cut and never a complete end. The socket must have no callbacks left."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        # The option cannot be set on a socket that is gone already; closing is all that is left.
        pass
    sock.close()


async def readable(sock: socket.socket) -> None:
    """Return when `sock` has bytes, an end or an error. One reader per socket; a cancelled call leaves nothing."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()
    descriptor = sock.fileno()
    if descriptor < 0:
        raise ConnectionAbortedError("the socket was closed")
    loop.add_reader(descriptor, _wake, waiter)
    try:
        await waiter
    finally:
        loop.remove_reader(descriptor)


async def writable(sock: socket.socket) -> None:
    """Return when `sock` takes bytes again, is connected, or has an error."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()
    descriptor = sock.fileno()
    if descriptor < 0:
        raise ConnectionAbortedError("the socket was closed")
    loop.add_writer(descriptor, _wake, waiter)
    try:
        await waiter
    finally:
        loop.remove_writer(descriptor)


async def receive(sock: socket.socket, size: int) -> bytes:
    """At most `size` bytes, b"" at the end; raises `OSError`. A cancelled call has taken no byte."""
    while True:
        try:
            return sock.recv(size)
        except (BlockingIOError, InterruptedError):
            await readable(sock)


async def send_all(sock: socket.socket, data: bytes | bytearray | memoryview) -> None:
    """Send everything; raises `OSError`. A cancelled call may have sent a part."""
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except (BlockingIOError, InterruptedError):
            await writable(sock)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)

"""One end is a `TlsTransport`, the other a blocking TLS socket in a thread: a peer that nothing of ours has touched."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any, TypeVar

import aiofastnet

from arcbridge.net.tlstransport import TlsTransport, accept_tls, connect_tls
from tests.mux.ends import tls_contexts

NAME = "agent.test"
PATIENCE = 30.0
"""Seconds after which a test gives up."""
T = TypeVar("T")
SERVER, CLIENT = tls_contexts()


class Fickle(socket.socket):
    """A socket whose `send` fails on demand."""

    fails: OSError | None = None

    @classmethod
    def of(cls, plain: socket.socket) -> Fickle:
        """Take the place of a non-blocking socket."""
        fickle = cls(fileno=plain.detach())
        fickle.setblocking(False)
        return fickle

    def send(self, data: Any, flags: int = 0) -> int:
        if self.fails is not None:
            raise self.fails
        return super().send(data, flags)


class Watched(socket.socket):
    """A socket that remembers whether it was ever to close a descriptor that something else had closed before."""

    closed_twice = False

    def close(self) -> None:
        if self.fileno() != -1:
            try:
                os.fstat(self.fileno())
            except OSError:
                self.closed_twice = True
                self.detach()  # the number may be another one's any moment
        super().close()


def watched_and_reset() -> Watched:
    """Return a connected socket whose peer has reset the connection."""
    near, far = tcp()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    watched = Watched(fileno=near.detach())
    watched.setblocking(False)
    return watched


def tcp(*, send_buffer: int = 0, receive_buffer: int = 0) -> tuple[socket.socket, socket.socket]:
    """(near, far): near is for a transport, far blocks. Buffers in bytes: near's sending one, far's receiving one."""
    with socket.socket() as server:
        if receive_buffer:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)  # accepted sockets have it, too
        server.bind(("127.0.0.1", 0))
        server.listen()
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    for sock in (near, far):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if send_buffer:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    near.setblocking(False)
    far.settimeout(PATIENCE)
    return near, far


def blocking_tls(far: socket.socket, ours: str) -> ssl.SSLSocket:
    """The peer's end of TLS where the transport is the `ours` ("server" or "client"); honest about a ragged end."""
    if ours == "server":
        return CLIENT.wrap_socket(far, server_hostname=NAME, suppress_ragged_eofs=False)
    return SERVER.wrap_socket(far, server_side=True, suppress_ragged_eofs=False)


class Recorder(asyncio.Protocol):
    """Remembers what it was told, in order."""

    def __init__(self, *, pause: bool = False, keep_open: bool = False) -> None:
        loop = asyncio.get_running_loop()
        self.data = bytearray()
        self.calls: list[str] = []
        self.made: asyncio.Future[TlsTransport] = loop.create_future()
        self.lost: asyncio.Future[BaseException | None] = loop.create_future()
        self.pause = pause
        """Pause from within `connection_made`."""
        self.keep_open = keep_open
        self.arrived = asyncio.Event()
        self.at_most = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.calls.append("made")
        assert isinstance(transport, TlsTransport)
        if self.pause:
            transport.pause_reading()
        self.made.set_result(transport)

    def data_received(self, data: bytes) -> None:
        assert data, "nothing is no delivery"
        assert "eof" not in self.calls, "bytes behind the end"
        assert not self.lost.done()
        self.data += data
        self.at_most = max(self.at_most, len(data))
        self.arrived.set()

    def eof_received(self) -> bool:
        self.calls.append("eof")
        self.arrived.set()
        return self.keep_open

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.calls.append("lost")
        self.lost.set_result(exc)
        self.arrived.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on the recorded calls holds."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self.arrived.clear()
                await self.arrived.wait()

    async def end(self) -> BaseException | None:
        """Wait for `connection_lost` and return its argument."""
        async with asyncio.timeout(PATIENCE):
            return await asyncio.shield(self.lost)


class BufferedRecorder(Recorder, asyncio.BufferedProtocol):
    """The same as a BufferedProtocol, with a buffer smaller than a TLS record."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.buffer = bytearray(5000)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.buffer[:nbytes]))
        self.buffer[:nbytes] = b"\xdb" * nbytes


async def against(
    ours: str,
    protocol: Recorder,
    peer: Callable[[ssl.SSLSocket], T],
    *,
    sockets: tuple[socket.socket, socket.socket] | None = None,
) -> tuple[TlsTransport, asyncio.Future[T]]:
    """A transport that is `ours` ("server" or "client"), and what `peer` returns, which runs in a thread."""
    near, far = sockets or tcp()

    def work() -> T:
        with far, blocking_tls(far, ours) as tls:
            return peer(tls)

    thread = asyncio.ensure_future(asyncio.to_thread(work))
    if ours == "client":
        return await connect_tls(near, CLIENT, protocol, NAME), thread
    transport = accept_tls(near, SERVER, protocol)
    async with asyncio.timeout(PATIENCE):
        await asyncio.shield(protocol.made)
    return transport, thread


async def linked(
    server: asyncio.BaseProtocol, client: asyncio.BaseProtocol, **buffers: int
) -> tuple[TlsTransport, TlsTransport]:
    """(server's, client's): a transport at both ends."""
    near, far = tcp(**buffers)
    far.setblocking(False)
    accepted = accept_tls(near, SERVER, server)
    connected = await connect_tls(far, CLIENT, client, NAME)
    async with asyncio.timeout(PATIENCE):
        while "handshake" in repr(accepted):
            await asyncio.sleep(0)
    return accepted, connected


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

"""Two mux sessions joined in memory or over real TLS, on a loop that is checked for what it leaves behind."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trustme

from arcbridge.errors import StreamReset
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.net.tls import ServerContext
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk
from arcbridge.wire.session import Kind, Side
from tests.support.stream_io import StreamIO

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.SelectorEventLoop}
if sys.platform != "win32":
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop
both_loops = pytest.mark.parametrize("loop", LOOPS)
both_links = pytest.mark.parametrize("link", ["memory", "tls"])


Faults = list[dict[str, Any]]
"""What the fixture `faults` collects."""


def take_out(faults: Faults, text: str) -> None:
    """Take the errors whose text has `text` out of what reached the loop; there must be one."""
    expected = [one for one in faults if text in repr(one.get("exception") or one)]
    assert expected, faults
    for one in expected:
        faults.remove(one)


async def soon(condition: Any) -> None:
    async with asyncio.timeout(8):
        while not condition():
            await asyncio.sleep(0.002)


async def read_until_cut(io: StreamIO) -> tuple[bytes, StreamReset]:
    """Read until the stream is reset: the bytes before it, and the error."""
    received = bytearray()
    try:
        async with asyncio.timeout(8):
            while True:
                received += await io.read()
    except StreamReset as error:
        return bytes(received), error


def run(
    loop_name: str, main: Callable[[], Awaitable[None]], *, timeout: float = 60.0, expected: tuple[str, ...] = ()
) -> None:
    """Run `main` and assert that no task, timer or unexpected error is left.

    `expected`: texts of errors that the loop's exception handler must get, each at least once.
    """
    errors: list[dict[str, Any]] = []

    async def whole() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: errors.append(context))
        async with asyncio.timeout(timeout):
            await main()
        for _ in range(5):
            await asyncio.sleep(0)
        if isinstance(loop, asyncio.SelectorEventLoop):
            await asyncio.sleep(0.01)
            timers = [h for h in loop._scheduled if not h.cancelled()]
            assert not timers, f"timers left: {timers}"
            keys = [k.fd for k in loop._selector.get_map().values()]
            assert keys == [loop._ssock.fileno()], f"descriptors left: {keys}"
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left: {left}"

    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        runner.run(whole())
    gc.collect()
    texts = [repr(context.get("exception") or context) for context in errors]
    for text in expected:
        assert any(text in one for one in texts), f"{text!r} not among {texts}"
    others = [one for one in texts if not any(text in one for text in expected)]
    assert not others, f"errors in callbacks: {others}"


class Recorder(BaseHandler):
    """A handler that accepts, gives each opened stream a protocol, and remembers."""

    def __init__(self, make: Callable[[], asyncio.BaseProtocol] = StreamIO, *, accept: bool = True) -> None:
        self.make = make
        self.accept = accept
        self.calls: list[str] = []
        self.opened: asyncio.Queue[Any] = asyncio.Queue()
        self.error: Exception | None = None

    def established(self, session: MuxSession) -> None:
        self.calls.append("established")

    def auth_received(self, session: MuxSession, auth: Auth) -> None:
        self.calls.append("auth_received")
        if self.accept:
            session.accept_auth(AuthOk(b"id", b"secret", "jane", 60))

    def auth_accepted(self, session: MuxSession, ok: AuthOk) -> None:
        self.calls.append("auth_accepted")

    def stream_opened(self, session: MuxSession, stream: StreamTransport, target: str) -> None:
        self.calls.append("stream_opened")
        protocol = self.make()
        stream.attach(protocol)
        self.opened.put_nowait(protocol)

    def goaway_received(self, session: MuxSession, goaway: Any) -> None:
        self.calls.append("goaway_received")

    def session_ended(self, session: MuxSession, error: Exception) -> None:
        self.calls.append("session_ended")
        assert self.error is None, "ended twice"
        self.error = error


class MemoryTransport(asyncio.Transport):
    """One end of an in-memory connection for a BufferedProtocol, with write limits and order of calls as asyncio's."""

    def __init__(self, protocol: asyncio.BufferedProtocol, piece: int) -> None:
        super().__init__()
        self.protocol = protocol
        self.peer: MemoryTransport | None = None
        self.piece = piece
        self.buffer = bytearray()
        self.high, self.low = 65536, 16384
        self.paused = False
        self.closing = False
        self.lost = False
        self.frozen = False
        self.moving = False
        self.written = 0
        self.loop = asyncio.get_running_loop()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high is not None
        assert low is not None
        self.high, self.low = high, low

    def get_write_buffer_size(self) -> int:
        return len(self.buffer)

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.closing or self.lost:
            return
        assert data, "an empty write"
        self.buffer += data
        self.written += len(data)
        if len(self.buffer) > self.high and not self.paused:
            self.paused = True
            self.protocol.pause_writing()
        self.move_soon()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def move_soon(self) -> None:
        if not self.moving and not self.lost:
            self.moving = True
            self.loop.call_soon(self.move)

    def freeze(self, frozen: bool) -> None:
        """Whether the network stands still in this direction."""
        self.frozen = frozen
        self.move_soon()

    def move(self) -> None:
        self.moving = False
        peer = self.peer
        if peer is None or self.frozen or self.lost:
            return
        if self.buffer:
            data = bytes(self.buffer[: self.piece])
            del self.buffer[: self.piece]
            if not peer.lost and not peer.closing:
                view = peer.protocol.get_buffer(-1)
                data, rest = data[: len(view)], data[len(view) :]
                self.buffer[:0] = rest
                view[: len(data)] = data
                peer.protocol.buffer_updated(len(data))
            if self.paused and len(self.buffer) <= self.low:
                self.paused = False
                self.protocol.resume_writing()
            self.move_soon()
        elif self.closing:
            self.lose(None)

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            self.move_soon()

    def abort(self) -> None:
        self.closing = True
        self.buffer.clear()
        self.loop.call_soon(self.lose, None)

    def lose(self, exc: Exception | None) -> None:
        if self.lost:
            return
        self.lost = self.closing = True
        self.protocol.connection_lost(exc)
        peer, self.peer = self.peer, None
        if peer is not None and not peer.lost:
            peer.loop.call_soon(peer.lose, None)


@dataclass
class Ends:
    """A client's and an agent's session that are connected."""

    client: MuxSession
    agent: MuxSession
    client_handler: Recorder
    agent_handler: Recorder

    async def stream(self, target: str = "kubernetes") -> tuple[StreamIO, StreamIO]:
        """A stream's two ends, awaitable."""
        mine = StreamIO()
        self.client.open(target, mine)
        theirs = await self.agent_handler.opened.get()
        return mine, theirs

    async def stop(self) -> None:
        """End both sessions and wait until their transports are gone."""
        for session in (self.client, self.agent):
            session.close()
        for session in (self.client, self.agent):
            await session.wait_ended()
        while self.client.transport is not None or self.agent.transport is not None:
            await asyncio.sleep(0)
        await asyncio.sleep(0)


def make_sessions(
    client_handler: Recorder | None = None,
    agent_handler: Recorder | None = None,
    *,
    kind: Kind = Kind.SESSION,
    limits: Limits = DEFAULT,
    authenticate: bool = True,
) -> Ends:
    """Two sessions that are not connected yet."""
    client_handler, agent_handler = client_handler or Recorder(), agent_handler or Recorder()
    client = MuxSession(Side.INITIATOR, kind, client_handler, limits=limits, label="c")
    agent = MuxSession(Side.ACCEPTOR, kind, agent_handler, limits=limits, label="a")
    if kind is Kind.SESSION and authenticate:
        client.authenticate(Auth("oidc", "canary-token"))
    return Ends(client, agent, client_handler, agent_handler)


def connect_in_memory(ends: Ends, piece: int = 64 * 1024) -> tuple[MemoryTransport, MemoryTransport]:
    """Join both sessions by memory; the two transports (client's, agent's)."""
    left = MemoryTransport(ends.client.protocol(), piece)
    right = MemoryTransport(ends.agent.protocol(), piece)
    left.peer, right.peer = right, left
    left.protocol.connection_made(left)
    right.protocol.connection_made(right)
    return left, right


_authority = trustme.CA()
_certificate = _authority.issue_cert("agent.test")


def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server's, client's), TLS 1.3."""
    server = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    server.minimum_version = ssl.TLSVersion.TLSv1_3
    server.num_tickets = 0
    _certificate.configure_cert(server)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.minimum_version = ssl.TLSVersion.TLSv1_3
    _authority.configure_trust(client)
    return server, client


def tls_authority() -> str:
    """Return the CA of the server's certificate, PEM."""
    return _authority.cert_pem.bytes().decode()


async def connect_over_tls(ends: Ends) -> tuple[socket.socket, socket.socket]:
    """Join both sessions over TLS on a real TCP connection; the two sockets."""
    server_context, client_context = tls_contexts()
    loop = asyncio.get_running_loop()
    near, far = await tcp_pair()
    await asyncio.gather(
        loop.connect_accepted_socket(ends.agent.protocol, far, ssl=server_context, ssl_shutdown_timeout=3),
        loop.create_connection(
            ends.client.protocol, sock=near, ssl=client_context, server_hostname="agent.test", ssl_shutdown_timeout=3
        ),
    )
    return near, far


async def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected, non-blocking TCP sockets on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.socket()
        near.setblocking(False)
        near.connect_ex(listener.getsockname())
        far, _ = listener.accept()
    far.setblocking(False)
    for sock in (near, far):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


@asynccontextmanager
async def connected(link: str = "memory", *, piece: int = 64 * 1024, **kwargs: Any) -> Any:
    """Two established sessions over `memory` or `tls`; ended at the end."""
    ends = make_sessions(**kwargs)
    if link == "memory":
        connect_in_memory(ends, piece)
    else:
        await connect_over_tls(ends)
    await ends.client.wait_established()
    await ends.agent.wait_established()
    try:
        yield ends
    finally:
        await ends.stop()

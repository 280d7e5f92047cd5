"""A client's session with the agent's side of it, in one process: accepted, held over one connection, cut, judged."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from arcbridge.agent.agent_session import AgentSession
from arcbridge.agent.audit import AuditLog
from arcbridge.agent.authenticator import Authenticated
from arcbridge.agent.kube.caller import Caller, token_digest
from arcbridge.agent.kube.upstream_pool import UpstreamPool
from arcbridge.agent.kube.warm_connections import WarmConnections
from arcbridge.agent.restrictions.session_restrictions import SessionRestrictions
from arcbridge.agent.sessions import Sessions
from arcbridge.agent.targets import TcpTargets
from arcbridge.errors import ArcbridgeError, SessionEnded, StreamReset, Unauthenticated
from arcbridge.identity.claims import Identity
from arcbridge.identity.proof import NO_PEER, Peer
from arcbridge.mux.connection import AuthMaker
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.net.tls import ServerContext, inner_client_context, inner_server_context
from arcbridge.pki.authority import Authority
from arcbridge.wire.frames import HEADER_SIZE, VERSION, FrameType, frame, unpack_header
from arcbridge.wire.limits import DEFAULT
from arcbridge.wire.records import Auth, AuthOk, Goaway, Hello
from arcbridge.wire.session import Kind, Side, State
from tests.support.clock import Clock
from tests.support.eventually import until
from tests.support.stream_io import StreamIO

CA = Authority.create("test")
LEAF = CA.issue_server(["one.cluster.arcbridge"])
SERVER, CLIENT = inner_server_context(LEAF.certificate_pem, LEAF.key_pem), inner_client_context(CA.certificate_pem)
PEER = Peer(SERVER.spki, CA.pin)


class FakeAuthenticator:
    """An authenticator that accepts the tokens it was given; `hold` makes it wait."""

    def __init__(self, **tokens: str) -> None:
        """`tokens`: the user of each."""
        self.known: dict[str, Authenticated | ArcbridgeError] = {}
        self.hold: asyncio.Event | None = None
        self.asked: list[str] = []
        for token, name in tokens.items():
            self.add(token, name)

    def add(
        self,
        token: str,
        name: str,
        *groups: str,
        expires: float = 2000.0,
        issued: float | None = None,
        token_mode: bool = False,
    ) -> None:
        """Accept `token`; unless `issued` says more it was issued 1000 s before it expires."""
        at = max(expires - 1000.0, 0.0) if issued is None else issued
        identity = Identity(name, "", groups, f"i#{name}", "i", expires, issued_at=at)
        self.known[token] = Authenticated(identity, token_mode, token_digest(token.encode()) if token_mode else b"")

    async def authenticate(self, auth: Auth, peer: Peer) -> Authenticated:
        self.asked.append(auth.token)
        if self.hold is not None:
            await self.hold.wait()
        found = self.known.get(auth.token, Unauthenticated("not known"))
        if isinstance(found, ArcbridgeError):
            raise found
        if auth.restrictions:
            return dataclasses.replace(found, restrictions=SessionRestrictions.read(auth.restrictions))
        return found

    async def review_in_session(self, token: str, proved_key: str) -> Identity:
        return (await self.authenticate(Auth(kind="bearer", token=token), NO_PEER)).identity


class FakeProxy:
    """A service that echoes and remembers the users it served."""

    def __init__(self) -> None:
        self.callers: list[Caller] = []
        self.warm = WarmConnections(cast(UpstreamPool, None))

    def serve(self, stream: StreamTransport, caller: Caller) -> None:
        self.callers.append(caller)
        stream.attach(_Echo())


class _Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert isinstance(self.transport, asyncio.Transport)
        self.transport.write(data)


class ClientSide(BaseHandler):
    def __init__(self) -> None:
        self.accepted: list[AuthOk] = []
        self.accepted_again = asyncio.Event()
        self.away = asyncio.Event()
        """The session was detached."""
        self.move = asyncio.Event()

    def detached(self, session: MuxSession, error: ArcbridgeError) -> None:
        self.away.set()

    def resumed(self, session: MuxSession) -> None:
        self.away.clear()

    def move_requested(self, session: MuxSession) -> None:
        self.move.set()

    def auth_accepted(self, session: MuxSession, ok: AuthOk) -> None:
        self.accepted.append(ok)
        if len(self.accepted) > 1:
            self.accepted_again.set()


async def end_of(session: MuxSession) -> SessionEnded:
    """Wait until a session has ended, and return with what; fail where its connection was lost."""
    async with asyncio.timeout(30):
        ended = await session.wait_ended()
    assert isinstance(ended, SessionEnded), ended
    return ended


async def renew(client: MuxSession, handler: ClientSide, token: str, kind: str = "oidc") -> None:
    """Send another AUTH and wait until it is accepted."""
    client.authenticate(Auth(kind=kind, token=token))
    async with asyncio.timeout(30):
        await handler.accepted_again.wait()


def opened(client: MuxSession, target: str = "kubernetes") -> StreamIO:
    io = StreamIO()
    client.open(target, io)
    return io


async def used(client: MuxSession, data: bytes = b"x", target: str = "kubernetes") -> StreamIO:
    """A stream whose other end has echoed `data`."""
    io = opened(client, target)
    await io.write(data)
    assert await io.read_exactly(len(data)) == data
    return io


async def reset_of(io: StreamIO) -> int:
    """Read a stream until it is reset, and return the code."""
    try:
        async with asyncio.timeout(30):
            while await io.read():
                pass
    except StreamReset as reset:
        return reset.code
    raise AssertionError("the stream ended in order")


@asynccontextmanager
async def joined(
    sessions: Sessions,
    token: str | AuthMaker | None = "t",
    join_id: str = "j" * 16,
    via: str = "",
    *,
    alone: bool = True,
    wait: bool = True,
) -> AsyncIterator[tuple[MuxSession, ClientSide]]:
    """A client's session with `sessions` over end-to-end TLS, accepted or refused; `token` is sent in the first flight.

    With `alone` all others of `sessions` end with it. Without `wait` its token may not be decided about yet.
    """
    handler = ClientSide()
    client = MuxSession(Side.INITIATOR, Kind.SESSION, handler, label=join_id)
    if isinstance(token, str):
        client.authenticate(Auth(kind="oidc", token=token))
    make = None if isinstance(token, str) else token
    await _join(sessions, lambda: client.protocol(make), join_id, via)
    if wait:
        with contextlib.suppress(ArcbridgeError):
            await client.wait_established()
    try:
        yield client, handler
    finally:
        client.close()
        await client.wait_ended()
        if alone:
            await sessions.close()
        await asyncio.sleep(0.01)


async def resume(
    sessions: Sessions,
    client: MuxSession,
    token: str | AuthMaker = "t",
    join_id: str = "k" * 16,
    via: str = "",
    kind: str = "oidc",
    server: ServerContext = SERVER,
) -> None:
    """Give the client's session another connection. Raises what `wait_attached` raises."""
    auth = Auth(kind=kind, token=token) if isinstance(token, str) else token
    protocol = client.migration.start(auth, join_id)
    await _join(sessions, lambda: protocol, join_id, via, server)
    async with asyncio.timeout(10):
        await client.migration.wait()


async def _join(
    sessions: Sessions,
    protocol: Callable[[], asyncio.BaseProtocol],
    join_id: str,
    via: str,
    server: ServerContext = SERVER,
) -> asyncio.BaseTransport:
    """Return two connected sockets, as a relay joins them."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    serving = loop.create_task(sessions.serve(theirs, server, join_id, via=via, peer=Peer(server.spki, CA.pin)))
    transport, _ = await loop.create_connection(
        protocol, sock=ours, ssl=CLIENT, server_hostname="one.cluster.arcbridge"
    )
    await serving
    return transport


async def knock(sessions: Sessions, hello: Hello, token: str = "t", kind: str = "oidc") -> Goaway | AuthOk | None:
    """Send HELLO and AUTH by hand and return the answer (None: cut off); none of our client's code is used."""
    reader = asyncio.StreamReader()
    transport = await _join(sessions, lambda: asyncio.StreamReaderProtocol(reader), "knock", "")
    assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
    transport.write(
        frame(FrameType.HELLO, 0, hello.encode()) + frame(FrameType.AUTH, 0, Auth(kind=kind, token=token).encode())
    )
    try:
        async with asyncio.timeout(10):
            while True:
                word, _ = unpack_header(await reader.readexactly(HEADER_SIZE))
                body = await reader.readexactly(word >> 8)
                if word & 0xFF == FrameType.GOAWAY:
                    return Goaway.decode(body)
                if word & 0xFF == FrameType.AUTH_OK:
                    return AuthOk.decode(body)
    except asyncio.IncompleteReadError:
        return None
    finally:
        transport.abort()


def asks_for(client: MuxSession, **changes: Any) -> Hello:
    """The HELLO of a connection that wants the client's session, honest but for `changes`."""
    machine = client._machine
    fields: dict[str, Any] = {
        "version": VERSION,
        "least": VERSION,
        "features": "resume",
        "stream_window": DEFAULT.stream_window,
        "max_streams": DEFAULT.max_streams,
        "session_id": client.resumption.session_id,
        "resume_secret": client.resumption.secret,
        "received": machine.receiver.received,
        "sent": machine.sender.sent,
        "epoch": client.resumption.epoch + 1,
    }
    return Hello(**{**fields, **changes})


def make_sessions(
    authenticator: FakeAuthenticator,
    clock: Clock,
    targets: TcpTargets | None = None,
    *,
    audit: AuditLog | None = None,
    **settings: Any,
) -> tuple[Sessions, FakeProxy]:
    proxy = FakeProxy()
    found = targets or TcpTargets({}, audit or AuditLog(""))
    return Sessions(authenticator, proxy, found, instance="agent-1", clock=clock, **settings), proxy


class Held:
    """Alice's session with one stream that has been used, at an agent that also knows mallory."""

    def __init__(self, sessions: Sessions, proxy: FakeProxy, judge: FakeAuthenticator, clock: Clock) -> None:
        self.sessions, self.proxy, self.judge, self.clock = sessions, proxy, judge, clock
        self.client: MuxSession
        self.handler: ClientSide
        self.io = StreamIO()

    @property
    def old(self) -> AgentSession:
        (found,) = self.sessions._open
        return found

    def old_of(self, letter: str) -> AgentSession:
        (found,) = [one for one in self.sessions._open if one._join_id == letter * 16]
        return found

    async def cut(self) -> None:
        """Lose the connection and wait until both ends have noticed."""
        self.client.transport.abort()
        await self.until(lambda: self.client.state is State.DETACHED and self.sessions.detached == 1)

    until = staticmethod(until)

    async def echo(self, data: bytes) -> None:
        await self.io.write(data)
        assert await self.io.read_exactly(len(data)) == data

    async def finish(self) -> None:
        """End the stream at both ends."""
        self.io.finish()
        assert await self.io.read() == b""
        await until(lambda: self.old.streams == 0)

    async def renew(self, token: str) -> None:
        await renew(self.client, self.handler, token)

    async def refusal(self, token: str = "t") -> SessionEnded:
        """Try to resume the session, and return with what it ended."""
        with pytest.raises(SessionEnded) as caught:
            await resume(self.sessions, self.client, token)
        return caught.value


@asynccontextmanager
async def holding(**settings: Any) -> AsyncIterator[Held]:
    judge, clock = FakeAuthenticator(), Clock()
    judge.add("t", "alice", "dev")
    judge.add("m", "mallory")
    sessions, proxy = make_sessions(judge, clock, **settings)
    held = Held(sessions, proxy, judge, clock)
    async with joined(sessions, via="relay-1:443") as (held.client, held.handler):
        held.client.open("kubernetes", held.io)
        await held.echo(b"before")
        yield held

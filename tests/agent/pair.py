"""A client's session with the agent's side of it, over TCP in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from arcbridge.agent.authenticator import Authenticated
from arcbridge.agent.kube.proxy import Caller
from arcbridge.agent.sessions import Sessions
from arcbridge.agent.targets import TcpTargets
from arcbridge.errors import ArcbridgeError, Unauthenticated
from arcbridge.identity.claims import Identity
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.net.tls import inner_client_context, inner_server_context
from arcbridge.pki.authority import Authority
from arcbridge.wire.records import Auth, AuthOk
from arcbridge.wire.session import Kind, Side

CA = Authority.create("test")
LEAF = CA.issue_server(["one.cluster.arcbridge"])
SERVER, CLIENT = inner_server_context(LEAF.certificate_pem, LEAF.key_pem), inner_client_context(CA.certificate_pem)


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeAuthenticator:
    """Accepts the tokens it was given; `hold` makes it wait."""

    def __init__(self) -> None:
        self.known: dict[str, Authenticated | ArcbridgeError] = {}
        self.hold: asyncio.Event | None = None
        self.asked: list[str] = []

    def add(self, token: str, name: str, *groups: str, expires: float = 2000.0, token_mode: bool = False) -> None:
        identity = Identity(name, "", groups, f"i#{name}", "i", expires)
        self.known[token] = Authenticated(identity, token_mode)

    async def authenticate(self, auth: Auth) -> Authenticated:
        self.asked.append(auth.token)
        if self.hold is not None:
            await self.hold.wait()
        found = self.known.get(auth.token, Unauthenticated("not known"))
        if isinstance(found, ArcbridgeError):
            raise found
        return found


class FakeProxy:
    """Remembers who was served; echoes."""

    def __init__(self) -> None:
        self.callers: list[Caller] = []

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

    def auth_accepted(self, session: MuxSession, ok: AuthOk) -> None:
        self.accepted.append(ok)
        if len(self.accepted) > 1:
            self.accepted_again.set()


@asynccontextmanager
async def joined(
    sessions: Sessions, token: str | None = "t", join_id: str = "j" * 16
) -> AsyncIterator[tuple[MuxSession, ClientSide]]:
    """A client's session with `sessions` over end-to-end TLS; `token` is sent in the first flight."""
    loop = asyncio.get_running_loop()
    import socket

    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    handler = ClientSide()
    client = MuxSession(Side.INITIATOR, Kind.SESSION, handler)
    if token is not None:
        client.authenticate(Auth(kind="oidc", token=token))
    serving = loop.create_task(sessions.serve(theirs, SERVER, join_id))
    await loop.create_connection(client.protocol, sock=ours, ssl=CLIENT, server_hostname="one.cluster.arcbridge")
    await serving
    try:
        yield client, handler
    finally:
        client.close()
        await client.wait_ended()
        await sessions.close()
        await asyncio.sleep(0.01)


def make_sessions(
    authenticator: FakeAuthenticator, clock: Clock, targets: TcpTargets | None = None
) -> tuple[Sessions, FakeProxy]:
    from arcbridge.agent.audit import AuditLog

    proxy = FakeProxy()
    found = targets or TcpTargets({}, AuditLog(""))
    return Sessions(authenticator, proxy, found, instance="agent-1", clock=clock), proxy  # type: ignore[arg-type]

"""A gateway before a far side whose API server says whose session a request came by."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import aiohttp
from aiohttp import web

from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays
from arcbridge.client.serving.endpoint import https_context
from arcbridge.client.serving.gateway.caller_sessions import CallerSessions
from arcbridge.client.serving.gateway.caller_tokens import RELAY_HEADER, CallerTokens, GivenTokens
from arcbridge.client.serving.gateway.server import GatewayServer
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.client.session.trust import ClusterTrust
from arcbridge.mux.session import MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.net.backoff import Backoff
from arcbridge.net.loopback import listen_at
from arcbridge.pki.authority import Authority
from arcbridge.settings.config import LoginConfig
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.records import Auth
from tests.client.far_side import CLUSTER, CLUSTER_CA, RELAY_CA, FarSide

GATEWAY_CA = Authority.create("CA of the tests' gateway")
REFUSED = "refused-token"
"""A token that no agent takes."""


class NamingFarSide(FarSide):
    """An agent whose API server answers with the token of the session by which the request came."""

    def __init__(self) -> None:
        super().__init__()
        self.of_session: dict[MuxSession, str] = {}
        self.heads: list[bytes] = []
        """Heads of upgrades, as they came."""
        self.switched = asyncio.Event()
        """Whether an upgrade has been asked for."""
        self.switches = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        self.after_upgrade: list[bytes] = []
        """What came behind heads of upgrades."""
        self.resets: list[ResetCode] = []
        """What the next streams are reset with."""
        self.cuts: set[str] = set()
        """Paths whose answers break off."""
        self._api = web.Server(self._answer)

    def auth_received(self, session: MuxSession, auth: Auth) -> None:
        self.of_session[session] = auth.token
        if auth.token == REFUSED:
            self.auths.append(auth)
            session.close(GoawayCode.UNAUTHENTICATED, "the token is not accepted")
        else:
            super().auth_received(session, auth)

    def stream_opened(self, session: MuxSession, stream: StreamTransport, target: str) -> None:
        self.targets.append(target)
        self.streams.append(stream)
        if self.resets:
            stream.abort(self.resets.pop(0))
            return
        stream.attach(ApiStream(self, self.of_session[session]))

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        protocol = cast(Any, request.protocol)
        if request.path in self.cuts:
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b"the beginning")
            protocol.transport.abort()
            raise ConnectionResetError
        if request.path == "/full":
            return web.Response(status=413, text="too much")
        if request.path == "/moved":
            return web.Response(status=301, headers={"Location": "/api/v1/there"})
        document = {
            "caller": protocol.transport.caller,
            "method": request.method,
            "path": request.raw_path,
            "headers": {name.lower(): value for name, value in request.headers.items()},
            "body": (await request.read()).decode(),
        }
        return web.Response(text=json.dumps(document), content_type="application/json")


class ApiStream(asyncio.Protocol):
    """Decides by the first head of a stream: an upgrade is answered here, all else by aiohttp."""

    def __init__(self, far: NamingFarSide, caller: str) -> None:
        self._far = far
        self._caller = caller
        self._received = b""
        self._upgraded = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stream = cast(StreamTransport, transport)

    def data_received(self, data: bytes) -> None:
        far = self._far
        if self._upgraded:
            far.after_upgrade.append(data)
            self._stream.write(data)
            return
        self._received += data
        head, end, _ = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        if b"\r\nupgrade:" in head.lower():
            self._upgraded = True
            far.heads.append(head)
            far.switched.set()
            self._stream.write(far.switches)
            return
        # aiohttp's server finds the session's token at its transport.
        protocol = cast(Any, far._api())
        setattr(self._stream, "caller", self._caller)  # noqa: B010
        self._stream.set_protocol(protocol)
        protocol._tcp_keepalive = False
        protocol.connection_made(self._stream)
        protocol.data_received(self._received)


class Station:
    """A gateway on loopback, and what its callers need."""

    def __init__(self, far: NamingFarSide, directory: Path, *, one_token: bool = True, **options: Any) -> None:
        ca_file = directory / "relay-ca.pem"
        ca_file.write_text(RELAY_CA.certificate_pem)
        self.far = far
        self.relays = Relays([RelayAccess(far.address, ca_file=ca_file)], draw=lambda: 0.0)
        self.login = LoginConfig(one_token=one_token)
        self.trust = ClusterTrust(pin=CLUSTER_CA.pin)
        self.sessions = CallerSessions(self.make, **options)
        issued = GATEWAY_CA.issue_server(["127.0.0.1", "localhost"])
        sock = listen_at("127.0.0.1", 0)
        self.port = int(sock.getsockname()[1])
        context = https_context(issued.certificate_pem, issued.key_pem)
        self.server = GatewayServer([sock], context, self.sessions, one_token=one_token)
        self.tls = ssl.create_default_context(cadata=GATEWAY_CA.certificate_pem)
        self.url = f"https://127.0.0.1:{self.port}"

    def make(self, cluster: str, tokens: CallerTokens) -> SessionManager:
        return SessionManager(
            self.relays.with_own_record(cluster),
            cluster,
            GivenTokens(tokens, self.login),
            self.trust,
            backoff=Backoff(first=0.01, cap=0.05),
        )

    def path(self, rest: str = "/api/v1/pods", cluster: str = CLUSTER) -> str:
        return f"{self.url}/clusters/{cluster}{rest}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls)


def headers(token: str, of_relay: str = "") -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} | ({RELAY_HEADER: f"Bearer {of_relay}"} if of_relay else {})


@contextlib.asynccontextmanager
async def station(directory: Path, **options: Any) -> AsyncIterator[tuple[Station, aiohttp.ClientSession]]:
    """A gateway that serves, and a client of it that knows its CA."""
    async with NamingFarSide() as far:
        found = Station(far, directory, **options)
        found.server.start()
        try:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=found.tls)) as client:
                yield found, client
        finally:
            await found.server.close()
            await found.sessions.close()

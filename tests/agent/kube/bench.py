"""A caller, a session and the proxy in one process: real mux over TCP, a fake API server behind.

`Bench.stream()` opens a stream as a client process would; what is written on it is the raw HTTP of a test.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arcbridge.agent.accounts import Accounts
from arcbridge.agent.audit import AuditLog, AuditRecord
from arcbridge.agent.kube.apiserver import ApiServer, endpoint_of
from arcbridge.agent.kube.caller import Caller
from arcbridge.agent.kube.proxy import KubeProxy
from arcbridge.errors import ArcbridgeError
from arcbridge.identity.claims import Identity
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.settings.config import KubernetesConfig
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk
from arcbridge.wire.session import Kind, Side
from arcbridge.wire.stream import Stream
from tests.support.eventually import until
from tests.support.fake_apiserver import FakeApiServer
from tests.support.stream_io import StreamIO

ALICE = Identity("alice", "u-1", ("dev", "ops"), "https://issuer#alice", "https://issuer", 4e9)

Reachable = tuple[FakeApiServer, ApiServer]

PODS = "/api/v1/namespaces/default/pods"


class RecordedAudit(AuditLog):
    """Keeps records instead of writing them."""

    def __init__(self) -> None:
        super().__init__("")
        self.kept: list[AuditRecord] = []
        self.arrived = asyncio.Condition()

    def write(self, record: AuditRecord) -> None:
        super().write(record)
        json.loads(record.line(record.started))
        self.kept.append(record)

    def lines(self) -> list[dict[str, Any]]:
        """The records as they would be written."""
        return [json.loads(record.line(record.started)) for record in self.kept]

    async def wait(self, count: int) -> list[AuditRecord]:
        """Wait until there are `count` records."""
        await until(lambda: len(self.kept) >= count)
        return self.kept


@dataclass
class Response:
    """A response: status, headers as (lower-case name, value), body."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name.lower()]

    @property
    def status_object(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.body)
        assert document["kind"] == "Status"
        assert document["apiVersion"] == "v1"
        assert document["code"] == self.status
        return document


class Wire:
    """The caller's end of one stream, with just enough HTTP to read answers."""

    def __init__(self, io: StreamIO) -> None:
        self.io = io
        self.buffer = b""

    @property
    def transport(self) -> StreamTransport:
        assert self.io.transport is not None
        return self.io.transport

    async def send(self, data: bytes) -> None:
        await self.io.write(data)

    async def until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            data = await self.io.read()
            if not data:
                raise EOFError(f"ended with {self.buffer[:200]!r}")
            self.buffer += data
        found, _, self.buffer = self.buffer.partition(mark)
        return found + mark

    async def exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            data = await self.io.read()
            if not data:
                raise EOFError("ended in the middle")
            self.buffer += data
        found, self.buffer = self.buffer[:size], self.buffer[size:]
        return found

    async def rest(self) -> bytes:
        """Read everything up to the stream's end in order."""
        while data := await self.io.read():
            self.buffer += data
        found, self.buffer = self.buffer, b""
        return found

    async def head(self) -> tuple[int, list[tuple[str, str]]]:
        lines = (await self.until(b"\r\n\r\n")).decode().split("\r\n")
        headers = []
        for line in lines[1:-2]:
            name, _, value = line.partition(":")
            headers.append((name.lower(), value.strip()))
        return int(lines[0].split(" ")[1]), headers

    async def answer(self, method: str = "GET") -> Response:
        async with asyncio.timeout(10):
            status, headers = await self.head()
            names = dict(headers)
            body = b""
            if method == "HEAD" or status in (204, 304):
                pass
            elif names.get("transfer-encoding") == "chunked":
                while size := int((await self.until(b"\r\n")).strip(), 16):
                    body += (await self.exactly(size + 2))[:-2]
                await self.exactly(2)
            elif "content-length" in names:
                body = await self.exactly(int(names["content-length"]))
            return Response(status, headers, body)


class _AgentSide(BaseHandler):
    """The agent's side of a session: each of its streams is the caller's."""

    def __init__(self, proxy: KubeProxy, caller: Caller, ended: list[ArcbridgeError]) -> None:
        self._proxy, self._caller, self._ended = proxy, caller, ended

    def auth_received(self, session: MuxSession, auth: Auth) -> None:
        user = self._caller.identity.username
        session.accept_auth(AuthOk(session_id=b"1" * 16, resume_secret=b"2" * 16, subject=user, expires_in=600))

    def stream_opened(self, session: MuxSession, stream: StreamTransport, target: str) -> None:
        self._proxy.serve(stream, self._caller)

    def session_ended(self, session: MuxSession, error: ArcbridgeError) -> None:
        self._ended.append(error)


@dataclass
class CallersSession:
    """A session of one caller at a proxy, in this process: the client's side, and the agent's."""

    caller: Caller
    client: MuxSession
    agents: list[MuxSession] = field(default_factory=list)
    ended: list[ArcbridgeError] = field(default_factory=list)


@asynccontextmanager
async def session_of(proxy: KubeProxy, caller: Caller, limits: Limits = DEFAULT) -> AsyncIterator[CallersSession]:
    """Make a session over TCP, and end it with the block."""
    made = CallersSession(caller, MuxSession(Side.INITIATOR, Kind.SESSION, BaseHandler(), limits=limits))

    def accept() -> asyncio.BaseProtocol:
        handler = _AgentSide(proxy, caller, made.ended)
        made.agents.append(MuxSession(Side.ACCEPTOR, Kind.SESSION, handler, limits=limits))
        return made.agents[-1].protocol()

    loop = asyncio.get_running_loop()
    server = await loop.create_server(accept, "127.0.0.1", 0)
    made.client.authenticate(Auth(kind="oidc", token="t"))
    await loop.create_connection(made.client.protocol, "127.0.0.1", server.sockets[0].getsockname()[1])
    await made.client.wait_established()
    try:
        yield made
    finally:
        # A reset can overtake the client's GOAWAY; the agent's session would then wait for another connection.
        for session in (made.client, *made.agents):
            session.close()
            await session.wait_ended()
        server.close()


@dataclass
class Bench:
    api: FakeApiServer
    proxy: KubeProxy
    audit: RecordedAudit
    caller: Caller
    client: MuxSession
    ended: list[ArcbridgeError]
    agents: list[MuxSession]
    """The agent's sides of the session."""

    def agent_streams(self) -> list[Stream]:
        """Return the streams that the agent has not seen the end of."""
        return [stream for session in self.agents for stream in session._machine.streams.values()]

    def stream(self) -> Wire:
        io = StreamIO()
        self.client.open("kubernetes", io)
        return Wire(io)

    async def begin(self, data: bytes) -> Wire:
        """Open a stream, and send bytes on it."""
        wire = self.stream()
        await wire.send(data)
        return wire

    async def ask(self, head: str, body: bytes = b"", *, method: str = "GET") -> Response:
        """Send one request on a fresh stream."""
        wire = await self.begin(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        return await wire.answer(method)

    async def get(self, path: str, *headers: str, method: str = "GET") -> Response:
        return await self.ask("\n".join([f"{method} {path} HTTP/1.1", "Host: k", *headers]), method=method)


class Member:
    """A session of an account, with as many streams as a test says."""

    def __init__(self, streams: int = 0) -> None:
        self.streams = streams
        self.ended = 0
        """How often its streams were ended."""
        self.held: list[float] = []
        """For how long it was told to move nothing."""

    def end_streams(self) -> None:
        self.ended += 1

    def hold(self, seconds: float) -> None:
        self.held.append(seconds)


def caller_of(identity: Identity, accounts: Accounts | None = None) -> Caller:
    """Return a caller with an account in which one session is."""
    found = accounts if accounts is not None else Accounts()
    return Caller("0123456789abcdef", identity, found.enter(identity, Member()))


@asynccontextmanager
async def reachable(directory: Path, clock: Callable[[], float] = time.monotonic) -> AsyncIterator[Reachable]:
    """A fake API server, and the agent's way to it."""
    async with FakeApiServer.serving(directory) as fake:
        config = KubernetesConfig(server=fake.url, ca_file=fake.ca_file, token_file=fake.token_file)
        api = ApiServer(endpoint_of(config, {}), clock=clock)
        try:
            yield fake, api
        finally:
            await api.close()


@asynccontextmanager
async def running(directory: Path, **config: Any) -> AsyncIterator[Bench]:
    """A bench; `config` overrides the agent's kubernetes settings, `limits` those of users, and `clock` their day's."""
    accounts = Accounts(config.pop("limits", None), clock=config.pop("clock", time.time))
    async with FakeApiServer.serving(directory, client_ca=config.pop("client_ca", None)) as fake:
        settings: dict[str, Any] = {
            "server": fake.url,
            "ca_file": fake.ca_file,
            "token_file": fake.token_file,
            **config,
        }
        api = ApiServer(endpoint_of(KubernetesConfig(**settings), {}))
        audit = RecordedAudit()
        proxy = KubeProxy(api, audit)
        caller = caller_of(ALICE, accounts)
        try:
            async with session_of(proxy, caller) as made:
                yield Bench(fake, proxy, audit, caller, made.client, made.ended, made.agents)
        finally:
            await proxy.close()
            await api.close()
            await asyncio.sleep(0.01)

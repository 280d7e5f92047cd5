"""What honest and hostile processes know of the organisation, and how either of them gets a session.

Everything goes through the real modules of the client's side (join, session TLS, mux), and to loopback alone: a place
with another address is refused. What a caller does with its session is the caller's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
import ssl
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from arcbridge.errors import ArcbridgeError, JoinRefused, SessionEnded, StreamReset
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.net.join import JoinCode, client_join
from arcbridge.net.session_tls import SessionStart
from arcbridge.net.tls import ALPN_HTTP, ALPN_JOIN, RelayTrust, inner_client_context, outer_client_context
from arcbridge.pki.names import cluster_server_name
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, JoinReply, JoinRequest
from arcbridge.wire.session import Introduction, Kind, Side

TARGET = "kubernetes"
OBJECT = "/api/v1/namespaces/default"
CONNECT_DEADLINE, HANDSHAKE_DEADLINE = 10.0, 10.0


@dataclass(frozen=True)
class Person:
    """A user with both tokens."""

    name: str
    access: str = field(repr=False)
    cluster: str = field(repr=False)


@dataclass(frozen=True)
class Place:
    """Where the relay is and who asks; made by the runner, sent to each process as one line of JSON."""

    relay_port: int
    relay_ca: str
    cluster: str
    people: tuple[Person, ...]
    """Those of this process."""
    endpoint_port: int = 0
    """The local endpoint of an honest person's client process."""
    endpoint_ca: str = ""
    endpoint_certificate: str = ""
    endpoint_key: str = field(default="", repr=False)
    join_token: str = field(default="", repr=False)
    """Enrols agents of the cluster, often."""
    cluster_ca: str = ""
    agent_certificate: str = ""
    agent_key: str = field(default="", repr=False)
    """An agent's credential of another cluster, for control connections that have nothing behind them."""
    agent_ca: str = ""
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        if not ipaddress.ip_address(self.host).is_loopback:
            raise SystemExit("hostile callers go to loopback alone")

    def line(self) -> str:
        """The place as a line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, line: str) -> Place:
        """Read a line of JSON."""
        document: dict[str, Any] = json.loads(line)
        document["people"] = tuple(Person(**person) for person in document["people"])
        return cls(**document)

    # Contexts are made once: a thousand connections do not parse a CA a thousand times.

    @cached_property
    def https(self) -> ssl.SSLContext:
        """TLS to the relay's HTTP API."""
        return outer_client_context(RelayTrust(self.relay_ca), ALPN_HTTP)

    @cached_property
    def joining(self) -> ssl.SSLContext:
        """TLS to the relay for a join."""
        return outer_client_context(RelayTrust(self.relay_ca), ALPN_JOIN)

    async def connect(self, port: int, source: str = "") -> socket.socket:
        """Return a connected socket; `source` is the address of this end."""
        sock = socket.socket()
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if source:
                sock.bind((source, 0))
            async with asyncio.timeout(CONNECT_DEADLINE):
                await asyncio.get_running_loop().sock_connect(sock, (self.host, port))
        except BaseException:
            sock.close()
            raise
        return sock

    async def join(
        self, person: Person, *, source: str = "", instance: str = "", token: str | None = None
    ) -> tuple[socket.socket, JoinReply]:
        """Join the cluster as a person; the socket is raw then, and the caller's."""
        sock = await self.connect(self.relay_port, source)
        request = JoinRequest(
            role="client", cluster=self.cluster, token=person.access if token is None else token, instance=instance
        )
        return sock, await client_join(sock, self.joining, self.host, request)

    async def establish(
        self, person: Person, *, source: str = "", limits: Limits = DEFAULT, authenticate: bool = True
    ) -> MuxSession:
        """Join, then make the session: established, or with `authenticate` False only begun."""
        sock, reply = await self.join(person, source=source)
        session = MuxSession(
            Side.INITIATOR,
            Kind.SESSION,
            BaseHandler(),
            limits=limits,
            label=reply.join_id,
            introduction=Introduction(software="arcbridge bench"),
        )
        if authenticate:
            session.authenticate(Auth(token=person.cluster))
        try:
            await self.carry(sock, reply, session.protocol())
            if authenticate:
                async with asyncio.timeout(HANDSHAKE_DEADLINE):
                    await session.wait_established()
        except BaseException:
            session.abort()
            sock.close()
            raise
        return session

    async def carry(self, sock: socket.socket, reply: JoinReply, connection: Any) -> None:
        """Make the end-to-end TLS over a joined socket."""
        start = SessionStart(sock, inner_client_context(reply.cluster_ca), cluster_server_name(self.cluster))
        await start.finish(connection, HANDSHAKE_DEADLINE)


def request(path: str, *fields: str) -> bytes:
    """A GET as kubectl sends it."""
    lines = [f"GET {path} HTTP/1.1", "Host: kubernetes", "Accept: application/json", *fields]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


class Answer(asyncio.Protocol):
    """One GET on a stream of its own; `word` is done with how it ended: an HTTP code, or the RESET's name.

    `finish`: FIN follows the request at once. `stalled`: nothing is read, until the owner resumes reading. `sips`: each
    delivery is the last until then.
    """

    def __init__(
        self,
        payload: bytes = b"",
        *,
        finish: bool = False,
        stalled: bool = False,
        sips: bool = False,
        told: Callable[[str], None] | None = None,
    ) -> None:
        self._payload = payload
        self._finish = finish
        self._stalled = stalled
        self._sips = sips
        self._told = told
        self._received = bytearray()
        self._code = ""
        self._length = -1
        self.stream: StreamTransport | None = None
        self.word: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, StreamTransport)
        self.stream = transport
        if self._stalled:
            transport.pause_reading()
        if self._payload:
            transport.write(self._payload)
        if self._finish:
            transport.write_eof()

    def data_received(self, data: bytes) -> None:
        if self._sips and self.stream is not None:
            self.stream.pause_reading()
        if self.word.done():
            return
        self._received += data
        if not self._code:
            head, separator, rest = bytes(self._received).partition(b"\r\n\r\n")
            if not separator:
                return
            self._code = head.split(b" ", 2)[1].decode("latin-1")
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    self._length = int(line.partition(b":")[2])
            self._received = bytearray(rest)
        if self._length >= 0 and len(self._received) >= self._length:
            self._end(self._code)
            if self.stream is not None:
                self.stream.close()

    def eof_received(self) -> bool:
        self._end(self._code or "ended without an answer")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, StreamReset):
            self._end(f"RESET {named(ResetCode, exc.code)}")
        elif exc is not None:
            self._end(word(exc))
        else:
            self._end(self._code or "ended without an answer")

    def _end(self, how: str) -> None:
        if not self.word.done():
            self.word.set_result(how)
            if self._told is not None:
                self._told(how)


async def get(session: MuxSession, path: str = OBJECT, deadline: float = 10.0) -> str:
    """GET over a fresh stream; how it ended."""
    answer = Answer(request(path))
    session.open(TARGET, answer)
    try:
        async with asyncio.timeout(deadline):
            return await answer.word
    except TimeoutError:
        if answer.stream is not None:
            answer.stream.abort()
        return "no answer in time"


def word(error: BaseException) -> str:
    """What an error is called in a result: the code that the other end gave, or the kind of failure."""
    if isinstance(error, JoinRefused):
        return f"join {named(JoinCode, error.code)}"
    if isinstance(error, SessionEnded):
        return f"GOAWAY {named(GoawayCode, error.code)}"
    if isinstance(error, StreamReset):
        return f"RESET {named(ResetCode, error.code)}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    cause = error.__cause__
    if isinstance(error, ArcbridgeError) and cause is not None and not isinstance(cause, ArcbridgeError):
        return f"{type(error).__name__} ({type(cause).__name__})"
    return type(error).__name__


def named(codes: Any, number: int) -> str:
    """The name of a code, or the number of one that this version does not know."""
    with contextlib.suppress(ValueError):
        return str(codes(number).name)
    return str(number)

"""An API server that records bytes: raw asyncio, TLS, no HTTP library, so that what is checked is what was sent.

It reads one request after the other from each connection, keeps the raw head and the body, and answers with what a
test put at the request's path; without a route it answers a small JSON object. A route is bytes (written as they
are), or a coroutine function that gets the `Exchange` and does what it likes to the socket.

    async with FakeApiServer.serving() as api:
        api.routes["/api/v1/pods"] = reply(200, b"{}")
        ...
        assert api.requests[0].header("impersonate-user") == [b"alice"]
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trustme

Route = bytes | Callable[["Exchange"], Awaitable[None]]


def reply(status: int, body: bytes = b"", *headers: str, content_type: str = "application/json") -> bytes:
    """A complete response with a Content-Length."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", f"Content-Type: {content_type}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(status: int, *chunks: bytes, headers: tuple[str, ...] = (), end: bool = True) -> bytes:
    """A chunked response; without `end` its last chunk is missing."""
    lines = [f"HTTP/1.1 {status} X", "Transfer-Encoding: chunked", "Content-Type: application/json", *headers]
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body + (b"0\r\n\r\n" if end else b"")


@dataclass
class Request:
    """One request as it came: `head` with its final blank line, `body` without its framing."""

    head: bytes
    body: bytes = b""
    complete: bool = False
    """Whether the whole body came."""
    connection: int = 0
    client_certificate: bool = False

    @property
    def method(self) -> str:
        return self.head.split(b" ", 1)[0].decode()

    @property
    def target(self) -> str:
        return self.head.split(b" ", 2)[1].decode()

    @property
    def lines(self) -> list[tuple[bytes, bytes]]:
        """(name as spelt, value) in order."""
        out = []
        for line in self.head.split(b"\r\n")[1:-2]:
            name, _, value = line.partition(b":")
            out.append((name, value.strip()))
        return out

    def header(self, name: str) -> list[bytes]:
        """All values of a header, whatever its spelling."""
        return [value for key, value in self.lines if key.lower() == name.lower().encode()]


@dataclass
class Exchange:
    """One request and the socket it came on."""

    request: Request
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """Ends the connection without an answer, as a crash does."""
        self.writer.transport.abort()


def closing(data: bytes) -> Route:
    """A route that sends bytes, and then closes the connection in order."""

    async def route(exchange: Exchange) -> None:
        await exchange.send(data)
        exchange.writer.close()

    return route


async def dying(exchange: Exchange) -> None:
    """A route that crashes."""
    exchange.reset()


class Held:
    """A route that sends `first` at once, and `rest` when a test has set `release`."""

    def __init__(self, rest: bytes, *, first: bytes = b"") -> None:
        self.release = asyncio.Event()
        self._first, self._rest = first, rest

    async def __call__(self, exchange: Exchange) -> None:
        if self._first:
            await exchange.send(self._first)
        await self.release.wait()
        await exchange.send(self._rest)


class Unanswered:
    """A route that sends `first` and reads until the agent is gone; then `gone` is set."""

    def __init__(self, first: bytes = b"") -> None:
        self.gone = asyncio.Event()
        self._first = first

    async def __call__(self, exchange: Exchange) -> None:
        if self._first:
            await exchange.send(self._first)
        try:
            await exchange.reader.read()
        finally:
            self.gone.set()


_SELF_CHECKS = frozenset(
    (
        "/version",
        "/apis/authentication.k8s.io/v1/selfsubjectreviews",
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
        "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews",
    )
)


def _is_self_check(request: Request) -> bool:
    """Whether an agent asks about itself (`agent.self_checks`): as itself, and for no user."""
    return (
        request.target in _SELF_CHECKS
        and request.header("user-agent") == [b"arcbridge-agent"]
        and request.header("authorization") in ([], [b"Bearer agent-own-token"])
        and not request.header("impersonate-user")
    )


@dataclass
class FakeApiServer:
    """See the module's docstring. `ca_file`, `token_file` and `url` are what an agent is configured with."""

    directory: Path
    requests: list[Request] = field(default_factory=list)
    """Those of users and of reviews about them; an agent that runs looks after itself besides."""
    routes: dict[str, Route] = field(default_factory=dict)
    allow_impersonation: set[tuple[str, str, str]] | None = None
    """(user, resource, name) that a SubjectAccessReview allows; None: all."""
    read_body: bool = True
    """Without it a route is called as soon as the head is there."""
    connections: int = 0
    url: str = ""
    port: int = 0
    _writers: dict[asyncio.StreamWriter, int] = field(default_factory=dict)
    """Of the connections that are open, with their numbers."""
    _server: asyncio.Server | None = None

    @property
    def ca_file(self) -> Path:
        return self.directory / "ca.pem"

    @property
    def token_file(self) -> Path:
        return self.directory / "token"

    @classmethod
    @asynccontextmanager
    async def serving(cls, directory: Path, *, client_ca: trustme.CA | None = None) -> AsyncIterator[FakeApiServer]:
        """Serves on 127.0.0.1 until the block ends; files go to `directory`."""
        fake = cls(directory)
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(fake.ca_file))
        fake.token_file.write_text("agent-own-token\n")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ca.issue_cert("localhost", "127.0.0.1").configure_cert(context)
        if client_ca is not None:
            client_ca.configure_trust(context)
            context.verify_mode = ssl.CERT_OPTIONAL
        server = await asyncio.start_server(fake._serve, "127.0.0.1", 0, ssl=context)
        fake._server = server
        fake.port = server.sockets[0].getsockname()[1]
        fake.url = f"https://127.0.0.1:{fake.port}"
        try:
            yield fake
        finally:
            fake.stop()

    def stop(self) -> None:
        """Stops listening and cuts all connections."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    def unused(self) -> list[asyncio.StreamWriter]:
        """Return the connections that are open and have brought no request."""
        used = {request.connection for request in self.requests}
        return [writer for writer, number in self._writers.items() if number not in used]

    @property
    def last(self) -> Request:
        return self.requests[-1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self._writers[writer] = number
        certificate = bool(writer.get_extra_info("peercert"))
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                request = Request(head, connection=number, client_certificate=certificate)
                if not _is_self_check(request):
                    self.requests.append(request)
                if self.read_body:
                    await self._read_body(request, reader)
                route = self._route(request)
                exchange = Exchange(request, reader, writer)
                if isinstance(route, bytes):
                    await exchange.send(route)
                else:
                    await route(exchange)
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, ssl.SSLError):
            pass  # the agent went away, or a test cut it
        finally:
            self._writers.pop(writer, None)
            writer.transport.abort()

    def _route(self, request: Request) -> Route:
        path = request.target.partition("?")[0]
        if path in self.routes:
            return self.routes[path]
        if path == "/apis/authorization.k8s.io/v1/subjectaccessreviews":
            return self._review(request)
        return reply(200, b'{"kind":"Fake"}')

    def _review(self, request: Request) -> bytes:
        spec = json.loads(request.body)["spec"]
        attributes = spec["resourceAttributes"]
        asked = (spec["user"], attributes["resource"], attributes["name"])
        allowed = self.allow_impersonation is None or asked in self.allow_impersonation
        return reply(201, json.dumps({"status": {"allowed": allowed}}).encode())

    async def _read_body(self, request: Request, reader: asyncio.StreamReader) -> None:
        if request.header("transfer-encoding"):
            while True:
                size = int((await reader.readuntil(b"\r\n")).strip(), 16)
                chunk = await reader.readexactly(size + 2)
                if size == 0:
                    break
                request.body += chunk[:-2]
        else:
            length = int((request.header("content-length") or [b"0"])[0])
            while len(request.body) < length:
                data = await reader.read(min(65536, length - len(request.body)))
                if not data:
                    raise asyncio.IncompleteReadError(request.body, length)
                request.body += data
        request.complete = True


def impersonation_of(request: Request) -> dict[str, list[bytes]]:
    """The impersonation headers of a recorded request, by lower-case name."""
    out: dict[str, list[bytes]] = {}
    for name, value in request.lines:
        if re.match(rb"(?i)impersonate", name):
            out.setdefault(name.lower().decode(), []).append(value)
    return out

"""The connections of the relay's HTTP API: their TLS, how long one lives, how many requests it may send, how its body
is read.

aiohttp parses the requests and finds their handlers. Every answer of the application, those of aiohttp's router and of
an `Expect` header too, passes the bounds of its connection and of its address (docs/threats.md#L50). A connection on
which no credential was found good has a life and a number of requests; each wait for its peer has a deadline, and while
it waits the listener may close it to make room (`admission`). Whatever aiohttp cannot parse is answered and logged in
our words (docs/threats.md#A3). Invariant: where another protocol than HTTP was negotiated, no byte of the peer is read.
"""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import structlog
from aiohttp import web

from arcbridge.loop_shares import LoopTime
from arcbridge.net.sockets import reset
from arcbridge.net.tls import ALPN_HTTP
from arcbridge.net.tlspipe import HANDSHAKE_DEADLINE
from arcbridge.net.tlstransport import accepted_tls
from arcbridge.relay.admission import Ticket
from arcbridge.relay.counters import Counters
from arcbridge.relay.http.answers import ApiRefusal, Handler, answer_of, error_answer, internal_answer, refuse_page
from arcbridge.relay.http_heads import FIELD_LIMIT, MAX_HEADERS, HeadParser
from arcbridge.untrusted_json import read_json

BODY_LIMIT = 64 * 1024
"""Bytes of a request's body: a request and a CA certificate of 16 KiB each, escaped as JSON, fit twice."""

BODY_DEADLINE = 10.0
"""Seconds for a body to arrive."""

HEAD_DEADLINE = 10.0
"""Seconds from the end of the TLS handshake to the first complete request head; aiohttp itself would wait for ever."""

KEEPALIVE = 30.0
"""Seconds that an idle connection is kept: clients ask rarely, and each one held counts against the relay's caps."""

ANONYMOUS_LIFE = 60.0
"""Seconds that a connection lives on which no credential was found good, or since the last one was."""

ANONYMOUS_REQUESTS = 100
"""Requests that such a connection may send."""

ANSWER_DEADLINE = 15.0
"""Seconds beyond its life that a connection has to end the request that is under way: a body has `BODY_DEADLINE`. An
answer that the relay closes behind has as many to reach a peer with a slow link."""

log = structlog.get_logger("arcbridge.relay")


class HttpApiServer:
    """Serves an application on connections that the relay's listener has accepted: makes the protocol of each.

    server = HttpApiServer(build_app(…)); await server.start(); …; await server.close()
    """

    def __init__(self, app: web.Application, pages: frozenset[str] = frozenset()) -> None:
        """`pages`: paths that judge by themselves what a browser sends for a page."""
        self._pages = pages
        # handler_cancellation: a vanished client's handler ends with it.
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None, handler_cancellation=True)
        self.malformed = 0
        """Requests that were no HTTP; read by the metrics."""
        self.slow = 0
        """Connections that sent no request in time."""
        self.outlived = 0
        """Connections that were closed because their life without a credential was over."""

    async def start(self) -> None:
        """Run the application's start-up; nothing listens yet."""
        await self._runner.setup()
        server = self._runner.server
        if server is not None:
            # No middleware: aiohttp answers an `Expect` header before it calls one.
            server.request_handler = partial(_bounded, handler=server.request_handler, pages=self._pages)

    async def close(self, deadline: float = 5.0) -> None:
        """Let requests that run finish for `deadline` seconds, then close all connections."""
        if self._runner.server is not None:
            self._runner.server.pre_shutdown()
            await self._runner.server.shutdown(deadline)
        await self._runner.cleanup()

    def __call__(self, ticket: Ticket) -> asyncio.Protocol:
        """Return the protocol of one connection, which has the place of `ticket`; after `start`."""
        # Made here and not by aiohttp's Server: that one drops all limits when it does not know one of them.
        assert self._runner.server is not None
        return _ApiConnection(self, self._runner.server, ticket)


class _ApiConnection(web.RequestHandler):
    """One connection, with our words for what the parser refuses.

    Without a credential it has a life and a number of requests, counted anew from each request whose token or
    certificate was found good. While it waits for its peer the listener may close it to make room (`admission`).
    """

    __slots__ = ("_anonymous_requests", "_head_timer", "_life_timer", "_over", "_owner", "_working", "loop_time",
                 "ticket")  # fmt: skip

    def __init__(self, owner: HttpApiServer, server: web.Server, ticket: Ticket) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=KEEPALIVE,
            # It would log request lines and user agents as they came. None is what aiohttp's own AppRunner passes.
            access_log=None,  # type: ignore[arg-type]
            max_line_size=FIELD_LIMIT,
            max_field_size=FIELD_LIMIT,
            max_headers=MAX_HEADERS,
            read_bufsize=BODY_LIMIT,
            lingering_time=2.0,
            auto_decompress=False,
        )
        self._parser = HeadParser(self._parser)  # type: ignore[assignment, arg-type]
        self._owner = owner
        self.ticket = ticket
        self.loop_time = ticket.loop_time
        """Pays for the loop's time until a user does: the address."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._life_timer: asyncio.TimerHandle | None = None
        self._anonymous_requests = 0
        """Requests since a credential was found good."""
        self._working = False
        """A request is under way."""
        self._over = False
        """The answer to the request that is under way is the last one."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self._head_timer = loop.call_later(HEAD_DEADLINE, self._too_slow)
        self._life_timer = loop.call_later(ANONYMOUS_LIFE, self._life_over)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.head_arrived()
        if self._life_timer is not None:
            self._life_timer.cancel()
            self._life_timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.loop_time.run(partial(super().data_received, data))

    def begin(self) -> None:
        """Note that a request has arrived, for which the relay works."""
        self.head_arrived()
        self._working = True
        self._anonymous_requests += 1
        self.ticket.works()

    def proved(self) -> None:
        """Note that the request under way came with a credential that is good."""
        self._anonymous_requests = 0
        self._over = False
        self._live_for(ANONYMOUS_LIFE)

    def allow_time(self, seconds: float) -> None:
        """Give the connection `seconds` for the answer under way, which is a long one; then it is over.

        The relay waits for the peer meanwhile, so the listener may close the connection to make room.
        """
        self._over = True
        self.ticket.waits()
        self._live_for(seconds)

    def stream(self, seconds: float) -> None:
        """Give the connection `seconds` for the answer under way, to a person who is known; then it is over. It leaves
        its place to strangers, and the caller bounds such answers."""
        self._over = True
        self.ticket.leave()
        self._live_for(seconds)

    def _live_for(self, seconds: float) -> None:
        if self._life_timer is not None:
            self._life_timer.cancel()
            self._life_timer = asyncio.get_running_loop().call_later(seconds, self._life_over)

    def is_last(self, answer: web.StreamResponse) -> bool:
        """Return whether the connection ends with `answer`: its life is over, or a stranger was refused.

        A stranger who tries again pays for a new connection, whose number the address bounds. So the cost of verifying
        bad credentials is bounded, and no address is locked out by the failures of a neighbour.
        """
        anonymous = self._anonymous_requests > 0
        return self._over or self._anonymous_requests >= ANONYMOUS_REQUESTS or (anonymous and answer.status >= 400)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        # A peer that does not read its answer is one that the relay waits for.
        self.ticket.waits()
        try:
            return await self.loop_time.steps(super().finish_response(request, resp, start_time))
        finally:
            self._working = False
            self.ticket.waits()

    def _life_over(self) -> None:
        self._life_timer = None
        if self.transport is None:
            return
        if self._working and not self._over:
            self._over = True
            self._life_timer = asyncio.get_running_loop().call_later(ANSWER_DEADLINE, self._life_over)
            return
        self._owner.outlived += 1
        if self._working:
            self.transport.abort()
        else:
            self.force_close()

    def head_arrived(self) -> None:
        """Leave the connection to aiohttp's own keepalive timer: the first request is there."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if self.transport is not None:
            self._owner.slow += 1
            self.transport.abort()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer what aiohttp could not parse or handle. `message` and `exc` may quote the peer: neither is shown."""
        self.head_arrived()
        if status < 500:
            self._owner.malformed += 1
            log.debug("malformed request", source=address_of(request), reason=type(exc).__name__)
        else:
            log.error("request failed", source=address_of(request), reason=type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun: it can only be cut off")
        if status < 500:
            answer = error_answer(
                HTTPStatus.BAD_REQUEST, "the request is not well-formed HTTP, or the request's head is too long"
            )
        else:
            answer = internal_answer()
        answer.headers["Server"] = "arcbridge"
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **kw: Any) -> None:
        log.error("connection failed", reason=type(kw.get("exc_info")).__name__)

    def log_debug(self, *args: Any, **kw: Any) -> None:
        pass  # its texts quote exceptions, which quote the peer; what matters is counted above


async def _bounded(request: web.BaseRequest, handler: Handler, pages: frozenset[str]) -> web.StreamResponse:
    """Answer a request within the bounds of its connection, which ends with its last answer."""
    connection = _connection(request)
    connection.begin()
    answer = await connection.loop_time.steps(answer_of(request, partial(_in_turn, handler=handler, pages=pages)))
    if connection.is_last(answer):
        answer.force_close()
    return answer


async def _in_turn(request: web.BaseRequest, handler: Handler, pages: frozenset[str]) -> web.StreamResponse:
    """Answer a request once its address has its turn in the loop; the connection may have to make room meanwhile."""
    connection = _connection(request)
    connection.ticket.waits()
    await take_turn(connection.loop_time, "the requests of this address take")
    connection.ticket.works()
    if request.path not in pages:
        refuse_page(request)
    return await handler(request)


async def take_turn(payer: LoopTime, what: str) -> None:
    """Wait while nothing is worked on for `payer`, which takes too much of the event loop. Raises `ApiRefusal` where it
    was slowed down again and again; `what` is the beginning of its sentence."""
    now = time.monotonic()
    if now < payer.refused_until:
        wait = math.ceil(payer.refused_until - now)
        raise ApiRefusal(
            HTTPStatus.TOO_MANY_REQUESTS,
            f"{what} more of this relay's time than one may while others wait: wait {wait} s and try again",
            retry_after=wait,
        )
    if now < payer.held_until:
        await asyncio.sleep(payer.held_until - now)


async def read_body(
    request: web.Request, *names: str, optional: tuple[str, ...] = (), strict: bool = False
) -> list[str]:
    """Return the named strings of a JSON body, optional ones empty where they are missing.

    Other members are ignored, so that newer agents may send more; with `strict` they are refused.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiRefusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the body without compression")
    too_large = ApiRefusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {BODY_LIMIT // 1024} KiB")
    if (request.content_length or 0) > BODY_LIMIT:
        raise too_large
    data = bytearray()
    ticket = _connection(request).ticket
    ticket.waits()
    try:
        async with asyncio.timeout(BODY_DEADLINE):
            async for chunk in request.content.iter_any():
                data += chunk
                if len(data) > BODY_LIMIT:
                    raise too_large
        ticket.works()
    except TimeoutError as error:
        raise ApiRefusal(HTTPStatus.REQUEST_TIMEOUT, "the body did not arrive in time") from error
    except web.RequestPayloadError as error:
        raise ApiRefusal(HTTPStatus.BAD_REQUEST, "the body is not well-formed HTTP") from error
    try:
        document = read_json(data, BODY_LIMIT)
    except ValueError:
        # Not chained: a JSONDecodeError carries the whole document, and with it the join token.
        raise ApiRefusal(HTTPStatus.BAD_REQUEST, "the body is not JSON") from None
    values = [document.get(name) for name in names] if isinstance(document, dict) else []
    values += [document.get(name, "") for name in optional] if values else []
    if not values or not all(isinstance(value, str) for value in values):
        raise ApiRefusal(HTTPStatus.BAD_REQUEST, f"the body must be a JSON object with the strings {', '.join(names)}")
    if strict and not document.keys() <= {*names, *optional}:
        raise ApiRefusal(
            HTTPStatus.BAD_REQUEST, "the body has a member that this relay does not know; it may be of another version"
        )
    return [str(value) for value in values]


def address_of(request: web.BaseRequest) -> str:
    """Return the IP of the peer; behind a balancer, which only the listener knows, that of the connection's origin."""
    return _connection(request).ticket.address


def note_proved(request: web.Request) -> None:
    """Note that this request's credential is good."""
    _connection(request).proved()


def allow_time(request: web.Request, seconds: float) -> None:
    """Give a stranger's connection `seconds` for the answer to this request, which is its last one."""
    _connection(request).allow_time(seconds)


def keep_stream(request: web.Request, seconds: float) -> None:
    """Give the answer to this request of a known person `seconds`; its connection counts as no stranger's any more."""
    _connection(request).stream(seconds)


def _connection(request: web.BaseRequest) -> _ApiConnection:
    return cast(_ApiConnection, request.protocol)


@dataclass(eq=False, repr=False)
class HttpHandler:
    """The listener's handler of the HTTP API; the listener calls `serve`.

    Connecting authenticates no peer, so the connection holds its ticket until it ends: the places for unauthenticated
    peers bound the API's connections, too. The protocol gets the ticket, because it decides when to end the connection.
    """

    context: Callable[[], ssl.SSLContext]
    protocol: Callable[[Ticket], asyncio.Protocol]
    counters: Counters

    async def serve(self, sock: socket.socket, ticket: Ticket) -> None:
        """Serve one connection until it is over; the socket is closed then."""
        connection = _AlpnGate(partial(self.protocol, ticket))
        try:
            # Our own transport: the loop's takes 256 KiB of a stranger's KeyUpdates at a time (docs/threats.md#J34).
            await accepted_tls(
                sock,
                self.context(),
                connection,
                deadline=HANDSHAKE_DEADLINE,
                payer=ticket.loop_time,
                close_deadline=ANSWER_DEADLINE,
            )
        except (OSError, TimeoutError) as error:
            self.counters.rejected["handshake"] += 1
            log.debug("http connection refused", source=ticket.address, reason=type(error).__name__)
            sock.close()
            return
        except BaseException:
            reset(sock)
            raise
        try:
            await connection.over
        finally:
            connection.abort()


class _AlpnGate(asyncio.Protocol):
    """Stands before the API's protocol: lets it begin only where HTTP was negotiated, and tells when it is over."""

    def __init__(self, protocol: Callable[[], asyncio.Protocol]) -> None:
        self._make = protocol
        self._inner: asyncio.Protocol | None = None
        self._transport: asyncio.Transport | None = None
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once the connection is lost."""

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        tls = transport.get_extra_info("ssl_object")
        if tls is None or tls.selected_alpn_protocol() not in (None, ALPN_HTTP):
            # The client offered HTTP and then negotiated another protocol (docs/threats.md#J13): not a byte is read.
            self._transport.abort()
            return
        self._inner = self._make()
        for name in ("data_received", "eof_received", "pause_writing", "resume_writing"):
            setattr(self, name, getattr(self._inner, name))
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._inner is not None:
            self._inner.connection_lost(exc)
        if not self.over.done():
            self.over.set_result(None)

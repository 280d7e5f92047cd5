"""The gateway's HTTPS server: which request is for which cluster, and what each connection may cost.

`https://HOST/clusters/NAME/PATH` is PATH at the API server of the cluster NAME, with the caller's tokens
(`caller_tokens`); `/livez` and `/readyz` need none. aiohttp parses; a head has a deadline and a size, and connections
have a bound, beyond which the one that has idled longest is closed. Every refusal is a `metav1.Status`. Invariant:
nothing that a caller sent is quoted in a log, nor in an answer to another caller.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

import structlog
from aiohttp import StreamReader, web

from arcbridge.client.serving.gateway.caller_sessions import CallerSessions
from arcbridge.client.serving.gateway.caller_tokens import caller_tokens
from arcbridge.client.serving.gateway.exchange import BUFFER, MAX_LINE, exchange
from arcbridge.client.serving.gateway.upgrade import upgrade
from arcbridge.client.session.refusal import RETRY_SOON, status_body
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.mux.session import MuxSession
from arcbridge.mux.splice import reset_transport
from arcbridge.net.descriptors import explain
from arcbridge.net.sockets import ACCEPT_PAUSE, AcceptLoop, reset, tune
from arcbridge.net.tlstransport import accept_tls
from arcbridge.pki.names import check_cluster_name

MAX_HEAD: Final = 128 * 1024
"""Bytes of a request's head."""
HEAD_DEADLINE: Final = 10.0
"""Seconds for a head that has begun."""
KEEPALIVE: Final = 90.0
"""Seconds that a connection may idle: as long as Go's client keeps one, which then closes first."""
CONNECTIONS: Final = 4096
"""Connections at a time, handshakes included. Each costs about 60 KiB."""
GRACE: Final = 2.0
"""Seconds for requests under way at the end of the process."""
_END: Final = b"\r\n\r\n"
_SILENT: Final = logging.Logger("arcbridge.client.http")  # not in the tree of loggers: aiohttp's messages quote headers
_SILENT.addHandler(logging.NullHandler())

log = structlog.get_logger("arcbridge.client")


class UnknownPath(ArcbridgeError):
    """No cluster can be meant by the path of a request."""

    status_code = HTTPStatus.NOT_FOUND
    reason = "NotFound"


class _BadRequest(ArcbridgeError):
    """The request is not well-formed, or too long."""

    status_code = HTTPStatus.BAD_REQUEST
    reason = "BadRequest"


class GatewayServer(web.Server):
    """Serves on listening, non-blocking sockets, which it owns: `start`, then `close`."""

    def __init__(
        self, sockets: Sequence[socket.socket], context: ssl.SSLContext, sessions: CallerSessions, *, one_token: bool
    ) -> None:
        """`one_token`: one token may serve the relay and the cluster."""
        super().__init__(self._answer, handler_cancellation=True)
        self.context = context
        """For new connections; may be replaced."""
        self._sessions = sessions
        self._one_token = one_token
        self._accepting = AcceptLoop(sockets, self._accepted, self._exhausted)
        self.open: dict[GatewayConnection, asyncio.Transport] = {}
        """The connections, the one that was used last at the end."""
        self.requests: Counter[str] = Counter()
        """By how they went: `passed_on`, `upgraded`, `refused`."""

    def start(self) -> None:
        """Accept from now on."""
        self._accepting.start()

    async def close(self) -> None:
        """Stop accepting, and end what is open."""
        self._accepting.close()
        self.pre_shutdown()
        await self.shutdown(GRACE)
        for transport in list(self.open.values()):
            transport.abort()

    def _accepted(self, sock: socket.socket, _host: str) -> None:
        if len(self.open) >= CONNECTIONS:
            idle = next((one for one in self.open if not one.busy), None)
            if idle is None:
                reset(sock)
                return
            self.open.pop(idle).abort()
        tune(sock, user_timeout=False)  # callers may stop reading for as long as they like, and a dead one is noticed
        connection = GatewayConnection(self)

        def handshake_over(error: BaseException | None) -> None:
            if error is not None:
                self.open.pop(connection, None)

        self.open[connection] = accept_tls(sock, self.context, connection, on_handshake=handshake_over)

    def _exhausted(self, _listening: socket.socket, error: OSError, again: bool) -> None:
        if not again:  # once, not at each try for as long as it lasts
            log.warning("cannot accept", reason=explain(error), retry_in=ACCEPT_PAUSE)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, GatewayConnection)
        connection.begin(request)
        try:
            if request.path in ("/livez", "/readyz", "/healthz"):
                return web.Response(text="ok\n")
            response = await self._pass_on(request, connection)
            self.requests["passed_on"] += 1
            return response
        except ArcbridgeError as error:
            self.requests["refused"] += 1
            answer = refusal(error)
            if "Upgrade" in request.headers:
                answer.force_close()  # what may have come behind it is not read
            return answer
        finally:
            connection.request_over()

    async def _pass_on(self, request: web.BaseRequest, connection: GatewayConnection) -> web.StreamResponse:
        cluster, target = target_of(request.raw_path)
        tokens = caller_tokens(request.headers, one_token=self._one_token)
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        async with self._sessions.session(tokens, cluster, str(peer[0]) if peer else "") as session:
            connection.busy = True
            if "Upgrade" not in request.headers:
                return await exchange(request, session, cluster, target, f"/clusters/{cluster}")
            self.requests["upgraded"] += 1
            await _upgrade(request, session, cluster, target)
            raise ConnectionResetError("the upgraded connection is over")


async def _upgrade(request: web.BaseRequest, session: MuxSession, cluster: str, target: str) -> None:
    answerable = False
    try:
        await upgrade(request, session, cluster, target)
    except ArcbridgeError as error:
        answerable = True
        error.retry_after = None  # the connection ends with the answer
        raise
    finally:
        if not answerable:
            # Its end went to the splice; aiohttp's protocol must hear of it too, to free what it holds.
            asyncio.get_running_loop().call_soon(request.protocol.connection_lost, None)


class GatewayConnection(web.RequestHandler):
    """One connection of a caller, or of a tool that sends the requests of many."""

    __slots__ = ("_body", "_gateway", "_head", "_head_timer", "_in_head", "_tail", "busy")

    def __init__(self, gateway: GatewayServer) -> None:
        super().__init__(
            gateway,
            loop=asyncio.get_running_loop(),
            tcp_keepalive=False,
            access_log=None,  # type: ignore[arg-type]  # aiohttp tests it for truth
            logger=_SILENT,
            keepalive_timeout=KEEPALIVE,
            lingering_time=5.0,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            max_headers=1000,
            read_bufsize=BUFFER,
            auto_decompress=False,
        )
        self._gateway = gateway
        self.busy = False
        """A request is under way that has a session; one that waits for a session makes room as if it idled."""
        self._in_head = True
        """What comes next is of a head, or of what is left of `_body` behind an early answer."""
        self._body: StreamReader | None = None
        """That of the last request."""
        self._head = 0
        """Bytes of the head that is arriving."""
        self._tail = b""
        """The last bytes of it."""
        self._head_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Parse, within the bounds of a head."""
        if self._in_head and data and (self._body is None or self._body.is_eof()):
            self._head += len(data)
            if _END in self._tail + data:
                self._end_head()
            elif self._head > MAX_HEAD:
                self._end_head()
                self.force_close()
                return
            else:
                self._tail = (self._tail + data)[-3:]
                if self._head_timer is None:
                    self._head_timer = self._loop.call_later(HEAD_DEADLINE, self.force_close)
        super().data_received(data)

    def _end_head(self) -> None:
        self._in_head, self._head, self._tail = False, 0, b""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def begin(self, request: web.BaseRequest) -> None:
        """Note that a request has come."""
        self._end_head()  # of one that came behind another
        self._body = request.content

    def request_over(self) -> None:
        """Note that its answer is complete: another head may come."""
        self.busy = False
        self._in_head = True
        if (transport := self._gateway.open.pop(self, None)) is not None:
            self._gateway.open[self] = transport

    def connection_lost(self, exc: BaseException | None) -> None:
        self._end_head()
        self._gateway.open.pop(self, None)
        super().connection_lost(exc)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer what could not be parsed, or a failure of ours; quotes nothing of either."""
        if isinstance(exc, ConnectionError):
            raise exc  # the answer has begun: it can only be cut off
        if request.writer.output_size > 0:
            if isinstance(self.transport, asyncio.Transport):
                reset_transport(self.transport)
            log.error("request failed", reason=type(exc).__name__)
            raise ConnectionResetError("the answer was cut")
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            log.error("request failed", reason=type(exc).__name__)
            answer = refusal(ArcbridgeError("the gateway could not serve the request; its log names the failure"))
        else:
            self._gateway.requests["refused"] += 1
            answer = refusal(_BadRequest("the request is not well-formed HTTP/1.1, or its head is too long"))
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **kw: Any) -> None:
        log.error("connection failed", reason=type(kw.get("exc_info")).__name__)


def target_of(raw_path: str) -> tuple[str, str]:
    """Return the cluster of a request, and path and query at its API server. Raises UnknownPath."""
    path, question, query = raw_path.partition("?")
    empty, prefix, name, *rest = [*path.split("/", 3), "", "", ""][:4]
    try:
        if empty or prefix != "clusters" or "#" in raw_path:
            raise ConfigError("another path")
        return check_cluster_name(name), f"/{rest[0]}{question}{query}"
    except ConfigError as error:
        raise UnknownPath("there is nothing here; the path of a request begins with /clusters/NAME/") from error


def refusal(error: ArcbridgeError) -> web.Response:
    """Return the answer to a request that does not reach its cluster."""
    headers = {"Cache-Control": "no-store", "Server": "arcbridge"}
    if error.status_code == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None and error.retry_after <= RETRY_SOON:
        headers["Retry-After"] = str(error.retry_after)
    return web.Response(
        body=status_body(error), status=error.status_code, headers=headers, content_type="application/json"
    )

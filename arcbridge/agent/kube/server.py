"""The general entrance: aiohttp's HTTP/1.1 server over a stream reads requests of every kind.

Only its reading is used: answers are written to the stream as they come from the API server (`exchange`), or as a
Status of the agent's own. aiohttp's own `handle_error` quotes the offending bytes, a bearer token among them, to the
log and to the caller; the one here answers a Status. Two deadlines are added: a head that has begun must be complete
within 10 s, and after an early answer the rest of a body is read for 5 s at most, then the stream ends in order.
Invariant: nothing of a malformed request is quoted anywhere.

The private names of `RequestHandler` that are used here are each pinned by a test.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.web_protocol import RequestHandler

from arcbridge.agent.kube.authorize import StreamContext
from arcbridge.agent.kube.exchange import Exchange
from arcbridge.agent.kube.framing import MAX_HEAD_LINE, MAX_HEADERS
from arcbridge.agent.kube.status import RequestRefusal, bad_request, status_answer
from arcbridge.mux.stream import StreamTransport

HEAD_DEADLINE = 10.0
LINGER = 5.0
KEEPALIVE = 3630.0
"""aiohttp's default: longer than any client keeps an idle connection, so the caller closes first."""
MAX_HEAD = 1 << 20
"""Bytes of a whole request head, as in Go's net/http."""
READ_SIZE = 64 * 1024
"""aiohttp pauses the stream at twice this: 128 KiB of a body wait at most, then credit is withheld."""

_SILENT = logging.Logger("arcbridge.agent.http")  # not in the tree of loggers: aiohttp's messages quote headers
_SILENT.addHandler(logging.NullHandler())


class AnsweredResponse(web.StreamResponse):
    """Stands for an answer whose bytes were written to the stream: aiohttp must not write one of its own."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._keeps_alive = keep_alive

    @property
    def keep_alive(self) -> bool | None:
        """Whether the stream carries another request."""
        return self._keeps_alive

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Write nothing."""
        return None

    async def write_eof(self, data: bytes | bytearray | memoryview = b"") -> None:
        """Write nothing."""


class KubeServer(web.Server):
    """Makes one protocol per stream; `handler(protocol, request)` answers each request.

    `refused(stream, refusal)` is told of heads that never became a request. `connected_since(stream)` says when the
    caller got its present connection (monotonic seconds, infinity while there is none): without one no deadline of the
    caller's runs.
    """

    def __init__(
        self,
        handler: Callable[[KubeProtocol, web.BaseRequest], Coroutine[Any, Any, web.StreamResponse]],
        refused: Callable[[StreamContext, RequestRefusal], None],
        connected_since: Callable[[StreamContext], float],
    ) -> None:
        super().__init__(_dispatch, handler_cancellation=True)
        self.handler = handler
        self.refused = refused
        self.connected_since = connected_since

    def protocol(self, context: StreamContext) -> KubeProtocol:
        """Return the protocol of one stream."""
        return KubeProtocol(self, context, asyncio.get_running_loop())

    def __call__(self) -> RequestHandler:
        raise TypeError("use protocol(context)")


async def _dispatch(request: web.BaseRequest) -> web.StreamResponse:
    protocol = request.protocol
    assert isinstance(protocol, KubeProtocol)
    handling = protocol.server.handler(protocol, request)
    return await protocol.context.caller.account.loop_time.steps(handling)


class KubeProtocol(RequestHandler):
    """One stream's HTTP/1.1 conversation."""

    __slots__ = (
        "_head",
        "_head_began",
        "_head_timer",
        "context",
        "early",
        "exchange",
        "on_early",
        "server",
        "upgrade_seen",
    )

    def __init__(self, server: KubeServer, context: StreamContext, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            tcp_keepalive=False,
            access_log=None,  # type: ignore[arg-type]  # aiohttp tests it for truth
            logger=_SILENT,
            keepalive_timeout=KEEPALIVE,
            lingering_time=LINGER,
            max_line_size=MAX_HEAD_LINE,
            max_field_size=MAX_HEAD_LINE,
            max_headers=MAX_HEADERS,
            read_bufsize=READ_SIZE,
            auto_decompress=False,
        )
        self.server = server
        self.context = context
        self.exchange: Exchange | None = None
        """The request under way, while it is at the API server."""
        self.early = False
        """Bytes arrived behind an upgrade request before it was answered."""
        self.on_early: Callable[[], None] | None = None
        """Called when `early` is set."""
        self.upgrade_seen = False
        """An upgrade was asked for: no request can follow on this stream."""
        self._head = bytearray()
        """The head that is arriving, as far as it has."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_began = 0.0

    @property
    def stream(self) -> StreamTransport:
        """The caller's stream. Raises ConnectionResetError once it is lost."""
        transport = self.transport
        if not isinstance(transport, StreamTransport):
            raise ConnectionResetError("the caller is gone")
        return transport

    def answer(
        self,
        refusal: RequestRefusal,
        *,
        request_id: str = "",
        close: bool = False,
        method: str = "GET",
        path: str = "",
    ) -> AnsweredResponse:
        """Write a Status to the caller; with `close` the stream ends behind it."""
        self.stream.owed = False
        self.stream.write(status_answer(refusal, request_id=request_id, close=close, method=method, path=path))
        return AnsweredResponse(keep_alive=not close)

    async def drained(self) -> None:
        """Wait until the caller takes bytes. Raises ConnectionError once the stream is lost."""
        await self._drain_helper()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.exchange is not None:
            self.exchange.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.exchange is not None:
            self.exchange.resume()

    def start(self) -> Coroutine[Any, Any, None]:
        """Return what aiohttp runs as the stream's task; each of its steps is charged to the user."""
        return self.context.caller.account.loop_time.steps(super().start())

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def force_close(self) -> None:
        """aiohttp closes here; while an answer is under way that would make a cut look like an end."""
        transport = self.transport
        if transport is not None and self._request_in_progress:
            transport.abort()
        super().force_close()

    def data_received(self, data: bytes) -> None:
        """Parses; called with nothing by aiohttp itself, to go on after a pause."""
        if self.upgrade_seen and data:
            self._mark_early()
            return
        if data and self._awaits_head():
            self._head += data
            if len(self._head) > MAX_HEAD:
                self._give_up(RequestRefusal(431, "the head of the request is too long"))
                return
        before = len(self._messages)
        super().data_received(data)
        new = list(self._messages)[before:]
        if any(not hasattr(message, "headers") for message, _ in new):
            self._break_body()
        if new:
            head, self._head = self._head.lstrip(b"\r\n"), bytearray()
            if any("Upgrade" in getattr(message, "headers", ()) for message, _ in new):
                self.upgrade_seen = True
                # aiohttp may keep what follows a head out of reach, so the bytes themselves are looked at: the
                # upgrade's head, alone, and nothing behind it.
                alone = len(new) == 1 and not self._message_tail
                if not alone or head.find(b"\r\n\r\n") != len(head) - 4:
                    self._mark_early()
        self._watch_head()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a head that could not be parsed, or a failure of the agent's; quotes nothing of either."""
        if isinstance(exc, ConnectionError):
            raise exc  # the stream has ended
        if isinstance(exc, LineTooLong) or "Too many headers" in str(exc):
            refusal = RequestRefusal(431, "the request's line or one of its headers is too long, or there are too many")
        elif isinstance(exc, HttpProcessingError):
            refusal = bad_request("the request is not well-formed HTTP/1.1")
        else:
            refusal = RequestRefusal(500, "the agent failed; its log has the cause")
            self._loop.call_exception_handler({"message": "a request handler failed", "exception": exc})
        self.server.refused(self.context, refusal)
        return self.answer(refusal, close=True)

    # -- inside -----------------------------------------------------------------------------------------------

    def _break_body(self) -> None:
        """Wake the reader of a body whose framing is broken: aiohttp only queues an error behind the request."""
        request = self._current_request
        if request is not None and not request.content.is_eof() and request.content.exception() is None:
            request.content.set_exception(web.RequestPayloadError("the body's framing is broken"))

    def _mark_early(self) -> None:
        self.early = True
        if self.on_early is not None:
            self.on_early()

    def _awaits_head(self) -> bool:
        """Return whether what comes next begins or continues a head: no request is queued, under way, or has a body
        left."""
        if self._messages:
            return False
        return self._request_count == 0 or (self._waiter is not None and not self._waiter.done())

    def _watch_head(self) -> None:
        """A head that has begun and is not complete gets a deadline; a body or an idle connection has none."""
        if not self._head or not self._awaits_head():
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_began = time.monotonic()
            self._head_timer = self._loop.call_later(HEAD_DEADLINE, self._head_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        counted_from = max(self._head_began, self.server.connected_since(self.context))
        left = min(counted_from + HEAD_DEADLINE - time.monotonic(), HEAD_DEADLINE)
        if counted_from > self._head_began and left > 0:  # the connection was away meanwhile
            self._head_timer = self._loop.call_later(left, self._head_late)
            return
        self._give_up(bad_request(f"the head of a request was not complete within {HEAD_DEADLINE:g} seconds"))

    def _give_up(self, refusal: RequestRefusal) -> None:
        """End a connection on which no request can come any more."""
        self.server.refused(self.context, refusal)
        self.upgrade_seen = True  # what still arrives is dropped
        if self.transport is not None:
            self.answer(refusal, close=True)
        self.force_close()

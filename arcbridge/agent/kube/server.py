"""The general entrance: aiohttp's HTTP/1.1 server over a stream reads requests of every kind.

Only its reading is used: answers are written to the stream as they come from the API server (`exchange`), or as a
Status of the agent's own. aiohttp's own `handle_error` quotes the offending bytes, a bearer token among them, to the
log and to the caller; the one here answers a Status. Two deadlines are added: a head that has begun must be complete
within 10 s, a large one within 5 s, and after an early answer the rest of a body is read for 5 s at most, then the
stream ends in order.

The parser gets one request at a time: what comes behind one that is under way stays in front of it. Bytes of a head
that is not complete, and of what waits behind a request, count for the user and the process (`Account.arriving`); above
that a head of more than 4 KiB waits, its stream grants no credit, and at the head's deadline, or when more of them wait
than may, it is refused (docs/threats.md#H22). Invariant: nothing of a malformed request is quoted anywhere.

The private names of `RequestHandler` that are used here are each pinned by a test.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.web_protocol import RequestHandler

from arcbridge.agent.accounts import Limit
from arcbridge.agent.kube.attempt import Attempt, ProxyContext
from arcbridge.agent.kube.caller import StreamContext
from arcbridge.agent.kube.exchange import Exchange
from arcbridge.agent.kube.status import RequestRefusal, bad_request, json_answer, status_answer
from arcbridge.mux.stream import StreamTransport
from arcbridge.wire.frames import ResetCode
from arcbridge.wire.limits import DEFAULT

HEAD_DEADLINE = 10.0
LARGE_HEAD = 16 * 1024
"""Bytes from which on a head that is not complete must be so within LARGE_HEAD_DEADLINE seconds."""
LARGE_HEAD_DEADLINE = 5.0
LINGER = 5.0
KEEPALIVE = 3630.0
"""aiohttp's default: longer than any client keeps an idle connection, so the caller closes first."""
MAX_HEAD_LINE = 64 * 1024
"""Bytes of the request line and of each header: tokens with groups and long selectors exceed the usual 8 KiB."""
MAX_HEADERS = 1000
"""Header lines: 400 `--as-group` are real; Go's own bound is 1 MiB of head."""
MAX_HEAD = 128 * 1024
"""Bytes of a whole request head, unless it acts with MANY_GROUPS (`--as-group`)."""
MAX_HEAD_WITH_GROUPS = 1 << 20
"""The same of such a head, as in Go's net/http."""
MANY_GROUPS = 16
FREE_HEAD = 4 * 1024
"""Bytes of a head that never wait for others: more than kubectl's has."""
MAX_BEHIND = 16 * 1024
"""Bytes behind a request that is under way from which on the stream grants no credit."""
PIECE = 16 * 1024
"""Bytes that the parser gets at once where it is not known how many belong to one request."""
WAITING = DEFAULT.stream_window
"""Bytes that a stream which grants no credit counts for: as much may come."""
RETRY = 0.1
"""Seconds after which a head that waits looks whether there is room."""
READ_SIZE = 64 * 1024
"""aiohttp pauses the stream at twice this: 128 KiB of a body wait at most, then credit is withheld."""

_END = b"\r\n\r\n"
"""Of a head."""
_GROUP = b"\nimpersonate-group:"
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
    """Makes one protocol per stream; `handler(protocol, request)` answers each request."""

    def __init__(
        self,
        handler: Callable[[KubeProtocol, web.BaseRequest], Coroutine[Any, Any, web.StreamResponse]],
        context: ProxyContext,
    ) -> None:
        super().__init__(_dispatch, handler_cancellation=True)
        self.handler = handler
        self._context = context

    def refuse(self, stream: StreamContext, reason: BaseException, method: str = "") -> RequestRefusal:
        """Record a head that never became a request, for a refusal or a defect; return the answer."""
        attempt = Attempt(self._context, stream, method)
        refusal = reason if isinstance(reason, RequestRefusal) else attempt.fail(reason, "a request handler failed")
        attempt.refuse(refusal)
        attempt.finish()
        return refusal

    @staticmethod
    def connected_since(stream: StreamContext) -> float:
        """Return when the caller got its present connection (monotonic seconds, infinity while there is none): without
        one no deadline of the caller's runs."""
        return stream.caller.connected_since

    def protocol(self, context: StreamContext) -> KubeProtocol:
        """Return the protocol of one stream."""
        return KubeProtocol(self, context, self._loop)

    def __call__(self) -> RequestHandler:
        raise TypeError("use protocol(context)")


async def _dispatch(request: web.BaseRequest) -> web.StreamResponse:
    protocol = request.protocol
    assert isinstance(protocol, KubeProtocol)
    handling = protocol.server.handler(protocol, request)
    try:
        return await protocol.context.caller.account.loop_time.steps(handling)
    finally:
        protocol.request_over()


class KubeProtocol(RequestHandler):
    """One stream's HTTP/1.1 conversation."""

    __slots__ = (
        "_body",
        "_body_left",
        "_busy",
        "_charged",
        "_groups",
        "_head",
        "_head_began",
        "_head_deadline",
        "_head_tail",
        "_head_timer",
        "_held_back",
        "_line_end",
        "_retry",
        "_searched",
        "_unread",
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
        self._head = 0
        """Bytes of the head that is arriving which the parser has."""
        self._head_tail = b""
        """The last three of them."""
        self._groups = 0
        """Headers `Impersonate-Group` among them, and in what was searched of `_unread`."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_began = 0.0
        self._head_deadline = 0.0
        """Seconds that the head may take, by the timer that runs."""
        self._unread = bytearray()
        """What the parser has not got: it is behind a request that is under way, or of a head that waits."""
        self._searched = 0
        """Bytes of `_unread` that are of a head and do not end it."""
        self._line_end = b""
        """The last bytes of the request line, as far as it has come."""
        self._busy = False
        """A request has come whose answer is not complete."""
        self._body: StreamReader | None = None
        """The body of the newest request."""
        self._body_left = -1
        """Bytes of it that have not come; -1: its end is in its framing."""
        self._held_back = False
        """No credit is granted because of what is in `_unread`."""
        self._charged = 0
        """Bytes that count in the user's account."""
        self._retry: asyncio.TimerHandle | None = None

    @property
    def stream(self) -> StreamTransport:
        """The caller's stream. Raises ConnectionResetError once it is lost."""
        transport = self.transport
        if not isinstance(transport, StreamTransport):
            raise ConnectionResetError("the caller is gone")
        return transport

    def answer(
        self, refusal: RequestRefusal, *, request_id: str = "", close: bool = False, method: str = "GET", path: str = ""
    ) -> AnsweredResponse:
        """Write a Status to the caller; with `close` the stream ends behind it."""
        self.stream.owed = False
        self.stream.write(status_answer(refusal, request_id=request_id, close=close, method=method, path=path))
        return AnsweredResponse(keep_alive=not close)

    def answer_json(self, code: int, document: bytes, *, request_id: str) -> AnsweredResponse:
        """Write the agent's own answer to a question that it reads, and end the stream behind it."""
        self.stream.owed = False
        self.stream.write(json_answer(code, document, request_id=request_id))
        return AnsweredResponse(keep_alive=False)

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
        self._forget()
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
        elif not data or (not self._unread and (self._body_takes(data) or self._is_one_head(data))):
            self._feed(data)
        else:
            self._unread += data
            self._read_on()

    def request_over(self) -> None:
        """What came behind the request is read as soon as aiohttp waits for the next one."""
        self._busy = False
        if self._unread:
            self._read_soon()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Refuse a head that could not be parsed, or a failure of the agent's; quotes nothing of either."""
        if isinstance(exc, ConnectionError):
            raise exc  # the stream has ended
        if isinstance(exc, LineTooLong) or "Too many headers" in str(exc):
            refusal = RequestRefusal(431, "the request's line or one of its headers is too long, or there are too many")
        elif isinstance(exc, HttpProcessingError):
            refusal = bad_request("the request is not well-formed HTTP/1.1")
        else:
            return self.answer(self.server.refuse(self.context, exc or TimeoutError(), request.method), close=True)
        return self.answer(self.server.refuse(self.context, refusal), close=True)

    # -- inside -----------------------------------------------------------------------------------------------

    def _break_body(self) -> None:
        """Wake the reader of a body whose framing is broken: aiohttp only queues an error behind the request, which may
        not have begun."""
        body = self._body
        if body is not None and not body.is_eof() and body.exception() is None:
            body.set_exception(web.RequestPayloadError("the body's framing is broken"))

    def _body_takes(self, data: bytes) -> bool:
        """Return whether all of `data` belongs to the body that is arriving, as almost all bytes do."""
        body, most = self._body, PIECE if self._body_left < 0 else self._body_left
        return body is not None and not body.is_eof() and len(data) <= most

    def _is_one_head(self, data: bytes) -> bool:
        """Return whether `data` is one whole head and nothing else, as almost all heads come."""
        size = len(data)
        return size <= FREE_HEAD and not self._head and data.find(_END) == size - len(_END) and self._awaits_head()

    def _read_on(self) -> None:
        """Give the parser what it may have of what came: up to the end of a head, or of a body."""
        while self._unread and not self.upgrade_seen and self.transport is not None:
            count = self._next_piece()
            if not count:
                break
            piece = bytes(self._unread[:count])
            del self._unread[:count]
            self._searched = 0
            self._feed(piece)
        if self._unread and self.upgrade_seen:
            self._unread.clear()
            self._mark_early()
        self._settle()

    def _next_piece(self) -> int:
        """Return how many bytes the parser may have now; 0: none, or the connection is given up."""
        waiting = len(self._unread)
        if not self._awaits_head():
            body = self._body
            if body is None or body.is_eof():
                return 0
            return min(waiting, PIECE if self._body_left < 0 else self._body_left)
        # Only what is new is searched, with as much before it as may belong to it: it may come byte by byte.
        before = self._head_tail if not self._searched else b""
        across = (before + self._unread[: len(_END) - 1]).find(_END)
        at = self._unread.find(_END, max(0, self._searched - len(_END) + 1))
        complete = across >= 0 or at >= 0
        count = across + len(_END) - len(before) if across >= 0 else at + len(_END) if complete else waiting
        self._groups += self._unread[max(0, self._searched - len(_GROUP) + 1) : count].lower().count(_GROUP)
        self._searched = count
        if self._head + count > (MAX_HEAD_WITH_GROUPS if self._groups >= MANY_GROUPS else MAX_HEAD):
            self._give_up(RequestRefusal(431, "the head of the request is too long"))
            return 0
        if complete or self._head + count <= FREE_HEAD or not self.context.caller.account.arriving.full:
            return count
        return 0

    def _feed(self, data: bytes) -> None:
        """Let aiohttp parse."""
        awaited = self._awaits_head()
        if awaited and data and not self._is_http(data):
            self._give_up(bad_request("the request is not well-formed HTTP/1.1"))
            return
        head = self._head_tail + data
        before = len(self._messages)
        super().data_received(data)
        new = list(self._messages)[before:]
        if new:
            self._busy = True
            self._head, self._head_tail, self._line_end, self._groups = 0, b"", b"", 0
            upgrade = False
            for message, body in new:
                headers = getattr(message, "headers", None)
                if headers is None:  # aiohttp's own, for what it could not parse
                    self._break_body()
                    headers = {}
                self._body, length = body, headers.get("Content-Length", "")
                self._body_left = int(length) if length.isdecimal() else -1
                upgrade = upgrade or "Upgrade" in headers
            if upgrade:
                self.upgrade_seen = True
                # aiohttp may keep what follows a head out of reach, so the bytes themselves are looked at: the
                # upgrade's head, alone, and nothing behind it.
                alone = len(new) == 1 and not self._message_tail
                if not awaited or not alone or head.find(_END) != len(head) - len(_END):
                    self._mark_early()
        elif awaited:
            self._head += len(data)
            self._head_tail = head[-3:]
        elif self._body_left > 0:
            self._body_left -= len(data)
        self._watch_head()

    def _is_http(self, data: bytes) -> bool:
        """Return whether the request line may be HTTP's: aiohttp takes RTSP and ICE for it as well."""
        if not self._line_end.endswith(b"\n"):
            if not self._line_end:
                data = data.lstrip(b"\r\n")  # which HTTP lets stand before a request
            line, newline, _ = data.partition(b"\n")
            self._line_end = (self._line_end + line)[-12:] + newline
        return not self._line_end.endswith(b"\n") or self._line_end.rstrip().endswith((b" HTTP/1.1", b" HTTP/1.0"))

    def _settle(self) -> None:
        """Count what is held, and grant credit or none."""
        account = self.context.caller.account
        waits = bool(self._unread) and self._awaits_head()
        hold = waits or len(self._unread) > MAX_BEHIND
        if hold and not self._buffer_paused:  # aiohttp may have resumed meanwhile
            self._pause_reading_for_buffer()
        elif self._held_back and not hold:
            self._resume_reading_for_buffer()
        self._held_back = hold
        self._charge(self._head + (max(WAITING, len(self._unread)) if hold else len(self._unread)))
        if hold and account.holds_too_much:
            if waits:
                self._give_up(self._too_many_heads())
            elif isinstance(self.transport, StreamTransport):
                self.transport.abort(ResetCode.LIMIT)
        else:
            self._read_soon()
        self._watch_head()

    def _charge(self, count: int) -> None:
        if count != self._charged:
            self.context.caller.account.arriving.add(count - self._charged)
            self._charged = count

    def _look_again(self) -> None:
        self._retry = None
        if self.transport is None:
            return
        if self.transport.is_closing():  # the caller has yet to take the last answer, and nothing comes behind it
            self._forget()
        else:
            self._read_on()

    def _read_soon(self) -> None:
        """Look again at what the parser could not have yet: aiohttp begins to wait for the next request some turns of
        the loop after one is over, and reports it nowhere."""
        if self._unread and not self._busy and self._retry is None:
            self._retry = self._loop.call_later(RETRY if self._awaits_head() else 0.001, self._look_again)

    def _forget(self) -> None:
        """Nothing is held any more."""
        self._stop_head_timer()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._unread.clear()
        self._searched = 0
        self._head = 0
        self._charge(0)

    def _too_many_heads(self) -> RequestRefusal:
        reached = self.context.caller.account.explain(Limit.ARRIVING)
        return RequestRefusal(429, reached.message, retry_after=reached.retry_after, limit=reached.limit)

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
        held = self._head + len(self._unread)
        if not held or not self._awaits_head():
            self._stop_head_timer()
            return
        deadline = min(LARGE_HEAD_DEADLINE, HEAD_DEADLINE) if held > LARGE_HEAD else HEAD_DEADLINE
        if self._head_timer is None:
            self._head_began = time.monotonic()
        elif deadline == self._head_deadline:
            return
        else:
            self._head_timer.cancel()
        self._head_deadline = deadline
        left = max(0.0, self._head_began + deadline - time.monotonic())
        self._head_timer = self._loop.call_later(left, self._head_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        counted_from = max(self._head_began, self.server.connected_since(self.context))
        deadline = self._head_deadline
        left = min(counted_from + deadline - time.monotonic(), deadline)
        if counted_from > self._head_began and left > 0:  # the connection was away meanwhile
            self._head_timer = self._loop.call_later(left, self._head_late)
            return
        if self._held_back:
            self._give_up(self._too_many_heads())
        else:
            self._give_up(bad_request(f"the head of a request was not complete within {deadline:g} seconds"))

    def _give_up(self, refusal: RequestRefusal) -> None:
        """End a connection on which no request can come any more."""
        self.server.refuse(self.context, refusal)
        self.upgrade_seen = True  # what still arrives is dropped
        self._forget()
        if self.transport is not None:
            self.answer(refusal, close=True)
        self.force_close()

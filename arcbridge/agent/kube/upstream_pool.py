"""Connections to the API server that carry one plain request after the other (`plain`), and are kept in between.

They are of the kind *own* (see `apiserver`): the agent authenticates itself and impersonates, nothing is remembered
between requests. No task and no future per request: whoever asks is called back.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Protocol, cast

from arcbridge.agent.kube.fast_path_parser import ANSWER_HEAD_MOST, CHUNKED, Answer, ChunkedBody, answer_of
from arcbridge.agent.kube.status import Refusal
from arcbridge.errors import Unreachable
from arcbridge.mux import buffer
from arcbridge.net.address import Address
from arcbridge.net.dialer import DIRECT, connect
from arcbridge.net.sockets import disable_user_timeout

CONNECT_DEADLINE = 10.0
"""Seconds for TCP and TLS to the API server, which is near; longer means it is down."""
KEEPALIVE = 15.0
"""Seconds an idle connection is kept: far below the API server's 90, so that ours closes first."""
SHUTDOWN = 3.0
"""Seconds for TLS's goodbye."""
_TOGETHER = 32 * 1024
"""Bytes of a body's beginning that are copied behind the head, so that both are one write."""


class ResponseHandler(Protocol):
    """Whoever sent a request. Exactly one of `answer_over`, `answer_broke` and `asker.leave` (his own) ends it."""

    def answer_begins(self, status: int) -> None:
        """The head of the answer was read; `answer_part` follows at once."""

    def answer_part(self, data: bytes | memoryview, payload: int) -> None:
        """Bytes for the caller, valid during the call; `payload` of them are the body's, without framing."""

    def answer_over(self) -> None:
        """All was passed on."""

    def answer_broke(self, refusal: Refusal | None) -> None:
        """There is no usable answer (`refusal`: what to say; None: no byte of one came), or it broke off."""


class Credentials(Protocol):
    """What the connections need of `apiserver.ApiServer`."""

    def tls(self, *, own: bool) -> ssl.SSLContext:
        """The TLS settings of one kind of connection."""


class UpstreamConnection(asyncio.BufferedProtocol):
    """One connection; at most one request is under way."""

    def __init__(self, pool: UpstreamPool, context: ssl.SSLContext) -> None:
        self._pool = pool
        self.context = context
        self._transport: asyncio.Transport | None = None
        self._asker: ResponseHandler | None = None
        self._head = b""
        self._answer: Answer | None = None
        self._left = 0
        self._chunks: ChunkedBody | None = None
        self._held = False
        self.idle_since = 0.0
        self.used = False
        """Whether it has carried a request before: then it may have died of old age."""

    # -- whoever asks -------------------------------------------------------------------------------------------

    def ask(self, asker: ResponseHandler, request: bytes) -> None:
        """Send one request; only on a connection that the pool gave."""
        self._asker = asker
        cast(asyncio.Transport, self._transport).write(request)

    def leave(self) -> None:
        """The asker is gone; what still comes is nobody's."""
        self._asker = None
        self.drop()

    def hold(self) -> None:
        """The caller takes nothing for now."""
        if not self._held and self._transport is not None and not self._transport.is_closing():
            self._held = True
            self._transport.pause_reading()

    def go_on(self) -> None:
        """The caller takes bytes again."""
        if self._held and self._transport is not None and not self._transport.is_closing():
            self._held = False
            self._transport.resume_reading()

    def drop(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Close in order, when idle."""
        if self._transport is not None:
            self._transport.close()

    @property
    def usable(self) -> bool:
        """Whether a request can be sent on it."""
        return self._transport is not None and not self._transport.is_closing() and self._asker is None

    # -- asyncio's callbacks ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return buffer.VIEW

    def buffer_updated(self, nbytes: int) -> None:
        asker = self._asker
        if asker is None:
            self._pool.remove(self)
            self.drop()  # nobody asked: whatever this is belongs to no request
            return
        try:
            if self._answer is None:
                self._read_head(asker, nbytes)
            else:
                self._read_body(asker, self._answer, 0, nbytes)
        except Refusal as refusal:
            self._fail(refusal)
        if buffer.POISON:
            buffer.poison(nbytes)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.remove(self)
        asker, self._asker = self._asker, None
        if asker is not None:
            asker.answer_broke(None if self._answer is None and not self._head else _unusable())

    # -- inside -------------------------------------------------------------------------------------------------

    def _read_head(self, asker: ResponseHandler, count: int) -> None:
        start = 0
        while True:
            end = buffer.BUFFER.find(b"\r\n\r\n", start, count) if not self._head else -1
            if end >= 0:
                head = bytes(buffer.VIEW[start : end + 4])
                start = end + 4
            else:
                # It comes in pieces: rare, so it may cost a copy.
                begun = len(self._head)
                self._head += bytes(buffer.VIEW[start:count])
                end = self._head.find(b"\r\n\r\n", max(0, begun - 3))
                if end < 0:
                    if len(self._head) > ANSWER_HEAD_MOST:
                        raise _unusable()
                    return
                head, self._head = self._head[: end + 4], b""
                start += end + 4 - begun
            if len(head) > ANSWER_HEAD_MOST:
                raise _unusable()
            answer = answer_of(head)
            if answer is not None:
                break
            if start == count:
                return
        self._answer, self._left = answer, answer.length
        self._chunks = ChunkedBody() if answer.length == CHUNKED else None
        asker.answer_begins(answer.status)
        self._read_body(asker, answer, start, count, answer.head)

    def _read_body(self, asker: ResponseHandler, answer: Answer, start: int, count: int, head: bytes = b"") -> None:
        """Pass on `BUFFER[start:count]`, behind `head`; end the exchange where the body ends."""
        tail = b""
        broken = False
        chunks = self._chunks
        if chunks is None:
            taken = min(self._left, count - start)
            self._left -= taken
            stop = start + taken
            over = not self._left
            extra = stop < count
            payload = taken
        else:
            before = chunks.payload
            stop, tail = chunks.feed(buffer.BUFFER, start, count)
            payload = chunks.payload - before
            over, broken = chunks.over, chunks.broken
            extra = over and self._behind(stop, tail, count)
        view = buffer.VIEW[start:stop]
        if head and len(view) <= _TOGETHER:
            asker.answer_part(b"".join((head, view, tail)), payload)
        else:
            if head:
                asker.answer_part(head, 0)
            asker.answer_part(view, payload)
            if tail:
                asker.answer_part(tail, 0)
        if broken:
            raise _unusable()
        if over and self._asker is asker:
            self._asker = self._answer = self._chunks = None
            self.used = True
            self.go_on()  # the caller held it back at the very end: the next one must not find it so
            if answer.keep and not extra and self.usable:
                self._pool.put(self)
            else:
                self._pool.remove(self)
                self.drop()
            asker.answer_over()

    @staticmethod
    def _behind(stop: int, tail: bytes, count: int) -> bool:
        # With trailers dropped it is not known what lies behind them: such a connection is not kept.
        return bool(tail) or stop < count

    def _fail(self, refusal: Refusal) -> None:
        asker, self._asker = self._asker, None
        self._pool.remove(self)
        self.drop()
        if asker is not None:
            asker.answer_broke(refusal)


class UpstreamPool:
    """The idle ones, the last used first, and the making of new ones."""

    def __init__(self, credentials: Credentials, host: str, port: int) -> None:
        self._credentials = credentials
        self._address = Address(host, port)
        self._idle: list[UpstreamConnection] = []
        self._all: set[UpstreamConnection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    def take(self) -> UpstreamConnection | None:
        """One that is idle, made with the credentials of now."""
        if not self._idle:
            return None
        context = self._credentials.tls(own=True)
        while self._idle:
            connection = self._idle.pop()
            if connection.context is context and connection.usable:
                return connection
            connection.close()
        return None

    async def open(self) -> UpstreamConnection:
        """A new one. Raises Refusal in the words for the caller; cancelling leaves nothing."""
        context = self._credentials.tls(own=True)
        connection = UpstreamConnection(self, context)
        try:
            async with asyncio.timeout(CONNECT_DEADLINE):
                try:
                    sock = await connect(self._address, deadline=CONNECT_DEADLINE, proxy=DIRECT)
                except Unreachable as error:
                    raise error.__cause__ or ConnectionError(error.message) from error
                try:
                    disable_user_timeout(sock)
                    await asyncio.get_running_loop().create_connection(
                        lambda: connection,
                        sock=sock,
                        ssl=context,
                        server_hostname=self._address.host,
                        ssl_shutdown_timeout=SHUTDOWN,
                    )
                except BaseException:
                    connection.drop()  # a cancellation may come when the loop has made it already
                    sock.close()
                    raise
        except TimeoutError as error:
            raise Refusal(504, "the API server cannot be reached: no connection in time") from error
        except ssl.SSLCertVerificationError as error:
            text = "the API server's certificate is not the configured CA's (kubernetes.ca_file)"
            raise Refusal(502, text) from error
        except OSError as error:
            # Not one byte of a request has left: the one case in which repeating is safe for every method.
            words = error.strerror or type(error).__name__
            raise Refusal(503, f"the API server cannot be reached ({words})", retry_after=1) from error
        if self._closed or not connection.usable:
            connection.drop()
            raise Refusal(503, "the API server cannot be reached (connection closed)", retry_after=1)
        self._all.add(connection)
        return connection

    def put(self, connection: UpstreamConnection) -> None:
        """It is idle."""
        if self._closed or not connection.usable:
            self.remove(connection)
            connection.drop()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(KEEPALIVE, self._sweep)

    def remove(self, connection: UpstreamConnection) -> None:
        """It is of no use any more."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Close all; requests under way break off."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for connection in list(self._all):
            connection.drop()
        self._idle.clear()

    def _sweep(self) -> None:
        """Close those that nobody wanted for long, the oldest come first; one timer for all."""
        self._sweeper = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._idle and now - self._idle[0].idle_since >= KEEPALIVE:
            self._idle.pop(0).close()
        if self._idle:
            self._sweeper = loop.call_later(KEEPALIVE - (now - self._idle[0].idle_since), self._sweep)


def _unusable() -> Refusal:
    return Refusal(502, "the API server closed the connection without a usable answer")

"""The agent's HTTP/1.1 client for the API server: connections, and the pool of those that are idle.

It dials, writes requests and reads answers for every user of the API server: the fast path, the general path, upgrades
and the agent's own calls. It decides nothing about a request and repeats none. Invariants: a connection carries one
request at a time, in one kind of credentials, and returns to the pool only when its answer ended exactly where its
framing has it; while it carries one, the memory that it takes counts in the backlog of the caller's session.

What a caller does not take stays at the API server. Only requests that may be repeated are sent on pooled connections
and use the fast transport (`upstream_tls`); on the others no byte that came before the API server closed is dropped.

There is no task and no future per request: a `ResponseHandler` is called back.
"""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from arcbridge.agent.accounts import Account
from arcbridge.agent.kube.connect_limit import ConnectLimit
from arcbridge.agent.kube.own_refusal import OwnRefusals
from arcbridge.agent.kube.response import (
    CHUNKED,
    MAX_HEAD,
    ChunkedBody,
    ResponseHead,
    begins_well,
    read_head,
    unusable_answer,
)
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upgrade import UpgradeRequest
from arcbridge.agent.kube.upstream_tls import connect_upstream
from arcbridge.errors import Unreachable
from arcbridge.mux import buffer
from arcbridge.mux.socket_error_poll import TransportErrorPoll
from arcbridge.net.address import Address
from arcbridge.net.dialer import DIRECT, begin, connect, finish
from arcbridge.net.sockets import disable_user_timeout, enable_user_timeout
from arcbridge.refusals import Refusal, RefusalRule
from arcbridge.wire.backlog import Backlog

_NO_CONNECTION = "the API server cannot be reached: no connection in time"
CONNECT_DEADLINE = 10.0
"""Seconds for TCP and TLS to the API server, which is near; longer means it is down."""
MAX_IDLE = 64
"""Idle connections that are kept: 5 GETs a millisecond. Beyond it the one that has idled longest is closed."""
FIRST_READ = 32 * 1024
"""Bytes of an answer that are read at first; four times as many after each read that filled its half, up to the receive
buffer. OpenSSL keeps as much memory as the largest read took, so that only long answers take much."""
FAST_READ = 128 * 1024
"""Bytes that are read at a time at most over the fast transport, which takes no more from the socket at once."""
SWITCHED_READ = 64 * 1024
"""Bytes that are read at a time of an upgraded connection."""
KEEPALIVE = 15.0
"""Seconds an idle connection is kept: far below the API server's 90, so that the agent closes first."""
MAX_INFORMATIONAL = 5
"""Interim answers (1xx) that one request may get."""
CONNECTION_MEMORY = 48 * 1024
"""Bytes that a connection takes beside what it reads: OpenSSL's state, and one record of which a part has come."""
SMALL_KERNEL_BUFFER = 64 * 1024
"""Bytes that the kernel is asked to keep at most (it keeps up to twice as many) for one of many connections."""
_MAX_JOINED = 32 * 1024
"""Bytes of a body's beginning that are copied behind the head, so that both are one write."""


class ResponseHandler(Protocol):
    """The sender of a request. It ends with `response_complete`, `response_failed`, `response_switched` or `drop`."""

    def response_begins(self, head: ResponseHead) -> bytes:
        """Take the head; return the bytes that stand for it before the body's."""

    def response_data(self, data: bytes | memoryview, payload: int) -> None:
        """Bytes to pass on, valid during the call; `payload` of them belong to the body, the others frame it."""

    def response_complete(self) -> None:
        """The answer is complete; the connection belongs to the pool again."""

    def response_failed(self, refusal: RequestRefusal | None) -> None:
        """The answer broke off or is unusable (`refusal` says how); None: no byte of an answer came."""

    def response_switched(self, head: ResponseHead, rest: bytes) -> None:
        """The API server switched protocols; `rest` followed the 101, and the connection is paused."""


@dataclass(slots=True)
class UpstreamRequest:
    """A request as a connection sends it."""

    head: bytes
    """What is sent at once: the request, or its beginning (`UpstreamConnection.write` continues it)."""
    method: str = "GET"
    upgrade: UpgradeRequest | None = None
    repeatable: bool = True
    """Whether it may use a connection of the pool, be sent again where that one turns out dead, and leave it there."""
    framed: bool = True
    """Whether a chunked body of the answer is handed over with its framing."""


class UpstreamConnection(asyncio.BufferedProtocol):
    """One connection to the API server; at most one request is under way on it."""

    def __init__(self, pool: UpstreamPool, context: ssl.SSLContext, most: int = buffer.PAYLOAD) -> None:
        """`most`: bytes to read at a time at most."""
        self._pool = pool
        self._most = most
        self.context = context
        """The TLS settings it was made with; a connection of other settings than today's is not used again."""
        self.transport: asyncio.Transport | None = None
        """The TLS transport; None before the handshake and after the end."""
        self._handler: ResponseHandler | None = None
        self._request = UpstreamRequest(b"")
        """The one that is under way, or was last."""
        self._head = b""
        """The part of a response head that has arrived."""
        self._response: ResponseHead | None = None
        self._informational = 0
        self._left = 0
        """Bytes of the body that have not arrived, where it has a length."""
        self._chunks: ChunkedBody | None = None
        self._reading_paused = False
        self._readable: select.poll | None = None
        """Tells whether its socket has something to read; made when it is first taken from the pool."""
        self.error_poll: TransportErrorPoll | None = None
        """Told of each read; None for a transport that finds its socket's error itself."""
        self._writing_paused: asyncio.Future[None] | None = None
        self._backlog: Backlog | None = None
        """In which the connection's memory counts while it carries a request."""
        self._counted = 0
        """Bytes that count there."""
        self._read_size = FIRST_READ
        """Bytes to read at a time."""
        self._memory = _memory(FIRST_READ)
        """Bytes that it takes for reads of that size."""
        self.read_at = 0.0
        """When the transport began to decrypt the bytes of the latest read, monotonic seconds."""
        self.account: Account | None = None
        """Of the user whose request it carries; None for a call of the agent's own, and when idle."""
        self.made_for: Account | None = None
        """Of the user for whose request it was made."""
        self.used = False
        """Whether it has carried a request before: then the API server may have closed it for its age."""

    # -- called by the sender of a request ----------------------------------------------------------------------

    def send(self, handler: ResponseHandler, request: UpstreamRequest, backlog: Backlog | None = None) -> None:
        """Send a request; only on a connection that the pool gave.

        `backlog`: that of the caller's session, in which the connection's memory counts meanwhile.
        """
        self._handler, self._request = handler, request
        self._informational = 0
        if backlog is not None:
            self._backlog, self._counted = backlog, self._memory
            backlog.add(self._memory)
        assert self.transport is not None, "the pool gives none without"
        self.transport.write(request.head)

    async def write(self, data: bytes) -> None:
        """Send more of the request's body; waits while the API server takes none. Raises ConnectionResetError."""
        if self.transport is None or self.transport.is_closing():
            raise ConnectionResetError("the API server has closed the connection")
        self.transport.write(data)
        if self._writing_paused is not None:
            await self._writing_paused

    def pause_reading(self) -> None:
        """Read no more of the answer for now: the caller takes nothing."""
        if not self._reading_paused and self.transport is not None and not self.transport.is_closing():
            self._reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        if self._reading_paused and self.transport is not None and not self.transport.is_closing():
            self._reading_paused = False
            if self.error_poll is not None:
                asyncio.get_running_loop().call_soon(self._take_held)
            else:
                self.transport.resume_reading()

    def abandon(self, rest: ResponseHandler, backlog: Backlog) -> None:
        """Give the rest of the answer to `rest`, which takes all of it: the caller is gone and waits for nothing. The
        connection's memory counts in `backlog` from now on."""
        self._handler = rest
        self._count(0)
        self._backlog = backlog
        self._count(self._memory)
        self.resume_reading()

    def release(self) -> None:
        """Count for no caller any more: the request is over, or what it was upgraded to."""
        if self._backlog is not None:
            self._backlog.add(-self._counted)
            self._backlog, self._counted = None, 0
        if self.account is not None:
            self._pool.limit.leave(self.account)
            self.account = None

    def drop(self) -> None:
        """Close at once; the handler hears nothing more."""
        self._handler = None
        self.release()
        if self.transport is not None:
            self.transport.abort()

    def close(self) -> None:
        """Close in order, when idle."""
        if self.transport is not None:
            self.transport.close()

    @property
    def usable(self) -> bool:
        """Whether a request can be sent on it."""
        return self.transport is not None and not self.transport.is_closing() and self._handler is None

    @property
    def silent(self) -> bool:
        """Whether nothing waits to be read, neither bytes nor an end: what came before a request is no answer to it."""
        if self._readable is None:
            self._readable = select.poll()
            self._readable.register(cast(asyncio.Transport, self.transport).get_extra_info("socket"), select.POLLIN)
        return not self._readable.poll(0)

    # -- asyncio's callbacks ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        self.read_at = time.monotonic()
        if self._backlog is not None and self._backlog.full:
            return buffer.VIEW[: buffer.PORTION]
        return buffer.VIEW[: self._read_size]

    def buffer_updated(self, nbytes: int) -> None:
        if (account := self.account) is None:
            self._read(nbytes)
        else:
            payer = account.loop_time
            before = payer.shares.total
            self._read(nbytes)
            payer.charge(time.monotonic(), self.read_at, before)

    def _read(self, nbytes: int) -> None:
        handler = self._handler
        if handler is None:
            self._pool.remove(self)
            self.drop()  # bytes that belong to no request
            return
        if 2 * nbytes >= self._read_size and self._read_size < self._most:  # before the caller can hold up what follows
            self._read_size = min(4 * self._read_size, self._most)
            self._memory = _memory(self._read_size)
            self._count(self._memory)
        try:
            if self._response is None:
                self._read_head(handler, nbytes)
            else:
                self._read_body(handler, self._response, 0, nbytes)
        except RequestRefusal as refusal:
            self._fail(refusal)
        if self.error_poll is not None and not self.error_poll.included:
            self.error_poll.was_read()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._writing_paused = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        waiter, self._writing_paused = self._writing_paused, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.error_poll is not None:
            self.error_poll.stop()
            self.error_poll = None
        self._pool.remove(self)
        self.resume_writing()
        handler, self._handler = self._handler, None
        self.release()
        if handler is not None:
            handler.response_failed(None if self._response is None and not self._head else unusable_answer())

    # -- inside -------------------------------------------------------------------------------------------------

    def _take_held(self) -> None:
        """Read on, and first what the fast transport has read ahead.

        aiofastnet 1.2.0 leaves that until the socket has more to read, which behind the end of an answer is never, and
        drops it where it reads the socket's end first. So both are one call: uvloop reads a socket before it calls what
        `call_soon` was given.
        """
        transport = self.transport
        if transport is not None and not self._reading_paused and not transport.is_closing():
            try:
                transport.resume_reading()
                cast(Any, transport)._do_read()
            except Exception as error:
                transport.abort()  # aiofastnet, which would do so, did not call
                if not isinstance(error, OSError):  # `ssl.SSLError` is one
                    raise

    def _count(self, count: int) -> None:
        if self._backlog is not None:
            self._backlog.add(count - self._counted)
            self._counted = count

    def _read_head(self, handler: ResponseHandler, count: int) -> None:
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
                    if len(self._head) > MAX_HEAD or not begins_well(self._head, begun):
                        raise unusable_answer()
                    return
                head, self._head = self._head[: end + 4], b""
                start += end + 4 - begun
            if len(head) > MAX_HEAD:
                raise unusable_answer()
            response = read_head(head, self._request.method, self._request.upgrade)
            if response is not None:
                break
            self._informational += 1
            if self._informational > MAX_INFORMATIONAL:
                raise unusable_answer()
            if start == count:
                return
        if response.status == 101:
            self._switch(handler, response, bytes(buffer.VIEW[start:count]))
            return
        self._response, self._left = response, response.length
        self._chunks = ChunkedBody() if response.length == CHUNKED else None
        self._read_body(handler, response, start, count, handler.response_begins(response))

    def _switch(self, handler: ResponseHandler, response: ResponseHead, rest: bytes) -> None:
        self._handler = None
        self._pool.remove(self)
        self._count(_memory(max(self._read_size, SWITCHED_READ)))
        self.pause_reading()
        handler.response_switched(response, rest)

    def _read_body(
        self, handler: ResponseHandler, response: ResponseHead, start: int, count: int, head: bytes = b""
    ) -> None:
        """Pass on `BUFFER[start:count]`, behind `head`; end the exchange where the body ends."""
        tail = b""
        broken = False
        chunks = self._chunks
        if chunks is None:
            payload = count - start if count - start < self._left else self._left
            self._left -= payload
            stop = start + payload
            over = not self._left
            extra = stop < count
        else:
            before = chunks.payload
            stop, tail = chunks.feed(buffer.BUFFER, start, count)
            payload = chunks.payload - before
            over, broken = chunks.over, chunks.broken
            # With trailers dropped it is not known what lies behind them: such a connection is not used again.
            extra = bool(tail) or stop < count
        view = buffer.VIEW[start:stop]
        if chunks is not None and not self._request.framed:
            handler.response_data(b"".join([head, *(buffer.VIEW[first:last] for first, last in chunks.spans)]), payload)
        elif head and stop - start <= _MAX_JOINED:
            handler.response_data(b"".join((head, view, tail)), payload)
        else:
            if head:
                handler.response_data(head, 0)
            handler.response_data(view, payload)
            if tail:
                handler.response_data(tail, 0)
        if self._handler is not handler:
            if self._handler is None:
                return  # the handler has dropped the connection meanwhile
            handler = self._handler  # its caller is gone, and another one takes the rest
        if broken:
            raise unusable_answer()
        if over:
            self._handler = self._response = self._chunks = None
            self.used = True
            if self._reading_paused:  # at the very end, by the caller; the next one must not find it so
                self.resume_reading()
            if self._request.repeatable and response.keep and not extra:
                if count < buffer.PORTION:
                    self._pool.put(self)
                else:  # the read may have been full: what the transport holds beyond it comes before a request
                    asyncio.get_running_loop().call_soon(self._pool.put, self)
            else:
                self._pool.remove(self)
                self.drop()
            handler.response_complete()

    def _fail(self, refusal: RequestRefusal) -> None:
        handler, self._handler = self._handler, None
        self._pool.remove(self)
        self.drop()
        if handler is not None:
            handler.response_failed(refusal)


class UpstreamPool:
    """The idle connections, the last used first, and the dialling of new ones."""

    def __init__(self, host: str, port: int) -> None:
        self._clock = time.monotonic
        self.limit = ConnectLimit()
        """Of how many connections there are, and of how many are made."""
        self._address = Address(host, port)
        self._idle: list[UpstreamConnection] = []
        self._all: set[UpstreamConnection] = set()
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.unreachable = 0
        """Connections that could not be made."""
        self.on_unreachable: Callable[[], None] = lambda: None
        """Called when a user's request found the API server out of reach."""
        self.own_refusals = OwnRefusals()
        """What the API server refuses of the agent itself."""

    def send(
        self,
        handler: ResponseHandler,
        request: UpstreamRequest,
        tls: ssl.SSLContext,
        account: Account,
        backlog: Backlog,
    ) -> UpstreamConnection | None:
        """Send a request on an idle connection, and return that; None where there is none (`take`)."""
        connection = self.take(tls, account)
        if connection is not None:
            try:
                connection.send(handler, request, backlog)
            except BaseException:
                connection.drop()
                raise
        return connection

    def take(self, tls: ssl.SSLContext, account: Account | None = None) -> UpstreamConnection | None:
        """Return an idle connection that was made with these settings, if there is one, for a request of the account's
        user: one that was made for the same user, where that has ended many. One of settings that were replaced is
        found no more, and closes after KEEPALIVE."""
        if not self._idle:
            return None
        own = account is not None and (ended := account.ended_connections).left < 1.0 and ended.wait(self._clock())
        for position in range(len(self._idle) - 1, -1, -1):
            connection = self._idle[position]
            if connection.context is tls and (not own or connection.made_for is account):
                del self._idle[position]
                if connection.usable and connection.silent:
                    self.enter(connection, account)
                    return connection
                connection.close()
        return None

    async def dial(
        self, tls: ssl.SSLContext, account: Account | None = None, *, repeatable: bool = False
    ) -> UpstreamConnection:
        """Make a connection for a request of the account's user, when its turn has come; None: for a call of the agent.

        `repeatable`: the connection is for requests that may be repeated, and for no others.

        Raises RequestRefusal in the words for the caller; cancelling leaves nothing.
        """
        connection = UpstreamConnection(self, tls, FAST_READ if repeatable else buffer.PAYLOAD)
        connection.made_for = account
        self.enter(connection, account)
        try:
            if account is None:
                await self._connect(connection, repeatable)
            else:
                await _pass(self.limit.user_turn(account, self._clock()))
                await _pass(self.limit.turn(account, self._clock()))
                try:
                    async with asyncio.timeout(CONNECT_DEADLINE):
                        await account.connecting.acquire()
                except TimeoutError as error:  # those before it wait for an API server that does not answer
                    raise RequestRefusal(504, _NO_CONNECTION) from error
                try:
                    await self._connect(connection, repeatable)
                finally:
                    account.connecting.release()
        except BaseException:
            connection.drop()  # a cancellation may come when the transport exists already
            raise
        self._all.add(connection)
        return connection

    def put(self, connection: UpstreamConnection) -> None:
        """Return a connection whose answer is complete; whether it is still usable is asked when it is taken."""
        if self._closed or connection.transport is None:
            self.remove(connection)
            connection.drop()
            return
        connection.release()
        self._idle.append(connection)
        if len(self._idle) > MAX_IDLE:
            self._idle.pop(0).close()
        if self._sweep_timer is None:
            self._sweep_timer = asyncio.get_running_loop().call_later(KEEPALIVE, self._sweep)

    def remove(self, connection: UpstreamConnection) -> None:
        """Forget a connection."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Close all; requests under way break off."""
        self._closed = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        for connection in list(self._all):
            if connection.transport is not None:
                connection.transport.abort()
        self._idle.clear()

    def hand_over(self, connection: UpstreamConnection, account: Account) -> None:
        """Give a connection that was made for no account to the one whose request leaves on it, as if it had been
        dialled for that: the kernel holds as little for it."""
        self.enter(connection, account)
        if self.limit.crowded(account):
            sock = cast(asyncio.Transport, connection.transport).get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_KERNEL_BUFFER)

    def enter(self, connection: UpstreamConnection, account: Account | None) -> None:
        """Count a connection for the account whose request it is to carry; None: a call of the agent's own."""
        if account is not None:
            self.limit.enter(account)
            connection.account = account

    # -- inside -------------------------------------------------------------------------------------------------

    async def _connect(self, connection: UpstreamConnection, repeatable: bool) -> None:
        try:
            await self._connect_tls(connection, repeatable)
        except RequestRefusal:
            self.unreachable += 1
            if connection.account is not None:  # a call of the agent's own tells its caller
                self.on_unreachable()
            raise

    async def _connect_tls(self, connection: UpstreamConnection, repeatable: bool) -> None:
        try:
            async with asyncio.timeout(CONNECT_DEADLINE):
                sock = await self._connect_tcp()
                try:
                    if repeatable:  # it has no body that the API server may leave unread
                        enable_user_timeout(sock)
                    if connection.account is not None and self.limit.crowded(connection.account):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_KERNEL_BUFFER)
                    host = self._address.host
                    poll = await connect_upstream(sock, connection.context, connection, host, repeatable=repeatable)
                    if connection.transport is not None:
                        connection.error_poll = poll
                except BaseException:
                    sock.close()
                    raise
        except TimeoutError as error:
            raise RequestRefusal(504, _NO_CONNECTION) from error
        except ssl.SSLCertVerificationError as error:
            text = "the API server's certificate is not the configured CA's (kubernetes.ca_file)"
            raise RequestRefusal(502, text, refusal=Refusal(RefusalRule.AGENT_API_CA)) from error
        except OSError as error:
            # Not one byte of a request has left: the one case in which repeating is safe for every method.
            words = error.strerror or type(error).__name__
            raise RequestRefusal(503, f"the API server cannot be reached ({words})", retry_after=1) from error
        if self._closed or not connection.usable:
            raise RequestRefusal(503, "the API server cannot be reached (connection closed)", retry_after=1)

    async def _connect_tcp(self) -> socket.socket:
        """Return a socket that is connected to the API server. Raises OSError."""
        try:
            begun = begin(self._address)
            if begun is None:
                sock = await connect(self._address, deadline=CONNECT_DEADLINE, proxy=DIRECT)
                disable_user_timeout(sock)
                return sock
            if not begun[1]:
                await finish(begun[0], self._address, deadline=CONNECT_DEADLINE)
            return begun[0]
        except Unreachable as error:
            raise error.__cause__ or ConnectionError(error.message) from error

    def _sweep(self) -> None:
        """Close the connections that have been idle for KEEPALIVE; one timer serves them all."""
        self._sweep_timer, now = None, self._clock()
        while self._idle and now - self._idle[0].read_at >= KEEPALIVE:
            self._idle.pop(0).close()
        if self._idle:
            left = KEEPALIVE - (now - self._idle[0].read_at)
            self._sweep_timer = asyncio.get_running_loop().call_later(left, self._sweep)


async def _pass(seconds: float) -> None:
    if seconds:
        await asyncio.sleep(seconds)


def _memory(read_size: int) -> int:
    """Return the bytes that a connection takes; OpenSSL's buffers for its reads grow by thirds and never shrink."""
    return CONNECTION_MEMORY + read_size + read_size // 3

"""The fast entrance: a stream whose requests are plain, from its first byte until something comes that is not.

It reads a request without a general HTTP parser and serves it without a task, a future or a response object; who asks
and what goes on is decided by `authorize`, and the request is carried out by `exchange`, as for every other. What is
not plain is handed over, with every byte that came, to the general parser, which then keeps the stream. What it saves
is in docs/decisions/0007-plain-requests.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from arcbridge.agent.kube.attempt import Attempt, ProxyContext, begin
from arcbridge.agent.kube.authorize import Plan
from arcbridge.agent.kube.caller import StreamContext
from arcbridge.agent.kube.exchange import Exchange
from arcbridge.agent.kube.fast_path_parser import MAX_PLAIN_HEAD, plain_head
from arcbridge.agent.kube.server import WAITING, KubeProtocol
from arcbridge.agent.kube.status import RequestRefusal, status_answer
from arcbridge.mux.stream import StreamTransport
from arcbridge.wire.frames import ResetCode


class FastPath(asyncio.Protocol):
    """The protocol of one stream while its requests are plain; one of them is under way at a time."""

    def __init__(
        self,
        context: ProxyContext,
        stream: StreamContext,
        general: Callable[[StreamContext], KubeProtocol],
        registry: set[FastPath],
    ) -> None:
        self._context = context
        self._stream_context = stream
        self._general = general
        """Makes the general protocol of a stream."""
        self._registry = registry
        """All streams that are on the fast path; this one is in it from `connection_made` to its end."""
        self._stream: StreamTransport | None = None
        self._unread = bytearray()
        """What arrived while a request was under way, or while the caller took nothing."""
        self._reading_paused = False
        self._charged = 0
        """Bytes that count in the user's account, because they wait behind a request."""
        self._writing_paused = False
        self._attempt: Attempt | None = None
        """The request that is under way."""
        self._exchange: Exchange | None = None
        """The same, once it is authorized."""
        self._held: asyncio.TimerHandle | None = None
        """The answer of a refusal that is held."""

    # -- the stream's protocol ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stream = cast(StreamTransport, transport)
        self._registry.add(self)

    def view_received(self, view: memoryview) -> None:
        if self._attempt is None and not self._writing_paused:
            self._read(bytes(view))
            return
        self._unread += view
        if len(self._unread) > MAX_PLAIN_HEAD and not self._reading_paused:
            self._hold_back()

    def _hold_back(self) -> None:
        """Grant no credit while so much waits behind a request that is under way; it counts for the user."""
        stream, account = cast(StreamTransport, self._stream), self._stream_context.caller.account
        self._reading_paused = True
        self._charged = max(WAITING, len(self._unread))
        account.arriving.add(self._charged)
        stream.pause_reading()
        if account.holds_too_much:
            stream.abort(ResetCode.LIMIT)

    def _uncharge(self) -> None:
        charged, self._charged = self._charged, 0
        self._stream_context.caller.account.arriving.remove(charged)

    def eof_received(self) -> bool:
        return False  # the stream closes itself and calls `connection_lost`

    def pause_writing(self) -> None:
        self._writing_paused = True
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._exchange is not None:
            self._exchange.resume()
        elif self._attempt is None:
            self._read_on()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stream = None
        self._registry.discard(self)
        self._uncharge()
        self._cut()

    # -- called by the proxy --------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self._attempt is not None

    def end(self) -> None:
        """End the stream: the agent stops."""
        stream = self._stream
        if stream is None:
            return
        if self._attempt is not None:
            self._cut("the agent stopped")
            stream.abort()
        else:
            stream.close()

    # -- one request ----------------------------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        """A plain request is served here; anything else is for the general protocol."""
        stream = self._stream_context
        facts = plain_head(data, stream.caller.plain_lines)
        if facts is None:
            self._hand_over(data)
            return
        attempt, plan = begin(self._context, stream, facts)
        self._attempt = attempt
        if isinstance(plan, Exception):
            self._failed(plan)
            del plan  # its traceback leads to this frame: a cycle
            return
        try:
            if plan.wanted.begins:
                # The writer calls from outside of all measurements.
                run = attempt.account.loop_time.run
                attempt.record_begun(lambda why: run(lambda: self._start(attempt, plan, why)))
            else:
                self._start(attempt, plan)
        except Exception as error:
            self._failed(error)

    def _start(self, attempt: Attempt, plan: Plan, refusal: str = "") -> None:
        """Send the request. The record of one that lasts was written first, perhaps within the call that asked for it,
        or could not be (`refusal`)."""
        if self._attempt is not attempt:
            return  # the request was cut meanwhile
        stream, pool = self._stream, self._context.api.upstream
        assert stream is not None, "a stream that has ended has cut its request"
        try:
            if refusal:
                raise RequestRefusal(503, refusal)
            self._exchange = Exchange(pool, stream, plan, attempt, self._ended, paused=self._writing_paused)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Nothing has left: answer a refusal, or a defect of the agent's."""
        attempt = self._attempt
        if not isinstance(error, RequestRefusal):
            if attempt is None:
                raise error  # the request is over, and its record is written
            error = attempt.fail(error, "a plain request could not be served")
        self._refuse(error)

    def _hand_over(self, data: bytes) -> None:
        """From here on the stream is the general protocol's."""
        stream = self._stream
        assert stream is not None
        self._registry.discard(self)
        self._stream = None
        protocol = self._general(self._stream_context)
        stream.set_protocol(protocol)
        try:
            protocol.connection_made(stream)
            if self._writing_paused:
                protocol.pause_writing()
            protocol.data_received(data)
        except BaseException:
            stream.abort()
            raise

    def _ended(self, exchange: Exchange, refusal: RequestRefusal | None) -> None:
        """The exchange is over: in order, broken off, or with a refusal to answer."""
        if refusal is not None:
            self._refuse(refusal)
        else:
            self._finish()
            if self._unread and not exchange.broken:  # else the stream is reset next: nothing that follows is served
                self._read_on()

    def _refuse(self, refusal: RequestRefusal) -> None:
        attempt = self._attempt
        assert attempt is not None
        attempt.refuse(refusal)
        if refusal.hold:
            self._held = asyncio.get_running_loop().call_later(refusal.hold, self._answer, attempt, refusal)
        else:
            self._answer(attempt, refusal)

    def _answer(self, attempt: Attempt, refusal: RequestRefusal) -> None:
        """Write a refusal as the answer to the request under way, and read on."""
        self._held = None
        record, stream = attempt.record, self._stream
        assert stream is not None
        # 400 ends the connection, as on the general path.
        close = refusal.status_code == 400
        stream.owed = False
        try:
            stream.write(status_answer(refusal, request_id=record.request, close=close, path=record.path))
        finally:
            self._finish()
        if close:
            stream.close()
        else:
            self._read_on()

    def _cut(self, reason: str = "") -> None:
        """End the request under way, if there is one, on either side."""
        if self._attempt is None:
            return
        self._attempt.record.cut(reason)
        if self._held is not None:
            self._held.cancel()
            self._held = None
        try:
            if self._exchange is not None:
                self._exchange.cancel()
        finally:
            self._finish()

    def _finish(self) -> None:
        attempt, self._attempt, self._exchange = self._attempt, None, None
        assert attempt is not None
        attempt.finish()

    def _read_on(self) -> None:
        """The next request may have arrived already; it waits while the caller takes no answers."""
        stream = self._stream
        if stream is None or not self._unread or self._writing_paused:
            return
        if self._reading_paused:  # before the general protocol may have the stream, which pauses it for itself
            self._reading_paused = False
            self._uncharge()
            stream.resume_reading()
        data, self._unread = bytes(self._unread), bytearray()
        self._read(data)

"""One request and its answer: from the plan to the last byte at the caller, for both entrances.

An `Exchange` takes a connection of the pool or dials one, sends the request, passes the answer on to the caller's
stream as it arrives, holds the API server back while the caller takes nothing, and repeats a request that got no byte
of an answer on a connection which had idled. It does not authorize, and it does not answer for the agent: a failure
before the first byte is a `RequestRefusal` that the entrance answers. Invariants: an answer that breaks off is a RESET
of the stream, never its end; an answer that refuses the agent itself (`own_refusal`) never reaches the caller as a
word on the caller; what has left for the API server is repeated only if it reads (GET, HEAD) on an idle connection.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

from arcbridge.agent.accounts import Limit
from arcbridge.agent.kube.abandoned import AbandonedAnswer
from arcbridge.agent.kube.attempt import Attempt
from arcbridge.agent.kube.authorize import Plan
from arcbridge.agent.kube.body import RequestBody
from arcbridge.agent.kube.connect_limit import LONGEST_WAIT, too_much
from arcbridge.agent.kube.own_refusal import MOST, OF_OTHERS
from arcbridge.agent.kube.response import CHUNKED, ResponseHead, unusable_answer
from arcbridge.agent.kube.status import RequestRefusal, bad_request
from arcbridge.agent.kube.upstream_pool import UpstreamConnection, UpstreamPool
from arcbridge.agent.seats import Seats
from arcbridge.mux.stream import StreamTransport

_TRANSFER_ENCODING = re.compile(rb"(?im)^transfer-encoding:[^\n]*\n")

Ended = Callable[["Exchange", RequestRefusal | None], None]


class Exchange:
    """One request of a caller (`upstream_pool.ResponseHandler`), which is sent as the exchange is made.

    `ended(exchange, refusal)` is called once: with a refusal when nothing was passed on and the entrance has to answer;
    without one when the answer is complete, broke off (`broken`), or switched protocols (`switched`).
    """

    def __init__(
        self,
        pool: UpstreamPool,
        stream: StreamTransport,
        plan: Plan,
        attempt: Attempt,
        ended: Ended,
        *,
        body: RequestBody | None = None,
        close_line: bytes = b"",
        paused: bool = False,
    ) -> None:
        """`body`: the caller's. `close_line`: the Connection header line of the answer, empty where the caller's
        connection goes on. `paused`: the caller takes nothing for now."""
        self._pool = pool
        self._attempt = attempt
        self._account = account = attempt.account
        self._seats = account.seats if plan.wanted.takes_seat else None
        """The user's seats at the API server; None where the request takes none."""
        self._seated = False
        """It has one."""
        self._stream = stream
        self._plan = plan
        self._record = attempt.record
        self._ended = ended
        self._body = body
        self._close_line = close_line
        self._paused = paused
        self._held: bytearray | None = None
        """The answer so far, head and body, while it is not known whether it is about the agent (`own_refusal`)."""
        self._connection: UpstreamConnection | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._sending: asyncio.Task[None] | None = None
        self.begun = False
        """The caller has been given the head of an answer."""
        self.over = False
        """`ended` was called, or `cancel`."""
        self.broken = False
        """The answer broke off; the stream was reset."""
        self.switched: tuple[UpstreamConnection, ResponseHead, bytes] | None = None
        """After a 101: the connection, the answer's head, and the bytes that followed it."""
        if self._record.subject.grants:
            attempt.caller.runs_on_loan(stream, self._record)
        stream.owed = True
        try:
            if self._seats is not None:
                self._seated = self._seats.take()
            if (self._seats is not None and not self._seated) or not self._send_on_idle():
                self._dial()  # when it is its turn
        except BaseException:
            self.cancel()
            raise

    def _send_on_idle(self) -> bool:
        """Send the request on an idle connection, or an upgrade on the session's unused one, if there is one."""
        plan, connection = self._plan, None
        if plan.repeatable:
            connection = self._pool.send(self, plan, plan.tls, self._account, self._stream.backlog)
        elif plan.upgrade is not None and (connection := self._attempt.warm_connection(plan.tls)) is not None:
            self._connection = connection  # which `cancel` drops
            connection.send(self, plan, self._stream.backlog)
        if connection is None:
            return False
        self._connection = connection
        if self._paused:
            connection.pause_reading()
        return True

    def pause(self) -> None:
        """Stop reading: the caller takes nothing for now."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause_reading()

    def resume(self) -> None:
        """Read on: the caller takes bytes again."""
        self._paused = False
        if self._connection is not None:
            self._connection.resume_reading()

    def cancel(self) -> None:
        """End the exchange where it is: the caller is gone. `ended` is not called any more."""
        if self.over:
            return
        self.over = True
        connection, account = self._connection, self._account
        if connection is not None and self._plan.repeatable:
            if self._seated and account.seats.most:
                self._connection, self._seated = None, False
                AbandonedAnswer(connection, account)  # has the seat from now on
            else:
                account.ended_connections.take(time.monotonic())  # a watch has no end to wait for
        self._release()

    def fail(self, refusal: RequestRefusal) -> None:
        """End the exchange with a refusal; an answer that has begun breaks off."""
        if self.over:
            return
        if not self.begun:
            self._end(refusal)
            return
        self._record.cut("the API server's answer broke off")
        self.broken = True
        self._end(None)
        self._stream.cut()

    async def body_released(self) -> None:
        """Wait until nothing reads the caller's body any more: aiohttp's server reads the rest of it itself."""
        if self._sending is not None:
            await asyncio.wait([self._sending])
        if self._body is not None:
            self._record.move(self._body.count, self._record.bytes_down)
            await self._body.idle()

    # -- the connection -------------------------------------------------------------------------------------------

    def _dial(self) -> None:
        self._dialling = asyncio.get_running_loop().create_task(
            self._account.loop_time.steps(self._dial_and_send()), name="api-server-dial"
        )

    async def _take_turn(self, seats: Seats) -> None:
        """Wait for a seat. Raises RequestRefusal."""
        try:
            with self._attempt.body_waits(self._plan.facts):
                await seats.turn(LONGEST_WAIT)
        except TimeoutError:
            raise too_much(self._account, Limit.APISERVER_SEATS, time.monotonic()) from None
        self._seated = True

    async def _dial_and_send(self) -> None:
        plan = self._plan
        try:
            if self._seats is not None and not self._seated:
                await self._take_turn(self._seats)
                if self._send_on_idle():
                    return
            self._connection = await self._pool.dial(plan.tls, self._account, repeatable=plan.repeatable)
            self._connection.send(self, plan, self._stream.backlog)
            if self._paused:
                self._connection.pause_reading()
            if self._body is not None:
                sending = self._account.loop_time.steps(self._send_body(self._connection, self._body))
                self._sending = asyncio.get_running_loop().create_task(sending)
        except RequestRefusal as refusal:
            self.fail(refusal)
        except Exception as error:
            self.fail(self._attempt.fail(error, "a request could not be sent to the API server"))

    async def _send_body(self, connection: UpstreamConnection, body: RequestBody) -> None:
        """Stream the caller's body, chunked anew where it has no length."""
        chunked = not self._plan.facts.length
        try:
            async for chunk in body.chunks(answered=self.begun):
                await connection.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
            if chunked:
                await connection.write(b"0\r\n\r\n")
        except RequestRefusal as refusal:  # its end must not leave
            self.fail(refusal)
        except Exception as error:
            if body.error is not None:
                self.fail(bad_request("the body of the request is malformed or broke off"))
            elif not isinstance(error, ConnectionResetError):  # of a lost connection its handler hears
                self.fail(self._attempt.fail(error, "a request's body could not be sent"))

    # -- the answer (`upstream_pool.ResponseHandler`) -------------------------------------------------------------

    def response_begins(self, head: ResponseHead) -> bytes:
        own = self._plan.own and self._record.subresource not in OF_OTHERS
        if own and head.status == 401:
            raise self._pool.own_refusals.credential()
        if own and head.status == 403 and head.length:
            self._held = bytearray()
        else:
            self.begun = True
        self._record.answer(head.status)
        if self._body is not None and not self._body.finished:
            self._close_line = b"Connection: close\r\n"  # an early answer: the rest of the body is of no use
        lines = head.lines
        if head.length == CHUNKED and not self._plan.framed:
            # Without its framing the body ends with the connection, as HTTP/1.0 has it.
            lines = _TRANSFER_ENCODING.sub(b"", lines)
            self._close_line = b"Connection: close\r\n"
        return lines + self._close_line + b"\r\n"

    def response_data(self, data: bytes | memoryview, payload: int) -> None:
        if self.over:
            return
        self._record.pass_on(payload)
        if self._held is None:
            self._stream.write(data)
            return
        self._held += data
        if len(self._held) > MOST:
            self._let_pass(self._held)

    def _let_pass(self, held: bytearray) -> None:
        """Pass on what was held back."""
        self._held = None
        self.begun = True
        self._stream.write(bytes(held))

    def response_complete(self) -> None:
        self._connection = None
        if self._held is not None and not self.over:
            refusal = self._pool.own_refusals.forbidden(self._held)
            if refusal is not None:
                self._record.move(self._record.bytes_up, 0)
                self._end(refusal)
                return
            self._let_pass(self._held)
        self._stream.owed = False
        self._end(None)

    def response_failed(self, refusal: RequestRefusal | None) -> None:
        connection, self._connection = self._connection, None
        if self.over:
            return
        if refusal is None and not self.begun and self._plan.repeatable and connection is not None and connection.used:
            self._dial()  # the idle connection has died of old age: once more, on a new one
        else:
            self.fail(refusal or unusable_answer())

    def response_switched(self, head: ResponseHead, rest: bytes) -> None:
        connection, self._connection = self._connection, None
        if connection is None or self.over:
            return
        self.begun = True
        self._stream.owed = False
        self._record.answer(head.status)
        self.switched = (connection, head, rest)
        self._attempt.upgraded(self._plan.tls)
        self._end(None)

    @property
    def closes(self) -> bool:
        """Whether the caller's connection ends behind the answer."""
        return b"close" in self._close_line

    # -- the end --------------------------------------------------------------------------------------------------

    def _end(self, refusal: RequestRefusal | None) -> None:
        self.over = True
        self._release()
        self._ended(self, refusal)

    def _release(self) -> None:
        if self._record.subject.grants:
            self._attempt.caller.on_loan.pop(self._record.request, None)
        if self._seated and self._seats is not None:
            self._seated = False
            self._seats.leave()
        for task in (self._dialling, self._sending):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.drop()

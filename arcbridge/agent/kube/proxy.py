"""The authentication proxy: from a caller's request to the API server, as the caller.

A stream begins on the fast path (`fast_path`), which keeps it while its requests are plain, and goes over to the
general HTTP parser (`server`) with the first that is not. Both ask `authorize` for a plan and carry it out as an
`exchange`; what differs is how a request is read. This module joins the parts, and has the general entrance: bodies,
`--as`, upgrades.

What must hold:

* A request is built anew. Nothing of the caller's framing goes on, and every header that says who asks is the agent's.
* Bodies stream both ways with backpressure and are never collected, decompressed or re-encoded.
* An answer that breaks off is a RESET of the stream, never its end: `kubectl cp` must fail loudly.
* After the first byte of a request that writes went to the API server, it is not repeated and no `Retry-After` is sent.


"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from arcbridge.agent.audit import AuditLog
from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.agent.kube.attempt import Attempt, ProxyContext, begin
from arcbridge.agent.kube.authorize import Plan
from arcbridge.agent.kube.body import RequestBody
from arcbridge.agent.kube.caller import SAFE_ID, Caller, StreamContext
from arcbridge.agent.kube.channel_splice import ChannelSplice
from arcbridge.agent.kube.exchange import Exchange
from arcbridge.agent.kube.fast_path import FastPath
from arcbridge.agent.kube.pod_body import Inspection, is_inspected
from arcbridge.agent.kube.port_forward import forwarded_ports
from arcbridge.agent.kube.request_facts import read_facts
from arcbridge.agent.kube.response import ResponseHead
from arcbridge.agent.kube.server import AnsweredResponse, KubeProtocol, KubeServer
from arcbridge.agent.kube.status import RequestRefusal, bad_request
from arcbridge.agent.kube.upgrade import chosen_protocol
from arcbridge.agent.kube.upstream_pool import UpstreamConnection
from arcbridge.mux.splice import SpliceResult, reset_transport
from arcbridge.mux.stream import StreamTransport
from arcbridge.wire.frames import ResetCode

if TYPE_CHECKING:
    from arcbridge.agent.recording.recorder import RecordedSession, Recorder
    from arcbridge.agent.restrictions.session_restrictions import SessionRestrictions

UPGRADE_DEADLINE = 60.0
"""Seconds for the answer to an upgrade: the API server may wait for a kubelet to connect first."""


class _StreamOver(ConnectionError):
    """Ends aiohttp's part of a stream that was upgraded and is over: nothing may be written to it any more."""


class KubeProxy:
    """The proxy of one agent. Made in the event loop; `close()` must be awaited."""

    def __init__(self, api: ApiServer, audit: AuditLog) -> None:
        self._loop = asyncio.get_running_loop()
        self.api = api
        self.context = ProxyContext(api, audit)
        self.stats = self.context.stats
        self.warm = self.context.warm
        self._server = KubeServer(self._handle, self.context)
        self.fast_paths: set[FastPath] = set()
        """Streams whose requests were all plain so far."""

    def serve(self, stream: StreamTransport, caller: Caller) -> None:
        """Serve one stream as an HTTP/1.1 connection of `caller`."""
        if not SAFE_ID.fullmatch(caller.session):
            stream.abort(ResetCode.REFUSED)
            return
        context = StreamContext(caller, int(stream.get_extra_info("stream_id") or 0))
        stream.attach(FastPath(self.context, context, self._server.protocol, self.fast_paths))

    async def close(self, timeout: float = 0.5) -> None:
        """End what still runs after `timeout` seconds; each request's audit record is written."""
        deadline = time.monotonic() + timeout
        self.warm.change(0)
        await self._server.shutdown(timeout)
        while any(one.busy for one in self.fast_paths) and (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.02))
        for one in list(self.fast_paths):
            one.end()

    # -- one request of the general parser --------------------------------------------------------------------

    async def _handle(self, protocol: KubeProtocol, request: web.BaseRequest) -> web.StreamResponse:
        stream = protocol.context
        await protocol.drained()  # answers of the agent's own would pile up for a caller that takes none
        facts = read_facts(
            request.method, request.raw_path, request.raw_headers, request.version, keep_alive=request.keep_alive
        )
        attempt, planned = begin(self.context, stream, facts)
        record, upgraded = attempt.record, stream.caller.upgraded
        inspection: Inspection | None = None
        try:
            plan = planned if isinstance(planned, Plan) else await attempt.plan_reviewed(facts, planned)
            if plan.upgrade is not None:
                # Before the first wait: a right that is lost from now on ends it.
                upgraded[record.request] = protocol.stream, record
            if plan.wanted.begins:
                await attempt.recorded_begun()
            if plan.upgrade is not None:
                if (recorder := self.context.recorder) is not None:
                    return await self._upgrade_recorded(recorder, protocol, plan, attempt)
                return await self._upgrade(protocol, plan, attempt)
            restrictions = (stream.caller.lent or stream.caller).restrictions
            if restrictions is not None and restrictions.answers(plan.wanted.info):
                return await self._review_own(protocol, plan, attempt, restrictions, request)
            body: RequestBody | None = None
            if facts.has_body:
                if is_inspected(plan.wanted.info, facts.method):
                    held, commands = attempt.account.arriving, self.context.audit.commands
                    inspection = Inspection(facts, attempt.recorded_details, held, commands=commands)
                body = RequestBody(request, inspection)
            exchange = await self._exchange(protocol, plan, attempt, facts.connection_line, body)
            return AnsweredResponse(keep_alive=not exchange.closes)
        except RequestRefusal as refusal:
            attempt.refuse(refusal)
            if refusal.hold:
                await asyncio.sleep(refusal.hold)
            # 400 ends the connection: it is not certain where the next request would start. Of a body that has not
            # come, the rest is read for a while, and then the stream ends.
            ends = refusal.status_code in (400, 405) or protocol.early or protocol.upgrade_seen or not facts.persistent
            close = ends or not request.content.is_eof()
            return protocol.answer(
                refusal, request_id=record.request, close=close, method=request.method, path=record.path
            )
        except _StreamOver:
            raise
        except (asyncio.CancelledError, ConnectionError):
            record.cut()
            raise
        except Exception as error:
            answer = attempt.fail(error, "a request could not be served")
            attempt.refuse(answer)
            if protocol.stream.is_closing():
                raise ConnectionResetError("the request failed behind the beginning of its answer") from error
            return protocol.answer(answer, request_id=record.request, close=True, method=request.method)
        finally:
            del planned  # the traceback of an obstacle to a plan leads to this frame: a cycle
            if inspection is not None:
                inspection.release()
            if record.upgrade:
                upgraded.pop(record.request, None)
            attempt.finish()

    async def _review_own(
        self,
        protocol: KubeProtocol,
        plan: Plan,
        attempt: Attempt,
        restrictions: SessionRestrictions,
        request: web.BaseRequest,
    ) -> web.StreamResponse:
        """Answer what a restricted session asks about its own rights."""
        from arcbridge.agent.restrictions.own_reviews import review

        with attempt.body_waits(plan.facts):
            code, answer = await review(self.api, plan, restrictions, request, attempt.account)
        attempt.record.answer(code)
        attempt.record.move(0, len(answer))
        return protocol.answer_json(code, answer, request_id=attempt.record.request)

    async def _exchange(
        self, protocol: KubeProtocol, plan: Plan, attempt: Attempt, close_line: bytes, body: RequestBody | None = None
    ) -> Exchange:
        """Carry a request out until its answer is complete or has switched protocols.

        Raises RequestRefusal when nothing was passed on, ConnectionResetError when the answer broke off.
        """
        done: asyncio.Future[RequestRefusal | None] = self._loop.create_future()

        def ended(_: Exchange, refusal: RequestRefusal | None) -> None:
            if not done.done():
                done.set_result(refusal)

        pool, paused = self.api.upstream, protocol.writing_paused
        protocol.exchange = exchange = Exchange(
            pool, protocol.stream, plan, attempt, ended, body=body, close_line=close_line, paused=paused
        )
        try:
            refusal = await done
        except BaseException:
            if exchange.switched is not None:
                exchange.switched[0].drop()
            elif exchange.begun and not exchange.over:
                protocol.stream.cut()
            raise
        finally:
            protocol.exchange = None
            exchange.cancel()
            await exchange.body_released()
        if refusal is not None:
            raise refusal
        if exchange.broken:
            raise ConnectionResetError("the answer broke off")
        return exchange

    # -- upgrades ---------------------------------------------------------------------------------------------

    async def _upgrade_recorded(
        self, recorder: Recorder, protocol: KubeProtocol, plan: Plan, attempt: Attempt
    ) -> web.StreamResponse:
        recording = await recorder.begin(attempt.caller, attempt.record, plan)
        try:
            return await self._upgrade(protocol, plan, attempt, recording)
        finally:
            if recording is not None:
                recorder.finish(recording, attempt.record)

    async def _upgrade(
        self, protocol: KubeProtocol, plan: Plan, attempt: Attempt, recording: RecordedSession | None = None
    ) -> web.StreamResponse:
        self.stats.upgrades += 1
        if protocol.early:
            raise _early()
        late = self._loop.call_later(UPGRADE_DEADLINE, _fail_unless_begun, protocol, _slow)
        protocol.on_early = partial(_fail_unless_begun, protocol, _early)
        try:
            exchange = await self._exchange(protocol, plan, attempt, b"Connection: close\r\n")
        finally:
            late.cancel()
            protocol.on_early = None
        if exchange.switched is None:
            return AnsweredResponse(keep_alive=False)
        connection, head, rest = exchange.switched
        try:
            if protocol.early:
                raise _early()
            await self._splice(protocol, connection, head, rest, attempt, recording)
        except BaseException:
            connection.drop()  # whether or not the splice had it
            raise
        raise _StreamOver("the upgraded stream is over")

    async def _splice(
        self,
        protocol: KubeProtocol,
        connection: UpstreamConnection,
        head: ResponseHead,
        rest: bytes,
        attempt: Attempt,
        recording: RecordedSession | None,
    ) -> None:
        """Join stream and connection until both are over."""
        upstream, record = connection.transport, attempt.record
        if upstream is None:
            raise RequestRefusal(502, "the API server closed the connection behind its answer to the upgrade")
        done: asyncio.Future[SpliceResult] = self._loop.create_future()
        ports = forwarded_ports(record, head.lines, attempt.note_details)
        stream = protocol.stream
        first = head.lines + b"\r\n"

        def ended(result: SpliceResult) -> None:
            if not done.done():
                done.set_result(result)

        if recording is None:
            seen = ports.ports.feed if ports is not None else None
            # A port-forward that is cut must not look like one that has ended, and an app's protocol is its own.
            channels = chosen_protocol(head.lines) if record.subresource in ("exec", "attach") else b""
            splice = ChannelSplice(upstream, ended, channels, seen=seen)
        else:
            splice, notice = recording.splice(upstream, ended, stream, record, head.lines)
            first += notice
        stream.write(first)
        splice.stream_side.connection_made(stream)
        stream.set_protocol(splice.stream_side)
        record.switch()
        attempt.caller.explains[record.request] = partial(splice.explain, stream)
        self.stats.upgrades_open += 1
        try:
            splice.start(rest)
            stream.resume_reading()
            result = await done
            record.move(result.from_stream, result.to_stream)
            if result.error is not None:
                record.break_off(result.error)
        except asyncio.CancelledError:
            stream.abort(ResetCode.CANCELLED)
            reset_transport(upstream)
            record.cut("the agent stopped")
            raise
        finally:
            attempt.caller.explains.pop(record.request, None)
            if ports is not None:
                ports.close()
            self.stats.upgrades_open -= 1
            connection.release()
            # The stream's end went to the splice; aiohttp's protocol must hear of it too, to free what it holds.
            self._loop.call_soon(protocol.connection_lost, None)


def _early() -> RequestRefusal:
    return bad_request("bytes arrived before the upgrade was answered")


def _slow() -> RequestRefusal:
    return RequestRefusal(504, "the API server did not answer the upgrade in time")


def _fail_unless_begun(protocol: KubeProtocol, refusal: Callable[[], RequestRefusal]) -> None:
    """Refuse the upgrade that is under way; an answer of the API server's that has begun counts."""
    exchange = protocol.exchange
    if exchange is not None and not exchange.begun:
        exchange.fail(refusal())

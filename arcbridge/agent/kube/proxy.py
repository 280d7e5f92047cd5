"""The authentication proxy: from a caller's request to the API server, as the caller.

One request reads from top to bottom: is it well-formed, who is it, may they (`--as`), which headers, ordinary or
upgrade, send, audit. Each step is one call with one failure, and a failure is a Status that says what to do.

What must hold (design, section 9):

* A request is built anew. Nothing of the caller's framing goes on, and every header that speaks for somebody is ours.
* Bodies stream both ways with backpressure and are never collected, decompressed or re-encoded.
* An answer that breaks off is a RESET of the stream, never its end: `kubectl cp` must fail loudly.
* After the first byte went to the API server nothing is repeated and no `Retry-After` is sent.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import NoReturn

import aiohttp
import structlog
from aiohttp import web

from arcbridge.agent.audit import AuditLog, AuditRecord
from arcbridge.agent.kube.answer import answer_headers
from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.agent.kube.body import RequestBody
from arcbridge.agent.kube.fast_path import FastPath
from arcbridge.agent.kube.fast_path_parser import HeadCache
from arcbridge.agent.kube.framing import check_framing, check_target, has_body
from arcbridge.agent.kube.impersonation import (
    ORIGINAL_USER,
    Headers,
    RawHeaders,
    Subject,
    check_names,
    impersonated_headers,
    own_token_headers,
    requested_subject,
)
from arcbridge.agent.kube.request_info import request_info
from arcbridge.agent.kube.review import Reviewer
from arcbridge.agent.kube.server import KubeProtocol, KubeServer
from arcbridge.agent.kube.status import Refusal, bad_request, status_response
from arcbridge.agent.kube.upgrade import AnswerReader, Asked, asked_upgrade, switch_head, upgrade_head
from arcbridge.identity.claims import Identity
from arcbridge.mux.splice import SpliceResult, TransportSplice, reset_transport
from arcbridge.mux.stream import StreamTransport
from arcbridge.wire.frames import ResetCode

MAX_IN_FLIGHT = 5000
"""Requests of all sessions together that wait for the API server: more are refused (429) before they leave."""

_log = structlog.get_logger("arcbridge.agent")


@dataclass(slots=True)
class Caller:
    """Who a session speaks for. `identity` is replaced at each renewal and read anew for each request."""

    session: str
    """The join id."""
    identity: Identity
    token_mode: bool = False
    """The caller's own bearer token goes on in each request; the agent does not impersonate."""
    here_since: float = 0.0
    """Since when the session has its present connection, monotonic seconds; infinity while it has none."""
    heads: HeadCache = field(default_factory=HeadCache)
    """What plain requests of the session were given as headers (`lane`)."""


class _StreamOver(ConnectionError):
    """Ends aiohttp's part of a stream that was upgraded and is over: nothing may be written to it any more."""


@dataclass(slots=True)
class KubeStats:
    """Counters; observe/ reads them at scrape time."""

    requests: int = 0
    in_flight: int = 0
    upgrades: int = 0
    upgrades_open: int = 0
    refused: int = 0
    cut: int = 0
    unreachable: int = 0
    code_1xx: int = 0
    code_2xx: int = 0
    code_3xx: int = 0
    code_4xx: int = 0
    code_5xx: int = 0

    def count(self, status: int) -> None:
        """Counts one answer by its class."""
        if 200 <= status < 300:
            self.code_2xx += 1
            return
        name = f"code_{status // 100}xx"
        setattr(self, name, getattr(self, name) + 1)


@dataclass(slots=True)
class StreamContext:
    """The context of one stream's protocol."""

    caller: Caller
    stream_id: int
    record: AuditRecord | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """A request that may go: what of it was understood, and its new headers."""

    target: str
    headers: Headers
    own: bool
    body: bool
    upgrade: Asked | None


class KubeProxy:
    """The proxy of one agent. Made in the event loop; `close()` must be awaited."""

    def __init__(self, api: ApiServer, audit: AuditLog, *, reviewer: Reviewer | None = None) -> None:
        self.api = api
        self.audit = audit
        self._reviewer = reviewer or Reviewer(api)
        self._server = KubeServer(self._handle, self._refused_head, lambda protocol: protocol.context.caller.here_since)
        self.stats = KubeStats()
        self.lanes: set[FastPath] = set()
        """Streams whose requests were all plain so far."""

    def serve(self, stream: StreamTransport, caller: Caller) -> None:
        """Serves one stream as an HTTP/1.1 connection of `caller`."""
        stream.attach(FastPath(self, StreamContext(caller, int(stream.get_extra_info("stream_id") or 0))))

    def general(self, context: StreamContext, requests: int) -> KubeProtocol:
        """The protocol for a stream on which something came that is not plain, after `requests` plain ones."""
        protocol = self._server.protocol(context)
        protocol.requests = requests
        return protocol

    @property
    def has_room(self) -> bool:
        """Whether another request may leave for the API server."""
        return self.stats.in_flight < MAX_IN_FLIGHT

    async def close(self, timeout: float = 0.5) -> None:
        """Ends what still runs after `timeout` seconds; each request's audit record is written."""
        deadline = time.monotonic() + timeout
        await self._server.shutdown(timeout)
        while any(lane.busy for lane in self.lanes) and (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.02))
        for lane in list(self.lanes):
            lane.end()

    # -- one request ------------------------------------------------------------------------------------------

    async def _handle(self, protocol: KubeProtocol, request: web.BaseRequest) -> web.StreamResponse:
        stream: StreamContext = protocol.context
        protocol.requests += 1
        request_id = f"{stream.caller.session}-{stream.stream_id}-{protocol.requests}"
        record = self._record(stream, request_id, request.method)
        self.stats.requests += 1
        self.stats.in_flight += 1
        try:
            plan = await self._plan(stream.caller, request, record)
            if plan.upgrade is not None:
                return await self._upgrade(protocol, request, plan, plan.upgrade, record)
            return await self._forward(protocol, request, plan, record)
        except Refusal as refusal:
            record.status, record.reason = refusal.status_code, refusal.message
            if record.outcome == "answered":
                record.outcome = "refused"
                self.stats.refused += 1
            if refusal.status_code >= 500:
                log = _log.bind(session=record.session, stream=stream.stream_id, request=request_id)
                log.warning("request failed", reason=refusal.message)
            # 400 ends the connection: nobody knows where the next request would start.
            close = refusal.status_code in (400, 405) or protocol.early or protocol.upgrade_seen
            return status_response(refusal, request_id=request_id, close=close)
        except _StreamOver:
            raise
        except (asyncio.CancelledError, ConnectionError):
            if record.outcome != "upgraded":
                record.outcome = "cut"
            self.stats.cut += 1
            raise
        finally:
            self.stats.in_flight -= 1
            if record.status:
                self.stats.count(record.status)
            self.audit.write(record)

    async def _plan(self, caller: Caller, request: web.BaseRequest, record: AuditRecord) -> _Plan:
        """Who, may they, which headers. Raises Refusal; nothing has left when it does."""
        method, target, headers = request.method, request.raw_path, request.raw_headers
        check_framing(method, request.version, headers)
        check_target(target)
        check_names(headers)
        asks_upgrade = any(name.lower() == b"upgrade" for name, _ in headers)
        info = request_info(method, target, upgrade=asks_upgrade)
        record.verb, record.group, record.resource = info.verb, info.group, info.resource
        record.subresource, record.namespace, record.name = info.subresource, info.namespace, info.name
        record.path = info.path_class
        body = has_body(headers)
        upgrade = asked_upgrade(method, headers, info, has_body=body)
        if upgrade is not None:
            record.upgrade = upgrade.protocol
        if self.stats.in_flight > MAX_IN_FLIGHT:
            raise Refusal(429, "the agent has too many requests under way; try again shortly", retry_after=1)

        if caller.token_mode:
            return _Plan(target, own_token_headers(headers, request_id=record.request), False, body, upgrade)
        subject = await self._subject(caller.identity, headers, record)
        out = impersonated_headers(headers, subject, request_id=record.request, authorization=self.api.authorization())
        return _Plan(target, out, True, body, upgrade)

    async def _subject(self, identity: Identity, headers: RawHeaders, record: AuditRecord) -> Subject:
        """Whom the request runs as: the caller, or whom `--as` asks for once the API server has allowed it."""
        asked = requested_subject(headers)
        if asked is None:
            return Subject.of(identity)
        record.as_user = asked.user
        await self._reviewer.check(identity, asked)
        return Subject(asked.user, asked.uid, asked.groups, (*asked.extra, (ORIGINAL_USER, identity.username)))

    # -- ordinary ---------------------------------------------------------------------------------------------

    async def _forward(
        self, protocol: KubeProtocol, request: web.BaseRequest, plan: _Plan, record: AuditRecord
    ) -> web.StreamResponse:
        body = RequestBody(request) if plan.body else None
        headers = list(plan.headers)
        if body is not None and request.headers.get("Content-Length"):
            headers.append(("Content-Length", request.headers["Content-Length"]))
        try:
            upstream = await self._send(request.method, plan, headers, body)
            try:
                record.status = upstream.status
                out = answer_headers(request.method, upstream.status, upstream.raw_headers)
                response = web.StreamResponse(status=upstream.status, reason=_phrase(upstream.status), headers=out)
                if body is not None and not body.finished:
                    response.force_close()  # an early answer: the rest of the body is of no use to anybody
                await response.prepare(request)
                await self._relay(protocol, upstream, response, record)
                return response
            finally:
                upstream.close()
        finally:
            if body is not None:
                record.bytes_up = body.count
                await body.idle()

    async def _send(
        self, method: str, plan: _Plan, headers: Headers, body: RequestBody | None
    ) -> aiohttp.ClientResponse:
        """Sends and waits for the head of the answer; every failure is a Refusal with the right code."""
        chunks = body.chunks() if body is not None else None
        try:
            return await self.api.request(method, plan.target, headers, own=plan.own, body=chunks)
        except aiohttp.ConnectionTimeoutError as error:
            self.stats.unreachable += 1
            raise Refusal(504, "the API server cannot be reached: no connection in time") from error
        except aiohttp.ClientConnectorCertificateError as error:
            self.stats.unreachable += 1
            raise Refusal(
                502, "the API server's certificate is not the configured CA's (kubernetes.ca_file)"
            ) from error
        except aiohttp.ClientConnectorError as error:
            self.stats.unreachable += 1
            # Not one byte of the request has left: the one case in which repeating is safe for every method.
            raise Refusal(503, f"the API server cannot be reached ({_cause(error)})", retry_after=1) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if body is not None and body.error is not None:
                raise bad_request("the body of the request is malformed or broke off") from error
            raise Refusal(502, "the API server closed the connection without a usable answer") from error

    async def _relay(
        self,
        protocol: KubeProtocol,
        upstream: aiohttp.ClientResponse,
        response: web.StreamResponse,
        record: AuditRecord,
    ) -> None:
        _notice_loss(upstream)
        while True:
            try:
                chunk = await upstream.content.readany()
            except (aiohttp.ClientError, OSError) as error:
                record.reason = "the API server's answer broke off"
                _reset(protocol, error)
            if not chunk:
                break
            await response.write(chunk)
            record.bytes_down += len(chunk)
        await response.write_eof()

    # -- upgrades ---------------------------------------------------------------------------------------------

    async def _upgrade(
        self, protocol: KubeProtocol, request: web.BaseRequest, plan: _Plan, asked: Asked, record: AuditRecord
    ) -> web.StreamResponse:
        self.stats.upgrades += 1
        reader = AnswerReader()
        _refuse_early(protocol)
        try:
            upstream = await self.api.dial(reader, own=plan.own)
        except TimeoutError as error:
            self.stats.unreachable += 1
            raise Refusal(504, "the API server cannot be reached: no connection in time") from error
        except OSError as error:
            self.stats.unreachable += 1
            raise Refusal(503, f"the API server cannot be reached ({_cause(error)})") from error
        spliced = False
        try:
            protocol.on_early = upstream.abort  # the reader wakes up with an error
            _refuse_early(protocol)
            upstream.write(upgrade_head(request.method, plan.target, self.api.authority, plan.headers, asked))
            try:
                answer = await reader.answer(asked)
            finally:
                protocol.on_early = None
                _refuse_early(protocol)
            record.status = answer.status
            if answer.status != 101:
                headers = answer_headers(request.method, answer.status, answer.headers, framed=False)
                headers.popall("Content-Length", None)  # the body was read to its end; its length is known anew
                response = web.Response(
                    status=answer.status, reason=_phrase(answer.status), headers=headers, body=answer.rest
                )
                response.force_close()
                record.bytes_down = len(answer.rest)
                return response
            stream = protocol.transport
            if not isinstance(stream, StreamTransport):
                raise ConnectionResetError("the caller is gone")
            spliced = True
            stream.write(switch_head(answer.headers, asked))
            await self._splice(protocol, stream, upstream, answer.rest, record)
        finally:
            if not spliced:
                upstream.abort()
        raise _StreamOver("the upgraded stream is over")

    async def _splice(
        self,
        protocol: KubeProtocol,
        stream: StreamTransport,
        upstream: asyncio.Transport,
        first: bytes,
        record: AuditRecord,
    ) -> None:
        """Joins stream and connection until both are over."""
        done: asyncio.Future[SpliceResult] = asyncio.get_running_loop().create_future()
        splice = TransportSplice(upstream, lambda result: None if done.done() else done.set_result(result))
        splice.stream_side.connection_made(stream)
        stream.set_protocol(splice.stream_side)
        record.outcome = "upgraded"
        self.stats.upgrades_open += 1
        try:
            splice.start(first)
            stream.resume_reading()
            result = await done
            record.bytes_up, record.bytes_down = result.down, result.up
            if result.error is not None:
                record.reason = type(result.error).__name__
        except asyncio.CancelledError:
            stream.abort(ResetCode.CANCELLED)
            reset_transport(upstream)
            record.reason = "the agent stopped"
            raise
        finally:
            self.stats.upgrades_open -= 1
            # The stream's end went to the splice; aiohttp's protocol must hear of it too, to free what it holds.
            asyncio.get_running_loop().call_soon(protocol.connection_lost, None)

    # -- records ----------------------------------------------------------------------------------------------

    def _record(self, stream: StreamContext, request_id: str, method: str) -> AuditRecord:
        identity = stream.caller.identity
        return AuditRecord(
            request=request_id,
            session=stream.caller.session,
            user=identity.username,
            groups=len(identity.groups),
            method=method,
        )

    def _refused_head(self, protocol: KubeProtocol, refusal: Refusal) -> None:
        """A head that never became a request leaves its record, too."""
        stream: StreamContext = protocol.context
        protocol.requests += 1
        record = self._record(stream, f"{stream.caller.session}-{stream.stream_id}-{protocol.requests}", "")
        record.status, record.reason, record.outcome = refusal.status_code, refusal.message, "refused"
        self.stats.refused += 1
        self.stats.count(refusal.status_code)
        self.audit.write(record)


def _refuse_early(protocol: KubeProtocol) -> None:
    if protocol.early:
        raise bad_request("bytes arrived before the upgrade was answered")


def _notice_loss(upstream: aiohttp.ClientResponse) -> None:
    """Wakes the reader of a body whose connection is gone.

    aiohttp closes the connection at a garbled chunk and does not tell the body's reader, who would wait for ever.
    """
    content = upstream.content
    connection = upstream.connection
    closed = connection.protocol.closed if connection is not None and connection.protocol is not None else None
    if closed is None:
        return  # the whole body is here already

    def lost(_: object) -> None:
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection was closed within the body"))

    closed.add_done_callback(lost)


def _reset(protocol: KubeProtocol, error: Exception) -> NoReturn:
    """Ends the stream so that nobody takes what was sent for the whole."""
    transport = protocol.transport
    if isinstance(transport, StreamTransport):
        transport.cut()
    elif transport is not None:
        transport.abort()
    raise ConnectionResetError("the answer broke off") from error


def _phrase(status: int) -> str:
    """The reason phrase of the code, never the API server's own words: those could hold anything."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def _cause(error: BaseException) -> str:
    """A few safe words about a failed connect."""
    inner = getattr(error, "os_error", error)
    text = getattr(inner, "strerror", None)
    return text if isinstance(text, str) and text else type(inner).__name__

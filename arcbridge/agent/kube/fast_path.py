"""The short way for plain requests: one stream's protocol from its first byte until something that is not plain comes.

Reads like `proxy`, and must hold what is said there: who, may they, which headers, send, audit. What differs is that
nothing is built that a plain request does not need: no parser object, no task, no future, no response object. Whatever
is not plain is handed over, with every byte that came, to the general protocol, which then keeps the stream.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, cast

import structlog

from arcbridge.agent.audit import AuditRecord
from arcbridge.agent.kube.fast_path_parser import HEAD_MOST, plain_request, understood
from arcbridge.agent.kube.status import Refusal, status_bytes
from arcbridge.agent.kube.upstream_pool import UpstreamConnection
from arcbridge.mux.stream import StreamTransport

if TYPE_CHECKING:
    from arcbridge.agent.kube.proxy import KubeProxy, StreamContext

_SESSION = re.compile(r"[0-9A-Za-z.-]{1,128}")
"""Session names that may stand in a header as they are; the relay makes them."""

_log = structlog.get_logger("arcbridge.agent")


class FastPath(asyncio.Protocol):
    """One stream, while its requests are plain; one of them is under way at a time."""

    def __init__(self, proxy: KubeProxy, context: StreamContext) -> None:
        self._proxy = proxy
        self._context = context
        self._stream: StreamTransport | None = None
        self._prefix = f"{context.caller.session}-{context.stream_id}-"
        self._able = _SESSION.fullmatch(context.caller.session) is not None
        self._requests = 0
        self._later = bytearray()
        """What came while a request was under way."""
        self._reading_held = False
        self._writing_held = False
        self._record: AuditRecord | None = None
        """Of the request that is under way."""
        self._request = b""
        self._connection: UpstreamConnection | None = None
        self._opening: asyncio.Task[None] | None = None
        self._begun = False
        """Whether the caller has been given the head of an answer."""

    # -- the stream's protocol ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stream = cast(StreamTransport, transport)
        self._proxy.lanes.add(self)

    def view_received(self, view: memoryview) -> None:
        if self._record is None:
            self._read(bytes(view))
            return
        self._later += view
        if len(self._later) > HEAD_MOST and not self._reading_held:
            self._reading_held = True
            cast(StreamTransport, self._stream).pause_reading()

    def eof_received(self) -> bool:
        return False  # the stream closes itself and calls `connection_lost`

    def pause_writing(self) -> None:
        self._writing_held = True
        if self._connection is not None:
            self._connection.hold()

    def resume_writing(self) -> None:
        self._writing_held = False
        if self._connection is not None:
            self._connection.go_on()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stream = None
        self._proxy.lanes.discard(self)
        self._cut()

    # -- called by the proxy --------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self._record is not None

    def end(self) -> None:
        """The agent stops."""
        stream = self._stream
        if stream is None:
            return
        if self._record is not None:
            self._record.reason = "the agent stopped"
            self._cut()
            stream.abort()
        else:
            stream.close()

    # -- one request ----------------------------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        """A plain request goes on; anything else is for the general protocol."""
        proxy, caller = self._proxy, self._context.caller
        found = plain_request(data) if self._able and not caller.token_mode and proxy.has_room else None
        if found is None:
            self._hand_over(data)
            return
        target, identity = found[0].decode("ascii"), caller.identity
        try:
            info = understood(target)
            lines = caller.heads.outgoing(found[1], identity, proxy.api.authorization())
        except Refusal:
            lines = None  # the other way comes to the same answer, and gives it
        if lines is None:
            self._hand_over(data)
            return
        self._requests += 1
        request_id = f"{self._prefix}{self._requests}"
        self._record = AuditRecord(
            request=request_id,
            session=caller.session,
            user=identity.username,
            groups=len(identity.groups),
            method="GET",
            verb=info.verb,
            group=info.group,
            resource=info.resource,
            subresource=info.subresource,
            namespace=info.namespace,
            name=info.name,
            path=info.path_class,
        )
        stats = proxy.stats
        stats.requests += 1
        stats.in_flight += 1
        self._begun = False
        where = proxy.api.authority
        self._request = (
            f"GET {target} HTTP/1.1\r\nHost: {where}\r\nAudit-ID: {request_id}\r\n".encode("ascii") + lines + b"\r\n"
        )
        connection = proxy.api.kept.take()
        if connection is not None:
            self._ask(connection)
        else:
            self._open()

    def _hand_over(self, data: bytes) -> None:
        """From here on the stream is the general protocol's."""
        stream = self._stream
        assert stream is not None
        self._proxy.lanes.discard(self)
        self._stream = None
        protocol = self._proxy.general(self._context, self._requests)
        stream.set_protocol(protocol)
        try:
            protocol.connection_made(stream)
            if self._writing_held:
                protocol.pause_writing()
            protocol.data_received(data)
        except BaseException:
            stream.abort()
            raise

    def _open(self) -> None:
        self._opening = asyncio.get_running_loop().create_task(self._opened(), name="kept-connection")

    async def _opened(self) -> None:
        refusal = None
        try:
            connection = await self._proxy.api.kept.open()
        except Refusal as error:
            self._proxy.stats.unreachable += 1
            refusal = error
        except Exception as error:
            text = "a connection to the API server could not be made"
            asyncio.get_running_loop().call_exception_handler({"message": text, "exception": error})
            refusal = Refusal(500, "the agent failed; its log has the cause")
        self._opening = None
        if refusal is None:
            self._ask(connection)
        else:
            self._refuse(refusal)

    def _ask(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        connection.ask(self, self._request)
        if self._writing_held:
            connection.hold()

    # -- the answer (`upstream_pool.ResponseHandler`) ------------------------------------------------------------

    def answer_begins(self, status: int) -> None:
        self._begun = True
        assert self._record is not None
        self._record.status = status

    def answer_part(self, data: bytes | memoryview, payload: int) -> None:
        if self._record is not None and self._stream is not None:
            self._record.bytes_down += payload
            self._stream.write(data)

    def answer_over(self) -> None:
        self._connection = None
        self._finish()
        self._go_on()

    def answer_broke(self, refusal: Refusal | None) -> None:
        connection, self._connection = self._connection, None
        record, stream = self._record, self._stream
        if record is None or stream is None:
            return
        if self._begun:
            record.reason = "the API server's answer broke off"
            self._cut()
            stream.cut()  # nobody may take what was sent for the whole
        elif refusal is None and connection is not None and connection.used:
            # A kept connection that has died of old age; a GET may be sent again, on a new one.
            self._open()
        else:
            self._refuse(refusal or Refusal(502, "the API server closed the connection without a usable answer"))

    # -- the end of a request -------------------------------------------------------------------------------------

    def _refuse(self, refusal: Refusal) -> None:
        record, stream, stats = self._record, self._stream, self._proxy.stats
        assert record is not None
        assert stream is not None
        record.status, record.reason, record.outcome = refusal.status_code, refusal.message, "refused"
        stats.refused += 1
        log = _log.bind(session=record.session, stream=self._context.stream_id, request=record.request)
        log.warning("request failed", reason=refusal.message)
        stream.write(status_bytes(refusal, request_id=record.request))
        self._finish()
        self._go_on()

    def _cut(self) -> None:
        """The request under way, if there is one, ends here, at whichever side."""
        if self._record is None:
            return
        self._record.outcome = "cut"
        self._proxy.stats.cut += 1
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.leave()
        self._finish()

    def _finish(self) -> None:
        record, self._record = self._record, None
        assert record is not None
        stats = self._proxy.stats
        stats.in_flight -= 1
        if record.status:
            stats.count(record.status)
        self._request = b""
        self._proxy.audit.write(record)

    def _go_on(self) -> None:
        """The next request may be here already."""
        stream = self._stream
        if stream is None or not self._later:
            return
        data, self._later = bytes(self._later), bytearray()
        self._read(data)
        if self._reading_held:
            self._reading_held = False
            stream.resume_reading()

"""Carries an upgrade (exec, attach, port-forward) to a cluster, and joins both sides once the cluster has switched.

The connection of a caller that asks for an upgrade carries no other request. Until the cluster's 101 nothing of it is
read, so no byte that came too early reaches any stream; any other answer than 101 ends it. Invariant: a caller's
connection is joined to a stream of the session of its own tokens, behind a 101 alone.
"""

from __future__ import annotations

import asyncio
from typing import Final, cast

from aiohttp import web

from arcbridge.client.serving.gateway.exchange import headers_of_request, reason
from arcbridge.client.session.session_manager import TARGET
from arcbridge.errors import ArcbridgeError, RemoteProtocolError, Unreachable
from arcbridge.mux.session import MuxSession
from arcbridge.mux.splice import SpliceResult, TransportSplice, reset_transport
from arcbridge.mux.stream import StreamTransport
from arcbridge.tasks import within
from arcbridge.wire.frames import ResetCode

ANSWER_DEADLINE: Final = 60.0
"""Seconds for the cluster to answer an upgrade; the agent gives its API server less."""
MAX_HEAD: Final = 64 * 1024
"""Bytes of the head of that answer."""
_END: Final = b"\r\n\r\n"


class UpgradeAnswer(asyncio.Protocol):
    """The stream's protocol until its answer's head is complete; then the stream is paused."""

    def __init__(self) -> None:
        self.head: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        """What came up to the end of the head and behind it."""
        self._received = bytearray()
        self._stream: StreamTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stream = cast(StreamTransport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if _END in self._received and not self.head.done():
            cast(StreamTransport, self._stream).pause_reading()
            self.head.set_result(bytes(self._received))
        elif len(self._received) > MAX_HEAD and not self.head.done():
            self.head.set_exception(RemoteProtocolError("the head of the answer is too long"))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.head.done():
            self.head.set_exception(exc or RemoteProtocolError("the stream ended before its answer"))


async def upgrade(request: web.BaseRequest, session: MuxSession, cluster: str, target: str) -> SpliceResult:
    """Ask for an upgrade, and carry what is switched to until both sides are over; owns the caller's connection from
    the cluster's answer on. `target`: path and query at the API server.

    Raises ArcbridgeError before there is an answer, and ConnectionResetError.
    """
    caller = request.transport
    if not isinstance(caller, asyncio.Transport):
        raise ConnectionResetError("the caller is gone")
    caller.pause_reading()
    answer = UpgradeAnswer()
    stream = session.open(TARGET, answer)
    joined = False
    done: asyncio.Future[SpliceResult] = asyncio.get_running_loop().create_future()
    try:
        stream.write(_head(request, target))
        try:
            late = Unreachable(f'cluster "{cluster}" did not answer the upgrade in time; try again later')
            async with within(ANSWER_DEADLINE, late):
                received = await answer.head
        except ArcbridgeError as error:
            raise reason(stream.error or error, cluster) from error
        switched = received.startswith(b"HTTP/1.1 101 ")
        joined = True
        splice = _CallerSplice(caller, done, switched=switched)
        splice.stream_side.connection_made(stream)
        stream.set_protocol(splice.stream_side)
        caller.write(received)
        splice.start()
        stream.resume_reading()
        # What does not switch is one short answer, and the agent ends the stream behind it.
        async with within(None if switched else ANSWER_DEADLINE, ConnectionResetError("the answer did not end")):
            return await done
    except BaseException:
        stream.abort(ResetCode.CANCELLED)
        if joined:
            reset_transport(caller)
        raise


def _head(request: web.BaseRequest, target: str) -> bytes:
    """Write the request anew, without the caller's tokens."""
    headers = headers_of_request(request)
    headers["Host"] = "kubernetes"
    headers["Connection"] = "Upgrade"
    headers["Upgrade"] = request.headers["Upgrade"]
    lines = [f"{request.method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape")


class _CallerSplice(TransportSplice):
    """Joins a caller's connection to a stream; where the cluster has not switched, in the caller's direction alone."""

    def __init__(self, caller: asyncio.Transport, done: asyncio.Future[SpliceResult], *, switched: bool) -> None:
        super().__init__(caller, lambda result: None if done.done() else done.set_result(result))
        self._switched = switched

    def buffer_updated(self, nbytes: int) -> None:
        """Carry what the caller sent; behind an answer that does not switch it is dropped, because it may be another
        caller's request: a tool may use one connection for many."""
        if self._switched:
            super().buffer_updated(nbytes)

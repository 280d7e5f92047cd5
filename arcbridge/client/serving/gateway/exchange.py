"""Carries one request to a cluster over a stream of its caller's session, and the answer back.

aiohttp speaks on both sides, so that each message is parsed whole and written anew: the gateway alone decides what a
request is and where it ends, and no program behind it does. Each request has a stream of its own. Invariant: an answer
that was cut is a reset of the caller's connection, never its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import aiohttp
from aiohttp import web
from aiohttp.client_proto import ResponseHandler
from multidict import CIMultiDict
from yarl import URL

from arcbridge.client.serving.endpoint import answer_to_reset
from arcbridge.client.serving.gateway.caller_tokens import RELAY_HEADER, SUBPROTOCOLS, other_subprotocols
from arcbridge.client.session.refusal import of_session
from arcbridge.client.session.session_manager import TARGET
from arcbridge.errors import ArcbridgeError, ConnectionLost, StreamReset
from arcbridge.http_fields import HOP_BY_HOP
from arcbridge.mux.session import MuxSession
from arcbridge.mux.splice import reset_transport
from arcbridge.mux.stream import StreamTransport
from arcbridge.tasks import cancel_and_wait
from arcbridge.wire.frames import ResetCode

MAX_LINE: Final = 64 * 1024
"""Bytes of a request line, and of one header: tokens with groups and long selectors exceed the usual 8 KiB."""
BUFFER: Final = 64 * 1024
"""Bytes of a body at twice which its sender is paused."""

_HOP: Final = HOP_BY_HOP | {"proxy-authenticate", "proxy-authorization"}
"""Headers of one connection alone."""
_OWN: Final = frozenset({"authorization", RELAY_HEADER.lower(), "host", "expect"})
"""Headers of a request that are for this gateway."""
_NOT_ADDED: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


def headers_of_request(request: web.BaseRequest) -> CIMultiDict[str]:
    """Return the headers of a request that go on to the cluster; none of them has a token of the caller's."""
    headers = _end_to_end(request.headers, _OWN)
    if headers.popall(SUBPROTOCOLS, None) and (others := other_subprotocols(request.headers)):
        headers[SUBPROTOCOLS] = ", ".join(others)
    return headers


def _end_to_end(headers: Mapping[str, str], but: frozenset[str] = frozenset()) -> CIMultiDict[str]:
    dropped = {*_HOP, *but}
    for name, value in headers.items():
        if name.lower() == "connection":
            dropped |= {option.strip().lower() for option in value.split(",")}
    return CIMultiDict([(name, value) for name, value in headers.items() if name.lower() not in dropped])


async def exchange(
    request: web.BaseRequest, session: MuxSession, cluster: str, target: str, prefix: str
) -> web.StreamResponse:
    """Carry a request out; `target`: path and query at the API server, `prefix`: what stands before it at the gateway.

    Raises ArcbridgeError before an answer has begun, and ConnectionResetError where one was cut.
    """
    connector, body = _OneStream(session), _CallersBody(request)
    client = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=_NOT_ADDED,
        timeout=aiohttp.ClientTimeout(None),
        read_bufsize=BUFFER,
        max_line_size=MAX_LINE,
        max_field_size=MAX_LINE,
    )
    async with client:
        try:
            try:
                answer = await client.request(
                    request.method,
                    URL(f"http://kubernetes{target}", encoded=True),
                    headers=headers_of_request(request),
                    data=body.chunks() if request.body_exists else None,
                    allow_redirects=False,
                )
            except (aiohttp.ClientError, ArcbridgeError, OSError) as error:
                lost = connector.stream.error if connector.stream is not None else error
                raise reason(lost, cluster) from error
            return await _pass_on(request, answer, prefix)
        except BaseException:
            if connector.stream is not None:
                connector.stream.abort(ResetCode.CANCELLED)
            raise
        finally:
            await body.end()


class _OneStream(aiohttp.BaseConnector):
    """Opens a stream for one request. aiohttp would repeat a PUT that got no answer; here it gets no second one."""

    def __init__(self, session: MuxSession) -> None:
        super().__init__()
        self._session = session
        self.stream: StreamTransport | None = None

    async def _create_connection(self, *_: Any) -> ResponseHandler:
        if self.stream is not None:
            raise ConnectionLost("the stream ended before its answer")
        protocol = ResponseHandler(asyncio.get_running_loop())
        self.stream = self._session.open(TARGET, protocol)
        return protocol


class _CallersBody:
    """The body of a request, read once, and no further than its answer needs."""

    def __init__(self, request: web.BaseRequest) -> None:
        self._request = request
        self._reader: asyncio.Task[Any] | None = None
        """What reads at this moment."""

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield what arrives, as it arrives; a caller that waits for `100 Continue` gets it first."""
        request = self._request
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while True:
            self._reader = asyncio.current_task()
            try:
                chunk = await request.content.readany()
            finally:
                self._reader = None
            if not chunk:
                return
            yield chunk

    async def end(self) -> None:
        """Read no more: what is left behind an early answer is read by aiohttp's server, and two may not wait at
        once."""
        if self._reader is not None:
            await cancel_and_wait(self._reader)


async def _pass_on(request: web.BaseRequest, answer: aiohttp.ClientResponse, prefix: str) -> web.StreamResponse:
    headers = _end_to_end(answer.headers)
    place = headers.get("Location", "")
    if place.startswith("/") and not place.startswith("//"):
        headers["Location"] = prefix + place  # the API server does not know that it stands behind a prefix
    headers["Server"] = "arcbridge"
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
    await response.prepare(request)
    try:
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
    except (aiohttp.ClientError, ArcbridgeError) as error:
        if isinstance(request.transport, asyncio.Transport):
            reset_transport(request.transport)
        raise ConnectionResetError("the answer was cut") from error
    await response.write_eof()
    return response


def reason(lost: Exception | None, cluster: str) -> ArcbridgeError:
    """Return why there is no answer, in the user's words; `lost`: how the stream ended, None: in order."""
    if (known := answer_to_reset(lost, cluster)) is not None:
        return known
    if isinstance(lost, ArcbridgeError) and not isinstance(lost, StreamReset):
        return of_session(lost, cluster)
    return StreamReset(
        ResetCode.TRUNCATED,
        f'cluster "{cluster}" did not answer the request, which may have been done; look before you send it again',
    )

"""Upgrades (exec, attach, port-forward, cp): one fresh connection to the API server each, spliced after a 101.

A failed upgrade that left a usable, authenticated connection behind was CVE-2018-1002105. Hence: the connection is
made for this one request and never used again; only a 101 that names the asked protocol joins the two sides; any
other answer is read to its end here (bounded), passed on, and both sides are closed. Bytes that the caller sends
before the 101 belong to no protocol that was agreed on: they are an error.

After the 101 nothing is parsed: WebSocket and SPDY frames are opaque here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from arcbridge.agent.kube.impersonation import Headers, RawHeaders, connection_tokens
from arcbridge.agent.kube.request_info import RequestInfo
from arcbridge.agent.kube.status import Refusal, bad_request

PROTOCOLS = {"websocket": "websocket", "spdy/3.1": "SPDY/3.1"}
MAX_HEAD = 64 * 1024
MAX_BODY = 1 << 20
"""Bytes of an answer that is no 101; such answers are Status objects."""
ANSWER_DEADLINE = 60.0
"""Seconds for the head after the request was sent: the API server may wait for a kubelet to connect first."""
MAX_INFORMATIONAL = 5
_TOKEN_PROTOCOL = "base64url.bearer.authorization.k8s.io."


@dataclass(frozen=True, slots=True)
class Asked:
    """What the caller asked to upgrade to: `protocol` as in Upgrade, and the subprotocols it offers."""

    protocol: str
    subprotocols: tuple[str, ...]
    stream_versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: status, raw headers in order, and the bytes after the head (101) or the whole body (else)."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    rest: bytes


def asked_upgrade(method: str, headers: RawHeaders, info: RequestInfo, *, has_body: bool) -> Asked | None:
    """Answers what upgrade a head asks for, None when it asks for none; refuses those we do not carry."""
    upgrades = [value.decode("latin-1").strip() for name, value in headers if name.lower() == b"upgrade"]
    if not upgrades:
        return None
    protocol = PROTOCOLS.get(upgrades[0].lower()) if len(upgrades) == 1 else None
    if protocol is None or "upgrade" not in connection_tokens(headers):
        raise bad_request("the only upgrades that are carried are 'websocket' and 'SPDY/3.1'")
    if has_body or method not in ("GET", "POST") or (protocol == "websocket" and method != "GET"):
        raise bad_request("an upgrade is a GET, or with SPDY a POST, without a body")
    if not info.subresource:
        raise bad_request("upgrades exist for subresources such as exec, attach, portforward and proxy only")
    subprotocols = _listed(headers, b"sec-websocket-protocol")
    if any(name.lower().startswith(_TOKEN_PROTOCOL) for name in subprotocols):
        raise bad_request("a token in Sec-WebSocket-Protocol is not carried")
    return Asked(protocol, subprotocols, _listed(headers, b"x-stream-protocol-version"))


def upgrade_head(method: str, target: str, authority: str, headers: Headers, asked: Asked) -> bytes:
    """The bytes of the request. `headers` are the checked ones; only framing and the upgrade itself are added."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {authority}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if method == "POST":
        lines.append("Content-Length: 0")
    lines += ["Connection: Upgrade", f"Upgrade: {asked.protocol}"]
    if any("\r" in line or "\n" in line or "\x00" in line for line in lines):
        raise Refusal(500, "a header of the outgoing request is malformed; nothing was sent")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class AnswerReader(asyncio.Protocol):
    """The first protocol of an upgrade's connection: collects bytes until the answer is complete, bounded.

    Awaiting is for one task. After a 101 the transport is paused and its protocol may be replaced.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it

    def data_received(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > MAX_HEAD and self._transport is not None:
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self._ended = True
        self._wake()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._wake()

    async def answer(self, asked: Asked) -> Answer:
        """Reads one answer. Raises Refusal 502 or 504 for what is no HTTP or names another protocol."""
        try:
            async with asyncio.timeout(ANSWER_DEADLINE):
                return await self._answer(asked)
        except TimeoutError as error:
            raise Refusal(504, "the API server did not answer the upgrade in time") from error

    # -- inside -----------------------------------------------------------------------------------------------

    async def _answer(self, asked: Asked) -> Answer:
        for _ in range(MAX_INFORMATIONAL + 1):
            status, headers = parse_head(await self._head())
            if status == 101:
                check_switch(headers, asked)
                if self._transport is not None:
                    self._transport.pause_reading()
                return Answer(status, headers, bytes(self._data))
            if status >= 200:
                return Answer(status, headers, await self._body(status, headers))
        raise _garbled("too many informational answers")

    async def _head(self) -> bytes:
        while True:
            end = self._data.find(b"\r\n\r\n")
            if end >= 0 and end <= MAX_HEAD:
                head = bytes(self._data[: end + 2])
                del self._data[: end + 4]
                return head
            if len(self._data) > MAX_HEAD:
                raise _garbled("its head is too long")
            await self._more()

    async def _body(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        if status in (204, 304):
            return b""
        lengths = [value for name, value in headers if name.lower() == b"content-length"]
        encodings = [value.lower() for name, value in headers if name.lower() == b"transfer-encoding"]
        if encodings == [b"chunked"] and not lengths:
            return await self._chunks()
        if encodings or len(lengths) != 1 or not re.fullmatch(rb"[0-9]{1,9}", lengths[0]):
            raise _garbled("its body has no certain end")
        return await self._exactly(int(lengths[0]))

    async def _chunks(self) -> bytes:
        body = bytearray()
        while True:
            line = await self._line()
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,6}", line.split(b";")[0].strip()):
                raise _garbled("a chunk is malformed")
            size = int(line.split(b";")[0], 16)
            if size == 0:
                while await self._line():
                    pass  # trailers are dropped
                return bytes(body)
            body += await self._exactly(size)
            if len(body) > MAX_BODY or await self._exactly(2) != b"\r\n":
                raise _garbled("a chunk is malformed or the body too long")

    async def _line(self) -> bytes:
        while (end := self._data.find(b"\r\n")) < 0:
            if len(self._data) > MAX_HEAD:
                raise _garbled("a line is too long")
            await self._more()
        line = bytes(self._data[:end])
        del self._data[: end + 2]
        return line

    async def _exactly(self, size: int) -> bytes:
        if size > MAX_BODY:
            raise _garbled("the body is too long")
        while len(self._data) < size:
            await self._more()
        data = bytes(self._data[:size])
        del self._data[:size]
        return data

    async def _more(self) -> None:
        if self._ended:
            raise Refusal(502, "the API server closed the connection without an answer to the upgrade")
        if self._transport is not None and not self._transport.is_reading():
            self._transport.resume_reading()
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: [\x09\x20-\x7e\x80-\xff]*)?")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x09\x20-\x7e\x80-\xff]*)")


def parse_head(head: bytes) -> tuple[int, tuple[tuple[bytes, bytes], ...]]:
    """Parses a response head that ends with CRLF (RFC 9112 §4, §5), strictly: no folds, no bare CR or LF."""
    lines = head.split(b"\r\n")[:-1]
    match = _STATUS_LINE.fullmatch(lines[0]) if lines else None
    if match is None:
        raise _garbled("its status line is malformed")
    headers = []
    for line in lines[1:]:
        field = _HEADER_LINE.fullmatch(line)
        if field is None:
            raise _garbled("a header is malformed")
        headers.append((field[1], field[2].strip(b" \t")))
    return int(match[1]), tuple(headers)


def check_switch(headers: Sequence[tuple[bytes, bytes]], asked: Asked) -> None:
    """Refuses (502) a 101 that does not switch to exactly what was asked for (RFC 9110 §7.8)."""
    upgrades = [value.decode("latin-1").lower() for name, value in headers if name.lower() == b"upgrade"]
    if upgrades != [asked.protocol.lower()] or "upgrade" not in connection_tokens(headers):
        raise _garbled("it switched to another protocol than asked for")
    for name, offered in (
        (b"sec-websocket-protocol", asked.subprotocols),
        (b"x-stream-protocol-version", asked.stream_versions),
    ):
        chosen = _listed(headers, name)
        if len(chosen) > 1 or any(choice not in offered for choice in chosen):
            raise _garbled("it chose a subprotocol that was not offered")


def switch_head(headers: Sequence[tuple[bytes, bytes]], asked: Asked) -> bytes:
    """The 101 head for the caller: the API server's headers, with our own Connection and Upgrade."""
    dropped = {b"connection", b"upgrade", b"transfer-encoding", b"content-length", b"keep-alive"}
    lines = [b"HTTP/1.1 101 Switching Protocols"]
    lines += [name + b": " + value for name, value in headers if name.lower() not in dropped]
    lines += [b"Connection: Upgrade", b"Upgrade: " + asked.protocol.encode()]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _listed(headers: Sequence[tuple[bytes, bytes]], wanted: bytes) -> tuple[str, ...]:
    out: list[str] = []
    for name, value in headers:
        if name.lower() == wanted:
            out += [part.strip() for part in value.decode("latin-1").split(",") if part.strip()]
    return tuple(out)


def _garbled(what: str) -> Refusal:
    return Refusal(502, f"the API server's answer to the upgrade cannot be passed on: {what}")

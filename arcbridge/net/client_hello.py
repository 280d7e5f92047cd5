"""Reads what a ClientHello asks for, before any TLS code sees it.

The relay has one port and several handlers behind it. The ALPN extension of a connection's first message says which of
them it is for. `peek` is a pure function of the bytes that have arrived so far, to be called again with *more of the
same bytes*; it keeps nothing. Nothing here is trusted: the result picks the handler, while role and identity come from
the finished handshake.

Layouts: record header RFC 8446 §5.1, handshake header §4, ClientHello §4.1.2, extensions §4.2, ALPN RFC 7301 §3.1.
A ClientHello may be cut into several records (RFC 8446 §5.1), and with a post-quantum key share it is larger than
one TCP segment, so "not yet" is an ordinary answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

MAX_HELLO: Final = 16 * 1024
"""Bytes peeked at most. OpenSSL 3.5 with a post-quantum share sends 1.5 KiB; a browser at most about 2 KiB."""

MAX_RECORDS: Final = 8
"""Records in which a ClientHello may come: clients send one or two. Each may take two looks at all that is there, so a
hello in records of one byte would cost the square of its length (docs/threats.md#J26)."""

CONTROL: Final = b"arcbridge-control/1"
JOIN: Final = b"arcbridge-join/1"
HOP: Final = b"arcbridge-hop/1"
HTTP: Final = b"http/1.1"

_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_ALPN: Final = 16
_MAX_RECORD: Final = 1 << 14
_METHODS: Final = tuple(
    method + b" "
    for method in (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"TRACE")
)


class Reason(Enum):
    """Why bytes are not a ClientHello; also the name under which they are counted."""

    PLAIN_HTTP = "plain_http"
    SSLV2 = "sslv2"
    NOT_TLS = "not_tls"
    TOO_LARGE = "hello_too_large"
    MANY_RECORDS = "hello_many_records"
    MALFORMED = "hello_malformed"


@dataclass(frozen=True, slots=True)
class ClientHello:
    """A complete ClientHello: protocols in the client's order; empty when none are offered."""

    alpn: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Incomplete:
    """No answer before `need` bytes (counted from the first byte of the connection) have arrived."""

    need: int


@dataclass(frozen=True, slots=True)
class NotTls:
    """This will never be a ClientHello, whatever follows."""

    reason: Reason


class _Malformed(Exception):
    pass


def peek(data: bytes | memoryview) -> ClientHello | Incomplete | NotTls:
    """Read a ClientHello from the first bytes of a connection, at most `MAX_HELLO` of them.

    After `Incomplete(need)` call again once at least `need` bytes are there; `need` is always more than was given
    and never more than `MAX_HELLO`.
    """
    data = bytes(data[:MAX_HELLO])
    if not data:
        return Incomplete(5)
    if data[0] != _HANDSHAKE:
        return _what_else(data)
    # Gather the handshake message out of its records.
    message = bytearray()
    at = overhead = 0
    whole = 4
    while True:
        if len(data) < at + 5:
            return _incomplete(at + 5)
        kind, major, length = data[at], data[at + 1], data[at + 3] << 8 | data[at + 4]
        if kind != _HANDSHAKE or major != 3:
            return NotTls(Reason.MALFORMED if at else Reason.NOT_TLS)
        if not 0 < length <= _MAX_RECORD:
            return NotTls(Reason.MALFORMED)
        message += data[at + 5 : at + 5 + length]
        if message[:1] and message[0] != _CLIENT_HELLO:
            return NotTls(Reason.MALFORMED)
        at += 5 + length
        overhead += 5
        if overhead > 5 * MAX_RECORDS:
            return NotTls(Reason.MANY_RECORDS)
        if len(message) >= 4:
            whole = 4 + int.from_bytes(message[1:4], "big")
            # Judged as soon as it is known: a verdict must not depend on how much has come behind it.
            if overhead + whole > MAX_HELLO:
                return NotTls(Reason.TOO_LARGE)
            if len(message) >= whole:
                break
        if len(data) < at:
            # The record's end, or that of the message where the record claims more than it or than is ever peeked.
            least = len(data) + whole - len(message)
            return _incomplete(min(at, least) if len(message) >= 4 or at > MAX_HELLO else at)
    try:
        return _client_hello(bytes(message[4:whole]))
    except _Malformed:
        return NotTls(Reason.MALFORMED)


def _incomplete(need: int) -> Incomplete | NotTls:
    return NotTls(Reason.TOO_LARGE) if need > MAX_HELLO else Incomplete(need)


def _what_else(data: bytes) -> Incomplete | NotTls:
    if any(data.startswith(method) for method in _METHODS):
        return NotTls(Reason.PLAIN_HTTP)
    if any(method.startswith(data) for method in _METHODS):
        return Incomplete(len(data) + 1)
    if data[0] & 0x80:
        # SSLv2-compatible hello (RFC 5246 appendix E.2): two length bytes with the top bit set, then type 1.
        if len(data) < 3:
            return Incomplete(3)
        if data[2] == _CLIENT_HELLO:
            return NotTls(Reason.SSLV2)
    return NotTls(Reason.NOT_TLS)


class _Reader:
    """A cursor over a length-delimited structure; reading past its end is `_Malformed`."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise _Malformed
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        """Return an opaque vector whose length takes `size` bytes (RFC 8446 §3.4)."""
        return self.take(self.number(size))

    def more(self) -> bool:
        return self.at < len(self.data)


def _client_hello(body: bytes) -> ClientHello:
    reader = _Reader(body)
    reader.take(2 + 32)
    if len(reader.vector(1)) > 32:
        raise _Malformed
    suites = reader.vector(2)
    if len(suites) < 2 or len(suites) % 2:
        raise _Malformed
    if not reader.vector(1):
        raise _Malformed
    alpn: tuple[bytes, ...] = ()
    if not reader.more():
        return ClientHello(alpn)
    extensions = _Reader(reader.vector(2))
    if reader.more():
        raise _Malformed
    seen: set[int] = set()
    while extensions.more():
        kind = extensions.number(2)
        content = extensions.vector(2)
        if kind in seen:
            # RFC 8446 §4.2: at most one extension of a type. Two of them is how parsers are made to disagree.
            raise _Malformed
        seen.add(kind)
        if kind == _ALPN:
            alpn = _protocols(content)
    return ClientHello(alpn)


def _protocols(content: bytes) -> tuple[bytes, ...]:
    outer = _Reader(content)
    names = _Reader(outer.vector(2))
    if outer.more() or not names.more():
        raise _Malformed
    found = []
    while names.more():
        name = names.vector(1)
        if not name:
            raise _Malformed
        found.append(name)
    return tuple(found)

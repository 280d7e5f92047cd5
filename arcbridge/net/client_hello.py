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
JOIN: Final = b"arcbridge-join/2"
JOIN_1: Final = b"arcbridge-join/1"
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


def _client_hello(body: bytes) -> ClientHello:
    """Read the body in place: each connection pays for this, and a cursor with methods took 170 calls of a join."""
    try:
        at = 2 + 32
        if body[at] > 32:
            raise _Malformed
        at += 1 + body[at]
        suites = body[at] << 8 | body[at + 1]
        if suites < 2 or suites % 2:
            raise _Malformed
        at += 2 + suites
        if not body[at]:
            raise _Malformed
        at += 1 + body[at]
        size = len(body)
        if at == size:
            return ClientHello(())
        if at + 2 + (body[at] << 8 | body[at + 1]) != size:
            raise _Malformed
        return ClientHello(_extensions(body, at + 2, size))
    except IndexError as error:  # a length that leads behind the end
        raise _Malformed from error


def _extensions(body: bytes, at: int, size: int) -> tuple[bytes, ...]:
    """Return the protocols of the extensions from `at` on."""
    alpn: tuple[bytes, ...] = ()
    seen: set[int] = set()
    while at < size:
        kind, end = body[at] << 8 | body[at + 1], at + 4 + (body[at + 2] << 8 | body[at + 3])
        if end > size or kind in seen:
            # RFC 8446 §4.2: at most one extension of a type. Two of them is how parsers are made to disagree.
            raise _Malformed
        seen.add(kind)
        if kind == _ALPN:
            alpn = _protocols(body[at + 4 : end])
        at = end
    return alpn


def _protocols(content: bytes) -> tuple[bytes, ...]:
    size = len(content)
    if size < 3 or 2 + (content[0] << 8 | content[1]) != size:
        raise _Malformed
    found, at = [], 2
    while at < size:
        end = at + 1 + content[at]
        if not content[at] or end > size:
            raise _Malformed
        found.append(content[at + 1 : end])
        at = end
    return tuple(found)

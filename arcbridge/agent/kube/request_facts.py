"""Reads the head of a request once, into the facts that every decision about it uses.

The general parser's heads come through `read_facts`; a plain request's facts are made by `fast_path_parser`. The module
refuses nothing: why a head cannot be passed on is a fact as well (docs/threats.md#H1, docs/threats.md#H5). aiohttp's C
parser refuses most ambiguous heads by itself: both or two lengths, `+5`, bare LF, folded lines, a space before the
colon, no Host or two. What it accepts and must not go on is found here. Invariant: facts are never changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from aiohttp import HttpVersion10, HttpVersion11
from aiohttp.http import HttpVersion

from arcbridge.agent.kube.status import RequestRefusal, bad_request

RawHeaders = Sequence[tuple[bytes, bytes]]

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_NAME = re.compile(rb"[!#$%&'*+.^`|~0-9A-Za-z-]+")  # a token (RFC 9110 §5.6.2) without `_`
_UNCLEAN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\udc80-\udcff]")
"""Control characters, and bytes that are no UTF-8."""
_LENGTH = re.compile(rb"[0-9]{1,18}")
MAX_KNOWN_NAME = 64
"""Bytes of a header's name that is remembered: the same ones recur."""
_CLIENT = b"kubectl-command", b"kubectl-session"
_NO_VALUES: Mapping[bytes, list[bytes]] = MappingProxyType({})


class RequestFacts(NamedTuple):
    """What the head of a request says."""

    method: str
    target: str
    """Origin-form, as the caller sent it."""
    plain: bytes | None = None
    """The header lines of a plain request as they go on, each checked; None of every other."""
    client: bytes = b""
    """Header lines, those among them in which kubectl says what it does."""
    fields: Sequence[tuple[str, str, str]] = ()
    """Name, the same in lower case, and value of each header, in order; none of a plain request."""
    values: Mapping[bytes, list[bytes]] = _NO_VALUES
    """The values of each header by its lower-case name, as they came; none of a plain request."""
    impersonation: Sequence[tuple[str, str]] = ()
    """Lower-case name and value of each header of `--as`; none of a plain request."""
    options: frozenset[str] = frozenset()
    """Lower-case names that `Connection` lists."""
    version: HttpVersion = HttpVersion11
    length: str = ""
    """Content-Length; empty where there is none."""
    has_body: bool = False
    """Whether a body of more than 0 bytes is announced."""
    persistent: bool = True
    """Whether another request may follow (RFC 9112 §9.3). None does behind a chunked body: aiohttp takes the last of
    its trailers for a header of the request that comes next."""
    misframed: RequestRefusal | None = None
    """Why method, version and framing cannot be passed on (RFC 9112 §6). After a head that two parsers read
    differently, where the next one starts is not certain."""
    misnamed: RequestRefusal | None = None
    """Why a header cannot be passed on: names that parsers disagree on, values that are no clean text."""
    connection_line: bytes = b""
    """The Connection header of the answer, as the caller's own head has it (RFC 9112 §9.3)."""

    def first(self, name: bytes) -> str:
        """Return the first value of a header; empty where there is none."""
        return next(iter(self.values.get(name, ())), b"").decode("utf-8", "replace").strip()


def read_facts(
    method: str, target: str, headers: RawHeaders = (), version: HttpVersion = HttpVersion11, *, keep_alive: bool = True
) -> RequestFacts:
    """Return the facts of a head; `keep_alive`: what the parser makes of version and `Connection`, which is not all."""
    fields: list[tuple[str, str, str]] = []
    impersonation: list[tuple[str, str]] = []
    values: dict[bytes, list[bytes]] = {}
    misnamed = None
    for name, value in headers:
        lower, text_name, lower_name = _known_name(name) if len(name) <= MAX_KNOWN_NAME else _read_name(name)
        if lower in values:
            values[lower].append(value)
        else:
            values[lower] = [value]
        text = value.decode("utf-8", "surrogateescape")
        if text_name and not _UNCLEAN.search(text):
            field = (text_name, lower_name, text.strip(" \t"))
            fields.append(field)
            if lower[:12] == b"impersonate-":
                impersonation.append(field[1:])
        else:
            misnamed = misnamed or _misnamed(name, text)
    misframed = _misframed(method, version, values)
    length, chunked = "", b"transfer-encoding" in values
    if misframed is None and (lengths := values.get(b"content-length")):
        length = lengths[0].decode("ascii")
    options = connection_options(values)
    persistent = keep_alive and not chunked and "close" not in options  # aiohttp hears a `close` that is the last
    goes_on = b"" if version > HttpVersion10 else b"Connection: keep-alive\r\n"
    client = b"".join([b"%b: %b\r\n" % (name, value) for name in values if name in _CLIENT for value in values[name]])
    return RequestFacts(
        method,
        target,
        client=client,
        fields=fields,
        values=values,
        impersonation=impersonation,
        options=options,
        version=version,
        length=length,
        has_body=chunked or (length != "" and int(length) > 0),
        persistent=persistent,
        misframed=misframed,
        misnamed=misnamed,
        connection_line=goes_on if persistent else b"Connection: close\r\n",
    )


def _read_name(name: bytes) -> tuple[bytes, str, str]:
    """Return a header's name in lower case, and both as texts; those are empty where it cannot be passed on."""
    lower = name.lower()
    return (lower, name.decode(), lower.decode()) if _NAME.fullmatch(name) else (lower, "", "")


_known_name = lru_cache(maxsize=256)(_read_name)


def _misnamed(name: bytes, value: str) -> RequestRefusal:
    if b"_" in name:
        return bad_request("a header name contains '_', which some servers read as '-'")
    if not _NAME.fullmatch(name):
        return bad_request("a header name is malformed")
    if re.search(r"[\udc80-\udcff]", value):
        return bad_request("a header value is not UTF-8")
    return bad_request("a header value contains control characters")


def _misframed(method: str, version: HttpVersion, values: Mapping[bytes, list[bytes]]) -> RequestRefusal | None:
    if method not in METHODS:
        return RequestRefusal(405, "this method is not carried")
    if version not in (HttpVersion10, HttpVersion11):  # aiohttp takes a line without a version for HTTP/0.9
        return bad_request("the only versions that are carried are HTTP/1.0 and HTTP/1.1")
    encodings, lengths = values.get(b"transfer-encoding"), values.get(b"content-length", ())
    if encodings:
        if version < HttpVersion11:
            return bad_request("Transfer-Encoding does not exist in HTTP/1.0")
        if lengths or len(encodings) > 1 or encodings[0].strip(b" \t").lower() != b"chunked":
            return bad_request("the only transfer encoding that is carried is 'chunked'")
    if len(lengths) > 1 or (lengths and not _LENGTH.fullmatch(lengths[0])):
        return bad_request("Content-Length is malformed")
    hosts = len(values.get(b"host", ()))
    if hosts > 1 or (hosts == 0 and version >= HttpVersion11):
        return bad_request("exactly one Host header is needed")
    if any(value.strip(b" \t").lower() != b"100-continue" for value in values.get(b"expect", ())):
        return bad_request("the only expectation that is met is 100-continue")
    return None


def connection_options(values: Mapping[bytes, list[bytes]]) -> frozenset[str]:
    """Return the lower-case names that `Connection` (and the obsolete `Proxy-Connection`) list, in all their lines."""
    lines = [*values.get(b"connection", ()), *values.get(b"proxy-connection", ())]
    return frozenset([part.strip().lower() for line in lines for part in line.decode("utf-8", "replace").split(",")])


def values_by_name(headers: RawHeaders) -> dict[bytes, list[bytes]]:
    """Return the values of each header of an answer by its lower-case name."""
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        values.setdefault(name.lower(), []).append(value)
    return values


def listed(values: Mapping[bytes, list[bytes]], name: bytes) -> tuple[str, ...]:
    """Return the members of a comma-separated header, over all its lines."""
    lines = [value.decode("latin-1") for value in values.get(name, ())]
    return tuple([member for line in lines for part in line.split(",") if (member := part.strip())])

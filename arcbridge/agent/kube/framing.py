"""Decides which request heads are passed on at all: framing (docs/threats.md#H5) and paths (docs/threats.md#H6).

aiohttp's C parser refuses most ambiguous heads by itself: both or two lengths, `+5`, bare LF, folded lines, a space
before the colon, no Host or two. What it accepts and must not be passed on is refused here. Each refusal is 400 and
ends the connection: after a head that two parsers read differently, where the next one starts is not certain.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from aiohttp import HttpVersion10, HttpVersion11
from aiohttp.http import HttpVersion

from arcbridge.agent.kube.impersonation import RawHeaders
from arcbridge.agent.kube.status import RequestRefusal, bad_request

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
MAX_HEAD_LINE = 64 * 1024
"""Bytes of the request line and of each header: tokens with groups and long selectors exceed the usual 8 KiB."""
MAX_HEADERS = 1000
"""Header lines: 400 `--as-group` are real; Go's own bound is 1 MiB of head."""

_ILLEGAL_IN_TARGET = re.compile(r"[^\x21-\x7e]|[\\#]")


def check_target(target: str) -> None:
    """Refuse every target that is not a plain origin-form path (RFC 9112 §3.2.1), byte-identical from here on."""
    if not target.startswith("/"):
        raise bad_request("the request target must be a path")
    if _ILLEGAL_IN_TARGET.search(target):
        raise bad_request("the request target contains a character that must be escaped")
    path = unquote_to_bytes(target.partition("?")[0])
    if b"\x00" in path or b"\\" in path:
        raise bad_request("the request path contains an escaped NUL or backslash")
    # `;` too: some servers cut a segment there and would then see the dots alone.
    if any(segment.partition(b";")[0] in (b".", b"..") for segment in path.split(b"/")):
        raise bad_request("the request path contains '.' or '..' segments")


def check_framing(method: str, version: HttpVersion, headers: RawHeaders) -> None:
    """Refuse methods and versions that are not carried, and bodies whose end is not beyond doubt (RFC 9112 §6)."""
    if method not in METHODS:
        raise RequestRefusal(405, "this method is not carried")
    if version not in (HttpVersion10, HttpVersion11):  # aiohttp takes a line without a version for HTTP/0.9
        raise bad_request("the only versions that are carried are HTTP/1.0 and HTTP/1.1")
    encodings = [value for name, value in headers if name.lower() == b"transfer-encoding"]
    lengths = [value for name, value in headers if name.lower() == b"content-length"]
    if encodings:
        if version < HttpVersion11:
            raise bad_request("Transfer-Encoding does not exist in HTTP/1.0")
        if lengths or len(encodings) > 1 or encodings[0].strip(b" \t").lower() != b"chunked":
            raise bad_request("the only transfer encoding that is carried is 'chunked'")
    if len(lengths) > 1 or (lengths and not re.fullmatch(rb"[0-9]{1,18}", lengths[0])):
        raise bad_request("Content-Length is malformed")
    hosts = sum(name.lower() == b"host" for name, _ in headers)
    if hosts > 1 or (hosts == 0 and version >= HttpVersion11):
        raise bad_request("exactly one Host header is needed")
    expectations = [value for name, value in headers if name.lower() == b"expect"]
    if any(value.strip(b" \t").lower() != b"100-continue" for value in expectations):
        raise bad_request("the only expectation that is met is 100-continue")


def content_length(headers: RawHeaders) -> str:
    """Return the (checked) head's Content-Length; empty where it has none."""
    return next((value.decode("ascii") for name, value in headers if name.lower() == b"content-length"), "")


def has_body(headers: RawHeaders) -> bool:
    """Tell whether the (checked) head announces a body of more than 0 bytes."""
    for name, value in headers:
        lower = name.lower()
        if lower == b"transfer-encoding" or (lower == b"content-length" and int(value) > 0):
            return True
    return False

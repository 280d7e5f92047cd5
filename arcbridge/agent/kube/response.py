"""Reads the API server's answers: one reader for all of the agent's connections to it.

`read_head` reads a response head as strictly as RFC 9112 §4 and §5 allow and answers what of it goes to the caller;
`ChunkedBody` follows a chunked body (§7.1) through the buffers it arrives in. Neither keeps a byte of a body.
Invariant: an answer whose end is not beyond doubt is refused (502) and never passed on (docs/threats.md#H9).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus

from arcbridge.agent.kube.request_facts import connection_options, values_by_name
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upgrade import UpgradeRequest, check_switch, switch_lines
from arcbridge.http_fields import HOP_BY_HOP

MAX_HEAD = 64 * 1024
"""Bytes of a response head, as `framing.MAX_HEAD_LINE` allows for one line."""
CHUNKED = -1
"""`ResponseHead.length` of a chunked body."""
_START = b"HTTP/1.1 "
_MAX_SIZE_LINE = 18
_MAX_TRAILERS = 64 * 1024

# Possessive throughout: what follows a repetition can never be part of it, so going back would only cost time.
_HEAD = re.compile(  # the status, and the header lines
    rb"HTTP/1\.1 ([1-5][0-9]{2})(?: [\t -~\x80-\xff]*+)?\r\n"
    rb"((?:[A-Za-z0-9!#$%&'*+.^_`|~-]++:[\t -~\x80-\xff]*+\r\n)*+)\r\n"
)
_FIELD = re.compile(rb"(?m)^([^:\r\n]++):[ \t]*+([^\r\n]*+)\r\n")
_NOTED = re.compile(
    # The fields that decide how a response is passed on: framing, everything in HOP_BY_HOP, and the server's name.
    rb"\n(content-length|transfer-encoding|server|connection|keep-alive|te|trailer|upgrade|http2-settings|proxy-[^:\r\n]*+)"
    rb":[ \t]*+([^\r\n]*+)\r",
    re.IGNORECASE,
)
_LENGTH = re.compile(rb"[0-9]{1,18}")
_TRAILER = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]++:[\t -~\x80-\xff]*+\r\n")
_BARE_LINE_END = re.compile(rb"(?<!\r)\n")
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")


@dataclass(slots=True)
class ResponseHead:
    """A response head that may be passed on. It is not changed, and not frozen because one is made for each answer."""

    status: int
    lines: bytes
    """The status line and the header lines for the caller, each with its CRLF; the blank line is not among them."""
    length: int
    """Bytes of the body, or CHUNKED."""
    keep: bool
    """Whether the connection may carry another request behind the body."""


def read_head(head: bytes, method: str = "GET", upgrade: UpgradeRequest | None = None) -> ResponseHead | None:
    """Read the head (blank line included) of the answer to a `method` request; None for an interim one (1xx).

    101 is an answer only where `upgrade` asked for it. Raises RequestRefusal 502 for a head that leaves a doubt: its
    body must have a certain end, one Content-Length or `chunked`, not both, not neither. A body that ends with its
    connection cannot be distinguished from one that was cut.
    """
    found = _HEAD.fullmatch(head)
    if found is None:
        raise unusable_answer()
    status, lines = int(found[1]), found[2]
    if status == 101 and upgrade is not None:
        fields = _fields(lines)
        check_switch(fields, upgrade)
        return ResponseHead(101, _status_line(101) + switch_lines(fields, upgrade), 0, False)
    if 100 <= status < 200 and status != 101:
        # RFC 9110, 8.6 and RFC 9112, 6.1: it announces no body. One that does may be read otherwise by another reader.
        if any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in _NOTED.findall(head)):
            raise _doubtful("an interim answer announces a body")
        return None
    lengths: list[bytes] = []
    encodings: list[bytes] = []
    verbatim, names_server = status >= 200, False
    for name, value in _NOTED.findall(head):
        lower = name.lower()
        if lower == b"content-length":
            lengths.append(value.strip(b" \t"))
        elif lower == b"transfer-encoding":
            encodings.append(value.strip(b" \t").lower())
        elif lower == b"server":
            names_server = True
        else:
            verbatim = False
    bodiless = method == "HEAD" or status in (204, 304)
    if status < 200:
        raise _doubtful("it switched protocols unasked")
    if len(lengths) > 1 or (lengths and encodings) or (lengths and not _LENGTH.fullmatch(lengths[0])):
        raise _doubtful("its length is ambiguous")
    if (encodings and encodings != [b"chunked"]) or not (bodiless or lengths or encodings):
        raise _doubtful("its body has no certain end")
    length = 0 if bodiless else CHUNKED if encodings else int(lengths[0])
    if verbatim and not bodiless:
        if not names_server:
            lines += b"Server: arcbridge\r\n"
        return ResponseHead(status, _status_line(status) + lines, length, True)
    fields = _fields(lines)
    named = connection_options(values_by_name(fields))
    lines = b"".join(b"%b: %b\r\n" % field for field in fields if not _is_dropped(field[0].decode().lower(), named))
    if not names_server or "server" in named:
        lines += b"Server: arcbridge\r\n"
    if length == CHUNKED:
        lines += b"Transfer-Encoding: chunked\r\n"
    # An answer that may have no body and yet announces one: were it to come late, it would be read as the answer to the
    # next request, another user's perhaps.
    announced = bodiless and bool(encodings or any(value.strip(b"0") for value in lengths))
    keep = not announced and "close" not in named
    return ResponseHead(status, _status_line(status) + lines, length, keep)


def begins_well(head: bytes, start: int) -> bool:
    """Return whether a head may still be read when the rest of it comes; the part before `start` was found to be good.

    Of a line end that is no CRLF, or of another protocol, the blank line that ends a head would never come.
    """
    return _START.startswith(head[: len(_START)]) and _BARE_LINE_END.search(head, max(0, start - 1)) is None


class ChunkedBody:
    """Follows a chunked body through the buffers it arrives in, and keeps none of it. Trailers are dropped."""

    __slots__ = ("_left", "_line", "_next", "_trailer_held", "_trailers", "broken", "over", "payload", "spans")

    def __init__(self) -> None:
        self._left = 0
        """Bytes of the present chunk that have not arrived."""
        self._line = b""
        """The beginning of a line that the last buffer cut."""
        self._next = "size"
        self._trailers = 0
        """Bytes of trailer lines so far."""
        self._trailer_held = False
        """A trailer was withheld, so that the final blank line is ours to write."""
        self.payload = 0
        """Bytes of the body so far, without framing."""
        self.spans: list[tuple[int, int]] = []
        """Where in the last buffer payload lies: (start, end) pairs."""
        self.over = False
        """The body is complete."""
        self.broken = False
        """A byte was not as RFC 9112 §7.1 demands; nothing behind it may be used."""

    def feed(self, buffer: bytearray, start: int, end: int) -> tuple[int, bytes]:
        """Read `buffer[start:end]`; answer where the part to pass on ends, and bytes to pass on behind it."""
        position = stop = start
        self.spans.clear()
        while position < end and not self.over:
            if self._left:
                taken = min(self._left, end - position)
                self._left -= taken
                self.payload += taken
                self.spans.append((position, position + taken))
                position += taken
                stop = position
                continue
            found = buffer.find(b"\n", position, end)
            behind = found + 1 if found >= 0 else end
            line = self._line + buffer[position:behind]
            position = behind
            if len(line) > (_MAX_SIZE_LINE if self._next != "trailer" else _MAX_TRAILERS):
                self.broken = True
                return stop, b""
            if found < 0:
                self._line = bytes(line)
                if self._next == "trailer":
                    self._trailer_held = True
                else:
                    stop = position
                break
            self._line = b""
            if not self._accept_line(bytes(line)):
                self.broken = True
                return stop, b""
            if not self._trailer_held:
                stop = position
        return stop, b"\r\n" if self.over and self._trailer_held else b""

    def _accept_line(self, line: bytes) -> bool:
        """Take one complete line; whether it is as it must be."""
        if self._next == "size":
            size = _SIZE.fullmatch(line)
            if size is None:
                return False
            self._left = int(size[1], 16)
            self._next = "end" if self._left else "trailer"
            return True
        if self._next == "end":
            self._next = "size"
            return line == b"\r\n"
        if line == b"\r\n":
            self.over = True
            self._next = "over"
            return True
        self._trailer_held = True
        self._trailers += len(line)
        return self._trailers <= _MAX_TRAILERS and _TRAILER.fullmatch(line) is not None


def unusable_answer() -> RequestRefusal:
    """Return the refusal for an answer that did not come, or that is no HTTP."""
    return RequestRefusal(502, "the API server closed the connection without a usable answer")


def _doubtful(what: str) -> RequestRefusal:
    return RequestRefusal(502, f"the API server's answer cannot be passed on: {what}")


def _is_dropped(name: str, named: frozenset[str]) -> bool:
    """Return whether a field does not go to the caller; `named`: the options of `Connection`."""
    # Without a length that it was sent with the caller would wait for the connection's end.
    return name in HOP_BY_HOP or name.startswith("proxy-") or (name in named and name != "content-length")


def _fields(lines: bytes) -> list[tuple[bytes, bytes]]:
    return [(name, value.rstrip(b" \t")) for name, value in _FIELD.findall(lines)]


@cache  # of 500 codes
def _status_line(status: int) -> bytes:
    """With the reason phrase of the code, never the API server's own words: those could hold anything."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()

"""The requests that most of kubectl's are, and their answers, read without a general HTTP parser.

A *plain* request is one complete `GET` without a body, HTTP/1.1, in printable ASCII, with one Host and without any
header that concerns framing, the connection, upgrades, or whom it speaks for. What is plain is listed here and nothing
is guessed: anything else, a line end of another kind or one byte behind the head included, is not plain and goes
through the general parser with all its checks (`server`, `proxy`). So two parsers cannot differ about a plain request.

An answer is read as strictly: RFC 9112 §4 and §7.1, one length or `chunked`, and a chunk's size line holds digits only.
Its body is passed on in the very bytes that were checked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus

from arcbridge.agent.kube.answer import answer_headers
from arcbridge.agent.kube.framing import check_target
from arcbridge.agent.kube.impersonation import (
    HOP_BY_HOP,
    REBUILT,
    Headers,
    Subject,
    check_impersonated,
    connection_tokens,
    impersonated_headers,
    speaks_for_somebody,
)
from arcbridge.agent.kube.request_info import RequestInfo, request_info
from arcbridge.agent.kube.status import Refusal
from arcbridge.identity.claims import Identity

HEAD_MOST = 16 * 1024
"""Bytes of a plain head; kubectl's has 300 to 600. Longer ones go through the general parser."""
ANSWER_HEAD_MOST = 64 * 1024
"""Bytes of an answer's head, as `framing.MAX_HEAD_LINE` allows for one line."""
KEPT_LINES = 128
"""Header lines that a session remembers: a client library sends a few different ones, over and over."""
KEPT_LINE_MOST = 512
"""Bytes of a line that is remembered."""
_SIZE_LINE_MOST = 18
_TRAILERS_MOST = 64 * 1024

# Possessive throughout: what follows a repetition can never be part of it, so going back would only cost time.
_REQUEST = re.compile(
    rb"GET (/[!-~]{0,4000}+) HTTP/1\.1\r\n((?:[A-Za-z0-9!#$%&'*+.^`|~-]++:[\t -~]*+\r\n)++)\r\n"  # no `_` in names
)
_FIELD = re.compile(rb"([^:\r\n]++):[ \t]*+([^\r\n]*+)\r\n")
_STATUS = re.compile(rb"HTTP/1\.1 ([1-9][0-9]{2})(?: [\t -~\x80-\xff]*+)?\r\n")
_FIELDS = re.compile(rb"(?:[A-Za-z0-9!#$%&'*+.^_`|~-]++:[\t -~\x80-\xff]*+\r\n)*+\r\n")
_NOTED = re.compile(
    # What an answer's head is searched for: framing, whatever is HOP_BY_HOP, and the server's name.
    rb"\n(content-length|transfer-encoding|server|connection|keep-alive|te|trailer|upgrade|http2-settings|proxy-[^:\r\n]*+)"
    rb":[ \t]*+([^\r\n]*+)\r",
    re.IGNORECASE,
)
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
_LENGTH = re.compile(rb"[0-9]{1,18}")

_NOT_PLAIN = frozenset(name.encode() for name in (HOP_BY_HOP | REBUILT) - {"host"}) | {b"authorization"}
_NOT_PLAIN_BEGIN = (b"impersonate", b"proxy-")
CHUNKED = -1
"""An answer's length where it is chunked."""


# -- requests -----------------------------------------------------------------------------------------------------


def plain_request(data: bytes) -> tuple[bytes, bytes] | None:
    """The target and the header lines of `data`, if it is one plain request and nothing else.

    Each header line still has to pass `passed_line`, and one of them must be Host.
    """
    if len(data) > HEAD_MOST:
        return None
    found = _REQUEST.fullmatch(data)
    return None if found is None else (found[1], found[2])


def passed_line(line: bytes) -> bytes | None:
    """One of the header lines that `plain_request` answered, as it goes on, or empty where it is dropped; None where it
    is not plain.
    """
    name, _, value = line.partition(b":")
    lower = name.lower()
    if lower == b"connection" and value.strip(b" \t").lower() == b"keep-alive":
        return b""  # what HTTP/1.1 means anyway
    if lower in _NOT_PLAIN or lower.startswith(_NOT_PLAIN_BEGIN):
        return None
    if speaks_for_somebody(lower.decode("ascii")):
        return b""
    return b"%b: %b\r\n" % (name, value.strip(b" \t"))


@lru_cache(maxsize=1024)
def _understood(target: str) -> RequestInfo:
    check_target(target)
    return request_info("GET", target)


def understood(target: str) -> RequestInfo:
    """What a plain request asks for. Raises Refusal for a target that is not passed on."""
    if len(target) > 512:
        check_target(target)
        return request_info("GET", target)
    return _understood(target)


def subject_block(subject: Subject, authorization: str) -> bytes:
    """The header lines that make a request run as `subject`; without Host and Audit-ID, which differ.

    They are built and checked as for any request, then once more in the bytes that will be sent. Raises Refusal.
    """
    headers = impersonated_headers([], subject, request_id="0", authorization=authorization)
    headers = [header for header in headers if header[0] != "Audit-ID"]
    check_impersonated(headers, subject)
    return _serialised(headers)


def _serialised(headers: Headers) -> bytes:
    text = "".join(f"{name}: {value}\r\n" for name, value in headers)
    lines = text.split("\r\n")
    if lines.pop() or [tuple(line.split(": ", 1)) for line in lines] != headers:
        raise Refusal(500, "the outgoing request is not what was meant; nothing was sent")
    return text.encode()


class HeadCache:
    """Builds the outgoing header lines of one session, and remembers what became of a line, and whom the session is.

    That belongs to one identity and one credential of the agent's: when either is another one, it is made anew.
    """

    __slots__ = ("_authorization", "_identity", "_lines", "_subject")

    def __init__(self) -> None:
        self._identity: Identity | None = None
        self._authorization = ""
        self._subject = b""
        self._lines: dict[bytes, bytes] = {}

    def outgoing(self, block: bytes, identity: Identity, authorization: str) -> bytes | None:
        """What goes to the API server for the caller's header lines; None if they are not plain. Raises Refusal."""
        if identity is not self._identity or authorization != self._authorization:
            self._identity = None
            self._subject = subject_block(Subject.of(identity), authorization)
            self._identity, self._authorization = identity, authorization
        known = self._lines
        out = []
        hosts = 0
        lines = block.split(b"\r\n")
        lines.pop()  # behind the last line's end
        for line in lines:
            if line[:5].lower() == b"host:":
                hosts += 1
                continue
            passed = known.get(line)
            if passed is None:
                passed = passed_line(line)
                if passed is None:
                    return None
                if len(known) >= KEPT_LINES:
                    known.clear()
                if len(line) <= KEPT_LINE_MOST:
                    known[line] = passed
            out.append(passed)
        if hosts != 1:
            return None
        out.append(self._subject)
        made = b"".join(out)
        if made.lower().count(b"impersonate-user:") != 1:  # the last line before the request leaves
            raise Refusal(500, "the outgoing request does not carry the caller's identity; nothing was sent")
        return made


# -- answers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of an answer: what goes to the caller, how long the body is, whether the connection may be kept."""

    status: int
    head: bytes
    length: int
    """Bytes of the body, or CHUNKED."""
    keep: bool


def answer_of(head: bytes) -> Answer | None:
    """Reads the head of an answer to a GET, blank line included; None for an interim one (1xx but 101).

    Raises Refusal 502 where it leaves a doubt (H9).
    """
    status_line = _STATUS.match(head)
    if status_line is None or _FIELDS.fullmatch(head, status_line.end()) is None:
        raise _unusable()
    status = int(status_line[1])
    if 100 <= status < 200 and status != 101:
        return None
    lengths: list[bytes] = []
    encodings: list[bytes] = []
    usual, named = status >= 200, False
    for name, value in _NOTED.findall(head):
        lower = name.lower()
        if lower == b"content-length":
            lengths.append(value.strip(b" \t"))
        elif lower == b"transfer-encoding":
            encodings.append(value.strip(b" \t").lower())
        elif lower == b"server":
            named = True
        else:
            usual = False
    bodiless = status in (204, 304)
    length = 0
    if not bodiless and len(lengths) == 1 and not encodings and _LENGTH.fullmatch(lengths[0]):
        length = int(lengths[0])
    elif not bodiless and encodings == [b"chunked"] and not lengths:
        length = CHUNKED
    else:
        usual = False
    if usual:
        lines = head[status_line.end() : -2]
        keep = True
        if not named:
            lines += b"Server: arcbridge\r\n"
    else:
        fields = [(name, value.rstrip(b" \t")) for name, value in _FIELD.findall(head, status_line.end())]
        headers = answer_headers("GET", status, fields)  # raises where it is not to be passed on at all
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
        if length == CHUNKED:
            lines += b"Transfer-Encoding: chunked\r\n"
        keep = "close" not in connection_tokens(fields)
    return Answer(status, _status_line(status) + lines + b"\r\n", length, keep)


class ChunkedBody:
    """Follows a chunked body through the buffers it arrives in (RFC 9112 §7.1), and keeps none of it.

    `payload` counts the bytes without framing; `over` is set behind the last chunk, `broken` at the first byte that is
    not as it must be. Trailers are dropped.
    """

    __slots__ = ("_held", "_left", "_line", "_next", "_trailers", "broken", "over", "payload")

    def __init__(self) -> None:
        self._left = 0
        self._line = b""
        self._next = "size"
        self._trailers = 0
        self._held = False
        """Whether something behind the last chunk was kept back, so that the blank line is ours to write."""
        self.payload = 0
        self.over = False
        self.broken = False

    def feed(self, buffer: bytearray, start: int, end: int) -> tuple[int, bytes]:
        """Reads `buffer[start:end]`: up to where it is to be passed on, and bytes to pass on behind that.

        Afterwards look at `over` and `broken`: what lies behind the end of the body is nobody's.
        """
        position = stop = start
        while position < end and not self.over:
            if self._left:
                taken = min(self._left, end - position)
                self._left -= taken
                self.payload += taken
                position += taken
                stop = position
                continue
            found = buffer.find(b"\n", position, end)
            behind = found + 1 if found >= 0 else end
            line = self._line + buffer[position:behind]
            position = behind
            if len(line) > (_SIZE_LINE_MOST if self._next != "trailer" else _TRAILERS_MOST):
                self.broken = True
                return stop, b""
            if found < 0:
                self._line = bytes(line)
                if self._next == "trailer":
                    self._held = True
                else:
                    stop = position
                break
            self._line = b""
            if not self._line_read(bytes(line)):
                self.broken = True
                return stop, b""
            if not self._held:
                stop = position
        return stop, b"\r\n" if self.over and self._held else b""

    def _line_read(self, line: bytes) -> bool:
        """Takes one line that is complete; whether it is as it must be."""
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
        self._held = True
        self._trailers += len(line)
        return self._trailers <= _TRAILERS_MOST


_status_lines: dict[int, bytes] = {}


def _status_line(status: int) -> bytes:
    """With the reason phrase of the code, never the API server's own words: those could hold anything."""
    line = _status_lines.get(status)
    if line is None:
        try:
            phrase = HTTPStatus(status).phrase
        except ValueError:
            phrase = "Unknown"
        line = _status_lines[status] = f"HTTP/1.1 {status} {phrase}\r\n".encode()
    return line


def _unusable() -> Refusal:
    return Refusal(502, "the API server closed the connection without a usable answer")

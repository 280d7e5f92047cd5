"""Reads the requests that most of kubectl's are, without a general HTTP parser.

A *plain* request is one complete `GET` without a body, HTTP/1.1, in printable ASCII, with one Host and without any
header that concerns framing, the connection, upgrades, or who asks. It is a list of what is allowed and guesses
nothing: anything else, a line end of another kind or one byte behind the head included, goes through the general
parser (`server`). Invariant: what is plain, every HTTP parser reads alike, and each of its lines goes on as it would
from there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from arcbridge.agent.kube.impersonation import REBUILT, is_dropped
from arcbridge.agent.kube.request_facts import RequestFacts
from arcbridge.http_fields import HOP_BY_HOP

MAX_PLAIN_HEAD = 16 * 1024
"""Bytes of a plain head; kubectl's has 300 to 600. Longer ones go through the general parser."""
MAX_KNOWN_LINES = 48
"""Header lines that a session remembers, and as many whole blocks of them: a client library sends a few different
ones, over and over. Together they take at most some 150 KiB of a session."""
MAX_KNOWN_LINE = 640
"""Bytes of a line, and of a block, that is remembered: kubectl's blocks have 300 to 600."""

# Possessive throughout: what follows a repetition can never be part of it, so going back would only cost time.
_HEAD = re.compile(rb"GET (/[!-~]{0,4000}+) HTTP/1\.1\r\n((?s:.*))")  # the target, and all that follows its line
_LINES = re.compile(rb"(?:[A-Za-z0-9!#$%&'*+.^`|~-]++:[\t -~]*+\r\n)++\r\n")  # no `_` in names
_NOT_PLAIN = frozenset(name.encode() for name in HOP_BY_HOP | REBUILT) | {b"authorization"}
_NOT_PLAIN_BEGIN = (b"impersonate", b"proxy-")


@dataclass(slots=True)
class KnownLines:
    """What became of the header lines of one session. Lines and blocks are apart, because a line is no end of a head
    (docs/threats.md#H40)."""

    lines: dict[bytes, bytes | None] = field(default_factory=dict)
    """By a line without its line end: the line as it goes on; None where it is not plain."""
    blocks: dict[bytes, bytes | None] = field(default_factory=dict)
    """By all that follows a start line, to the blank line: the lines as they go on, never None."""


def plain_head(data: bytes, known: KnownLines) -> RequestFacts | None:
    """Return the facts of `data` if that is one plain request and nothing else. It reads and fills `known`."""
    head = _HEAD.match(data)
    if head is None:
        return None
    block = head[2]
    passed = known.blocks.get(block)
    if passed is None:
        passed = _passed_lines(block, known.lines) if len(data) <= MAX_PLAIN_HEAD else None
        if passed is None:
            return None
        _remember(known.blocks, block, passed)
    client = passed if b"Kubectl-" in passed else b""  # as kubectl writes it
    return RequestFacts("GET", head[1].decode("ascii"), passed, client)


def _passed_lines(block: bytes, known: dict[bytes, bytes | None]) -> bytes | None:
    """Return the lines of a block as they go on; None where one is not plain."""
    if _LINES.fullmatch(block) is None:
        return None
    passed, hosts = [], 0
    for line in block[:-4].split(b"\r\n"):
        if line[:5].lower() == b"host:":
            hosts += 1
            continue
        if line in known:
            outgoing = known[line]
        else:
            outgoing = passed_line(line)
            _remember(known, line, outgoing)
        if outgoing is None:
            return None
        passed.append(outgoing)
    return b"".join(passed) if hosts == 1 else None


def _remember(known: dict[bytes, bytes | None], lines: bytes, passed: bytes | None) -> None:
    if len(lines) <= MAX_KNOWN_LINE:
        if len(known) >= MAX_KNOWN_LINES:
            known.clear()
        known[lines] = passed


def passed_line(line: bytes) -> bytes | None:
    """Return one header line as it goes on to the API server, empty where it is dropped; None where it is not plain."""
    name, _, value = line.partition(b":")
    value, lower = value.strip(b" \t"), name.lower()
    if lower == b"connection" and value.lower() == b"keep-alive":
        return b""  # what HTTP/1.1 means anyway
    if lower in _NOT_PLAIN or lower.startswith(_NOT_PLAIN_BEGIN):
        return None
    return b"" if is_dropped(lower.decode("ascii")) else b"%b: %b\r\n" % (name, value)

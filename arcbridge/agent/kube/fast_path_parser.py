"""Reads the requests that most of kubectl's are, without a general HTTP parser.

A *plain* request is one complete `GET` without a body, HTTP/1.1, in printable ASCII, with one Host and without any
header that concerns framing, the connection, upgrades, or who asks. It is a list of what is allowed and guesses
nothing: anything else, a line end of another kind or one byte behind the head included, goes through the general
parser (`server`). Invariant: what is plain, every HTTP parser reads alike.
"""

from __future__ import annotations

import re

from arcbridge.agent.kube.authorize import RequestHead
from arcbridge.agent.kube.impersonation import HOP_BY_HOP, REBUILT, RawHeaders

MAX_PLAIN_HEAD = 16 * 1024
"""Bytes of a plain head; kubectl's has 300 to 600. Longer ones go through the general parser."""

# Possessive throughout: what follows a repetition can never be part of it, so going back would only cost time.
_REQUEST = re.compile(
    rb"GET (/[!-~]{0,4000}+) HTTP/1\.1\r\n((?:[A-Za-z0-9!#$%&'*+.^`|~-]++:[\t -~]*+\r\n)++)\r\n"  # no `_` in names
)
_NOT_PLAIN = frozenset(name.encode() for name in HOP_BY_HOP | REBUILT) | {b"authorization"}
_NOT_PLAIN_BEGIN = (b"impersonate", b"proxy-")


def plain_head(data: bytes) -> RequestHead | None:
    """Answer the head of `data` if that is one request of the plain shape and nothing else.

    `plain_fields` decides about its header lines.
    """
    if len(data) > MAX_PLAIN_HEAD:
        return None
    found = _REQUEST.fullmatch(data)
    return None if found is None else RequestHead("GET", found[1].decode("ascii"), block=found[2])


def plain_fields(fields: RawHeaders) -> bool:
    """Tell whether none of the header fields needs the general parser, and exactly one is Host."""
    hosts = 0
    for name, value in fields:
        lower = name.lower()
        if lower == b"host":
            hosts += 1
        elif lower == b"connection" and value.lower() == b"keep-alive":
            continue  # what HTTP/1.1 means anyway
        elif lower in _NOT_PLAIN or lower.startswith(_NOT_PLAIN_BEGIN):
            return False
    return hosts == 1

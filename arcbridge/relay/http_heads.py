"""Bounds the requests that one connection of the HTTP API may have sent and that are not taken up yet.

aiohttp bounds a line and the number of lines: their product is megabytes for each connection, which a stranger fills
before any credential. Bodies are no matter of this module: they are bounded where they are read. Invariant: of heads,
trailers and framing a connection holds at most `HEAD_LIMIT` and one `_PIECE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.http_parser import HttpRequestParser, RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

FIELD_LIMIT: Final = 64 * 1024
"""Bytes of one header: access tokens with many groups exceed aiohttp's 8190."""

MAX_HEADERS: Final = 64
"""Headers of a request; clients and agents send about ten, a browser and the proxies before it some thirty."""

HEAD_LIMIT: Final = FIELD_LIMIT + 8 * 1024
"""Bytes of a head: a token of the largest size, its proof of 2 KiB, and what clients add."""

_PIECE: Final = 16 * 1024
"""Bytes that aiohttp's parser gets at once, so that what is over the limit is never read."""


class HeadParser:
    """aiohttp's parser of one connection, which refuses more than `HEAD_LIMIT` (docs/threats.md#J27)."""

    __slots__ = ("_body", "_held", "_parser", "_refused", "_since", "_waiting")

    def __init__(self, parser: HttpRequestParser) -> None:
        self._parser = parser
        self._body: StreamReader = EMPTY_PAYLOAD
        """Body of the last request."""
        self._refused = False
        """What has come was refused: the answer that says so is the last one."""
        self._held = 0
        """Bytes, without those of bodies, of requests that were not taken up."""
        self._since = 0
        """Those of them that came after the last complete head."""
        self._waiting = 0
        """Requests whose head is complete and that were not taken up."""

    def feed_data(self, data: bytes) -> tuple[Sequence[tuple[RawRequestMessage, StreamReader]], bool, bytes]:
        """Return what aiohttp's does. Raises `HttpProcessingError` (aiohttp) for what is no HTTP or too much, once:
        what comes after it is dropped. Each error that waits for its answer would keep what came with it."""
        if self._refused:
            return (), False, b""
        self._refused = True
        found: list[tuple[RawRequestMessage, StreamReader]] = []
        upgraded, rest = False, b""
        for at in range(0, len(data) or 1, _PIECE):
            messages, upgraded, rest = self._feed(data[at : at + _PIECE])
            found += messages
            if self._held > HEAD_LIMIT:
                raise BadHttpMessage("the head is too long")
            if upgraded:
                rest += data[at + _PIECE :]
                break
        self._refused = False
        return found, upgraded, rest

    def _feed(self, piece: bytes) -> tuple[Sequence[tuple[RawRequestMessage, StreamReader]], bool, bytes]:
        before = self._body.total_bytes
        messages, upgraded, rest = self._parser.feed_data(piece)
        if messages:
            self._body, self._since = messages[-1][1], 0
            self._held += len(piece) - self._body.total_bytes
            self._waiting += len(messages)
        else:
            count = len(piece) - (self._body.total_bytes - before)
            self._held += count
            self._since += count
        return messages, upgraded, rest

    def message_consumed(self) -> None:
        """Note that aiohttp's server takes up a request."""
        self._parser.message_consumed()
        self._waiting -= 1
        if self._waiting == 0:
            self._held = self._since

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

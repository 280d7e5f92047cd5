"""How h11 and httptools read requests and answers, in one shape: what was complete, and whether the rest is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import h11
import httptools

Headers = list[tuple[bytes, bytes]]
"""(lower-case name, value) pairs in order."""
_MAX_HEAD = 1 << 21
_EMPTY_LINES = re.compile(rb"[\r\n]*")
_REQUEST_LINE = re.compile(rb"([!-~]+) +([!-~]+) +(HTTP/1\.[01])\r\n")


@dataclass
class Message:
    """A request or an answer that was read to its end."""

    method: bytes = b""
    target: bytes = b""
    status: int = 0
    version: bytes = b""
    headers: Headers = field(default_factory=list)
    body: bytes = b""

    def values(self, name: bytes) -> list[bytes]:
        """Return all values of a header."""
        return [value for key, value in self.headers if key == name]


@dataclass
class Reading:
    """What a parser made of the bytes of one connection."""

    messages: list[Message] = field(default_factory=list)
    interim: list[int] = field(default_factory=list)
    refused: str = ""
    """Why it reads no further; empty: it would."""
    partial: Message | None = None
    """The message that has begun and is not complete."""
    rest: bytes = b""
    """What follows the last complete message."""
    switched: bool = False
    """The last answer switched protocols."""


def h11_requests(data: bytes) -> Reading:
    """What h11's server reads, where empty lines before a request (RFC 9112 §2.2) and more than one space between the
    parts of its first line (§3) are taken as they are meant: h11 refuses both, and neither leaves a doubt."""
    found = Reading()
    rest: bytes | None = data
    while rest is not None:  # one connection for each request: h11 keeps none of HTTP/1.0
        rest = rest[_EMPTY_LINES.match(rest).end() :]
        if line := _REQUEST_LINE.match(rest):
            rest = b"%b %b %b\r\n" % line.groups() + rest[line.end() :]
        rest = _h11_request(rest, found)
    return found


def _h11_request(data: bytes, found: Reading) -> bytes | None:
    """Read one request; answer what follows it, or None where nothing can."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
    if data:
        connection.receive_data(data)
    message = Message()
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            found.refused = str(error)
            return None
        if isinstance(event, h11.Request):
            message = Message(event.method, event.target, 0, event.http_version, list(event.headers))
            found.partial = message
        elif isinstance(event, h11.Data):
            message.body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            found.messages.append(message)
            found.partial = None
            found.rest = connection.trailing_data[0]
            options = [one.strip().lower() for value in message.values(b"connection") for one in value.split(b",")]
            if b"close" in options or (message.version == b"1.0" and b"keep-alive" not in options):
                found.refused = "the connection ends"
                return None
            return found.rest
        else:  # NEED_DATA, PAUSED
            found.rest = found.rest if found.partial is None else b""
            return None


def h11_responses(data: bytes, methods: Sequence[bytes], *, ended: bool = False, upgrade: bool = False) -> Reading:
    """What h11's client reads that has sent requests with these methods.

    `ended`: the connection ends in order; `upgrade`: the requests asked for one.
    """
    asked = [("Host", "k"), *([("Connection", "Upgrade"), ("Upgrade", "websocket")] if upgrade else [])]
    found = Reading(rest=data)
    for method in methods:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        connection.send(h11.Request(method=method, target="/", headers=asked))
        connection.send(h11.EndOfMessage())
        if found.rest:
            connection.receive_data(found.rest)
        if ended:
            connection.receive_data(b"")
        if not _h11_response(connection, found):
            return found
    return found


def _h11_response(connection: h11.Connection, found: Reading) -> bool:
    """Whether an answer is complete, and another one may follow."""
    message: Message | None = None
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            found.refused, found.partial = str(error), message
            return False
        if isinstance(event, h11.InformationalResponse):
            found.interim.append(event.status_code)
            if event.status_code == 101:
                found.switched = True
        elif isinstance(event, h11.Response):
            message = Message(b"", b"", event.status_code, event.http_version, list(event.headers))
        elif isinstance(event, h11.Data):
            assert message is not None
            message.body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert message is not None
            found.messages.append(message)
            found.rest = connection.trailing_data[0]
            return True
        else:
            found.partial = message
            if event is h11.NEED_DATA and message is None and not connection.trailing_data[0]:
                found.rest = b""
            return False


class _Collector:
    """Callbacks of httptools, for both kinds of message."""

    def __init__(self) -> None:
        self.found = Reading()
        self.message = Message()
        self.parser: httptools.HttpRequestParser | httptools.HttpResponseParser | None = None
        self.skip_body = False

    def on_message_begin(self) -> None:
        self.message = self.found.partial = Message()

    def on_url(self, url: bytes) -> None:
        self.message.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.message.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        parser = self.parser
        assert parser is not None
        self.message.version = parser.get_http_version().encode()
        if isinstance(parser, httptools.HttpRequestParser):
            self.message.method = parser.get_method()
        else:
            self.message.status = parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.message.body += body

    def on_message_complete(self) -> None:
        if 100 <= self.message.status < 200:
            self.found.interim.append(self.message.status)
        else:
            self.found.messages.append(self.message)
        self.found.partial = None


def httptools_requests(data: bytes) -> Reading:
    """What httptools' server reads: llhttp, which aiohttp has, too, with another build of it."""
    collector = _Collector()
    collector.parser = parser = httptools.HttpRequestParser(collector)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        collector.found.refused = "upgrade"
    except httptools.HttpParserError as error:
        collector.found.refused = str(error) or type(error).__name__
    return collector.found


def httptools_response(data: bytes) -> Reading:
    """What httptools' client reads as the answer to a GET."""
    collector = _Collector()
    collector.parser = parser = httptools.HttpResponseParser(collector)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        collector.found.switched = True
    except httptools.HttpParserError as error:
        collector.found.refused = str(error) or type(error).__name__
    return collector.found

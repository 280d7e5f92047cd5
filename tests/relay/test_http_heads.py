"""What one connection may send before anybody takes it up: heads, trailers, requests that wait, in one call or many."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Iterator

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser

from arcbridge.relay.http_heads import FIELD_LIMIT, HEAD_LIMIT, MAX_HEADERS, HeadParser

BEGIN = b"GET /v1/ca HTTP/1.1\r\nHost: x\r\n"
FIELD = b"X-Y: " + b"a" * 8000 + b"\r\n"
POST = b"POST /v1/enrol HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def parser() -> Iterator[HeadParser]:
    loop = asyncio.new_event_loop()
    protocol = BaseProtocol(loop)
    inner = HttpRequestParser(
        protocol, loop, 1 << 16, max_line_size=FIELD_LIMIT, max_field_size=FIELD_LIMIT, max_headers=MAX_HEADERS,
        max_msg_queue_size=32,
    )  # fmt: skip
    protocol._parser = inner
    yield HeadParser(inner)
    loop.close()


def taken(parser: HeadParser, piece: bytes, most: int = 1000) -> int:
    """How many times `piece` is taken before the parser refuses."""
    for count in range(most):
        try:
            parser.feed_data(piece)
        except HttpProcessingError:
            return count
    return most


def test_j27_a_head_without_end_is_refused_and_no_more_of_it_kept(parser: HeadParser) -> None:
    parser.feed_data(BEGIN)
    tracemalloc.start()
    try:
        assert taken(parser, FIELD) == HEAD_LIMIT // len(FIELD)
        assert tracemalloc.get_traced_memory()[0] < 4 * HEAD_LIMIT
    finally:
        tracemalloc.stop()


def test_j27_what_comes_at_once_is_not_read_beyond_the_bound(parser: HeadParser) -> None:
    data = BEGIN + FIELD * 60
    tracemalloc.start()
    try:
        with pytest.raises(HttpProcessingError):
            parser.feed_data(data)
        assert tracemalloc.get_traced_memory()[1] < 4 * HEAD_LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("begin", [BEGIN + FIELD * 10, b"\x16\x03\x01\r\n\r\n"])
def test_j27_what_comes_after_a_refusal_is_dropped(parser: HeadParser, begin: bytes) -> None:
    """An event loop hands over many pieces before the answer is sent: one error is kept, and not one for each."""
    with pytest.raises(HttpProcessingError):
        parser.feed_data(begin)
    assert [parser.feed_data(FIELD) for _ in range(3)] == [((), False, b"")] * 3


def test_j27_trailers_and_the_framing_of_chunks_count_as_the_head_does(parser: HeadParser) -> None:
    parser.feed_data(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    parser.message_consumed()
    parser.feed_data(b"1\r\na\r\n0\r\n")
    assert taken(parser, FIELD) <= HEAD_LIMIT // len(FIELD)


def test_j27_chunks_of_one_byte_are_refused(parser: HeadParser) -> None:
    parser.feed_data(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    parser.message_consumed()
    assert 0 < taken(parser, b"1\r\na\r\n" * 1000) <= HEAD_LIMIT // 5000


def test_j27_requests_that_wait_count_together(parser: HeadParser) -> None:
    assert taken(parser, BEGIN + FIELD + b"\r\n") == HEAD_LIMIT // len(BEGIN + FIELD + b"\r\n")


def test_requests_that_are_taken_up_in_turn_are_taken_without_end(parser: HeadParser) -> None:
    for _ in range(100):
        (found,), _, _ = parser.feed_data(BEGIN + FIELD + b"\r\n")
        assert found[0].path == "/v1/ca"
        parser.message_consumed()


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_a_token_of_the_largest_size_and_a_whole_body_are_taken(parser: HeadParser, size: int) -> None:
    token = b"t" * (FIELD_LIMIT - 64)
    body = b"b" * (64 * 1024)
    fields = b"Authorization: Bearer " + token + b"\r\nX-Proof: " + b"p" * 2048 + b"\r\nContent-Length: 65536\r\n\r\n"
    data = POST + fields + body
    found = [one for at in range(0, len(data), size) for one in parser.feed_data(data[at : at + size])[0]]
    assert len(found) == 1
    assert found[0][0].headers["Authorization"] == "Bearer " + token.decode()
    assert found[0][1].total_bytes == len(body)
    assert found[0][1].is_eof()


def test_what_follows_an_upgrade_is_handed_on_whole(parser: HeadParser) -> None:
    rest = b"r" * 40_000
    messages, upgraded, tail = parser.feed_data(BEGIN + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n" + rest)
    assert (len(messages), upgraded, tail) == (1, True, rest)


def test_too_many_headers_are_refused(parser: HeadParser) -> None:
    with pytest.raises(HttpProcessingError):
        parser.feed_data(BEGIN + b"X-Y: z\r\n" * MAX_HEADERS + b"\r\n")

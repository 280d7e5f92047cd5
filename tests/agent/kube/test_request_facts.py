"""What a head says, and which are passed on (docs/threats.md#H5). test_proxy asks the same over real streams."""

from __future__ import annotations

import pytest
from aiohttp import HttpVersion10, HttpVersion11
from aiohttp.http import HttpVersion

from arcbridge.agent.kube.request_facts import (
    MAX_KNOWN_NAME,
    _known_name,
    connection_options,
    read_facts,
    values_by_name,
)

HOST = (b"Host", b"k")
TE = b"Transfer-Encoding"
CL = b"Content-Length"

BAD: list[tuple[str, HttpVersion, list[tuple[bytes, bytes]], int]] = [
    ("TRACE", HttpVersion11, [HOST], 405), ("CONNECT", HttpVersion11, [HOST], 405), ("get", HttpVersion11, [HOST], 405),
    ("POST", HttpVersion10, [HOST, (TE, b"chunked")], 400),
    ("POST", HttpVersion11, [HOST, (TE, b"gzip, chunked")], 400),
    ("POST", HttpVersion11, [HOST, (TE, b"chunked"), (TE, b"chunked")], 400),
    ("POST", HttpVersion11, [HOST, (TE, b"chunked"), (CL, b"5")], 400),
    ("POST", HttpVersion11, [HOST, (TE, b"identity")], 400),
    ("POST", HttpVersion11, [HOST, (CL, b"5"), (b"content-length", b"5")], 400),
    ("POST", HttpVersion11, [HOST, (CL, b"+5")], 400), ("POST", HttpVersion11, [HOST, (CL, b"")], 400),
    ("POST", HttpVersion11, [HOST, (CL, b"5,5")], 400), ("POST", HttpVersion11, [HOST, (CL, b"9" * 19)], 400),
    ("GET", HttpVersion11, [], 400), ("GET", HttpVersion11, [HOST, (b"host", b"l")], 400),
    ("GET", HttpVersion10, [HOST, HOST], 400), ("GET", HttpVersion(0, 9), [], 400),
    ("GET", HttpVersion(1, 2), [HOST], 400), ("GET", HttpVersion(2, 0), [HOST], 400),
    ("POST", HttpVersion11, [HOST, (b"Expect", b"anything")], 400),
]  # fmt: skip


@pytest.mark.parametrize(("method", "version", "headers", "code"), BAD, ids=range(len(BAD)))
def test_refused(method: str, version: HttpVersion, headers: list[tuple[bytes, bytes]], code: int) -> None:
    refusal = read_facts(method, "/", headers, version).misframed
    assert refusal.status_code == code


def test_accepted() -> None:
    assert read_facts("POST", "/", [HOST, (TE, b" Chunked ")]).misframed is None
    assert read_facts("POST", "/", [HOST, (CL, b"5"), (b"Expect", b"100-Continue")]).misframed is None
    assert read_facts("GET", "/", [], HttpVersion10).misframed is None


@pytest.mark.parametrize(
    ("headers", "body"),
    [([], False), ([(CL, b"0")], False), ([(CL, b"1")], True), ([(b"transfer-encoding", b"chunked")], True)],
)
def test_has_body(headers: list[tuple[bytes, bytes]], body: bool) -> None:
    assert read_facts("GET", "/", [HOST, *headers]).has_body is body


@pytest.mark.parametrize(
    ("version", "keep_alive", "headers", "line"),
    [
        (HttpVersion11, True, [], b""),
        (HttpVersion10, True, [], b"Connection: keep-alive\r\n"),
        (HttpVersion10, False, [], b"Connection: close\r\n"),
        (HttpVersion11, True, [(b"connection", b"close, x")], b"Connection: close\r\n"),
        (HttpVersion11, True, [(TE, b"chunked")], b"Connection: close\r\n"),
    ],
)
def test_whether_another_request_may_follow(
    version: HttpVersion, keep_alive: bool, headers: list[tuple[bytes, bytes]], line: bytes
) -> None:
    facts = read_facts("GET", "/", [HOST, *headers], version, keep_alive=keep_alive)
    assert (facts.persistent, facts.connection_line) == (b"close" not in line, line)


def test_connection_names_are_collected_from_every_line() -> None:
    values = values_by_name([(b"Connection", b"a, B"), (b"connection", b"c")])
    assert connection_options(values) == {"a", "b", "c"}


def test_names_of_headers_are_remembered_within_bounds() -> None:
    """A name is read alike, remembered or not; long ones are not kept, and of short ones a few hundred."""
    for size in (MAX_KNOWN_NAME, MAX_KNOWN_NAME + 1):
        before = _known_name.cache_info().currsize
        facts = [read_facts("GET", "/x", [HOST, (b"X" * size, b"v")]) for _ in range(2)]
        assert facts[0] == facts[1]
        assert facts[0].fields[1] == ("X" * size, "x" * size, "v")
        assert _known_name.cache_info().currsize - before <= (size <= MAX_KNOWN_NAME) * 2
    for number in range(2000):
        read_facts("GET", "/x", [HOST, (b"X-%d" % number, b"v")])
    assert _known_name.cache_info().currsize <= 256

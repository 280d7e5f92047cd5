"""Which answers of an API server are passed on (docs/threats.md#H9), and bodies cut at every place."""

from __future__ import annotations

import itertools

import pytest

from arcbridge.agent.kube.response import CHUNKED, ChunkedBody, begins_well, read_head
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upgrade import UpgradeRequest
from arcbridge.http_fields import HOP_BY_HOP


def test_an_answer_passes_as_it_is() -> None:
    lines = b"Content-Length: 2\r\nContent-Type: a\r\nServer: s\r\nX: \xc3\xbc\r\n\r\n"
    answer = read_head(b"HTTP/1.1 200 Whatever it says\r\n" + lines)
    assert answer.lines + b"\r\n" == b"HTTP/1.1 200 OK\r\n" + lines
    assert (answer.status, answer.length, answer.keep) == (200, 2, True)


def test_an_answer_with_hop_by_hop_headers_loses_them() -> None:
    answer = read_head(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\nConnection: close, X-Drop\r\nX-Drop: 1\r\nX: 2\r\n\r\n"
    )
    assert answer.lines.count(b"\r\n") == 4
    assert b"X: 2\r\n" in answer.lines
    assert b"X-Drop" not in answer.lines
    assert b"Transfer-Encoding: chunked\r\n" in answer.lines
    assert b"Server: arcbridge\r\n" in answer.lines
    assert (answer.length, answer.keep) == (CHUNKED, False)


@pytest.mark.parametrize("option", ["Content-Length", "content-length, x", "close,CONTENT-LENGTH"])
def test_h9_an_answer_never_loses_its_length(option: str) -> None:
    answer = read_head(f"HTTP/1.1 200 OK\r\nConnection: {option}\r\nContent-Length: 2\r\n\r\n".encode())
    assert b"Content-Length: 2\r\n" in answer.lines


@pytest.mark.parametrize("name", sorted({*HOP_BY_HOP, "proxy-authenticate", "proxy-x"} - {"transfer-encoding"}))
def test_every_hop_by_hop_header_is_found_in_an_answer(name: str) -> None:
    for spelt in (name, name.title(), name.upper()):
        lines = f"X: 1\r\n{spelt}: y\r\nContent-Length: 0\r\n".encode()
        answer = read_head(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n")
        assert f"\n{spelt}:".encode() not in answer.lines
        assert answer.lines.startswith(b"HTTP/1.1 200 OK\r\nX: 1\r\n")


@pytest.mark.parametrize("lines", [b"", b"ETag: x\r\n", b"Content-Length: 7\r\n"])
def test_304_has_no_body(lines: bytes) -> None:
    answer = read_head(b"HTTP/1.1 304 Not Modified\r\n" + lines + b"\r\n")
    assert answer.length == 0


@pytest.mark.parametrize("lines", [b"Content-Length: 100\r\n", b"Transfer-Encoding: chunked\r\n", b""])
def test_the_answer_to_a_head_request_has_no_body(lines: bytes) -> None:
    answer = read_head(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n", "HEAD")
    assert answer.length == 0


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
@pytest.mark.parametrize(
    ("lines", "keep"),
    [(b"", True), (b"Content-Length: 0\r\n", True), (b"Content-Length: 7\r\n", False),
     (b"Transfer-Encoding: chunked\r\n", False)],
)  # fmt: skip
def test_h9_a_connection_is_not_kept_behind_a_body_that_may_not_come(
    method: str, status: int, lines: bytes, keep: bool
) -> None:
    answer = read_head(b"HTTP/1.1 %d X\r\n" % status + lines + b"\r\n", method)
    assert (answer.length, answer.keep) == (0, keep)


def test_a_101_counts_only_where_that_upgrade_was_asked_for() -> None:
    asked = UpgradeRequest("websocket", ("a", "b"), ())
    head = b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Protocol: b\r\nX: 1\r\n\r\n"
    answer = read_head(head, "GET", asked)
    assert (answer.status, answer.keep) == (101, False)
    assert answer.lines.splitlines() == [
        b"HTTP/1.1 101 Switching Protocols",
        b"Sec-WebSocket-Protocol: b",
        b"X: 1",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
    ]
    for wrong in (None, UpgradeRequest("SPDY/3.1", (), ()), UpgradeRequest("websocket", ("a",), ())):
        with pytest.raises(RequestRefusal):
            read_head(head, "GET", wrong)


@pytest.mark.parametrize("field", [b"Content-Length: 33", b"transfer-encoding: chunked"])
def test_an_interim_answer_that_announces_a_body_is_refused(field: bytes) -> None:
    with pytest.raises(RequestRefusal, match="an interim answer announces a body"):
        read_head(b"HTTP/1.1 103 X\r\n" + field + b"\r\n\r\n")


def test_an_interim_answer_is_passed_over() -> None:
    assert read_head(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n") is None


OK = b"HTTP/1.1 200 OK\r\n"
IN_DOUBT = [
    (b"HTTP/1.0 200 OK\r\n", b"Content-Length: 0"), (b"HTTP/1.1 20 OK\r\n", b"Content-Length: 0"),
    (b"HTTP/1.1 600 Odd\r\n", b"Content-Length: 0"), (b"HTTP/1.1 999 Odd\r\n", b"Content-Length: 0"),
    (b"HTTP/1.1 200 O\rK\r\n", b"Content-Length: 0"), (b"HTTP/1.1 200 OK\n", b"Content-Length: 0"),
    (OK, b"Content-Length : 0"), (OK, b"Content-Length: 0\r\n X: fold"), (OK, b"Content-Length: +5"),
    (OK, b"Content-Length: x"), (OK, b"Content-Length: 5, 5"), (OK, b"Content-Length: 5\r\nContent-Length: 5"),
    (OK, b"Content-Length: 5\r\nTransfer-Encoding: chunked"), (OK, b"Transfer-Encoding: gzip, chunked"),
    (OK, b"Transfer-Encoding: gzip"), (OK, b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
    (OK, b"X: a\x00b\r\nContent-Length: 0"), (OK, b"X: a\nb\r\nContent-Length: 0"), (OK, b"X: 1"),
    (b"HTTP/1.1 101 Switching Protocols\r\n", b"Upgrade: x\r\nConnection: upgrade"),
    (b"HTTP/1.1 101 X\r\n", b"Content-Length: 0"), (b"HTTP/1.1 204 X\r\n", b"Transfer-Encoding: gzip, chunked"),
    (b"HTTP/1.1 304 X\r\n", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
]  # fmt: skip


@pytest.mark.parametrize(("start", "lines"), IN_DOUBT, ids=range(len(IN_DOUBT)))
def test_an_answer_in_doubt_is_a_502(start: bytes, lines: bytes) -> None:
    with pytest.raises(RequestRefusal) as caught:
        read_head(start + lines + b"\r\n\r\n")
    assert (caught.value.status_code, caught.value.retry_after) == (502, None)


@pytest.mark.parametrize("lines", [b"Content-Length: 1\r\nContent-Length: 2", b"Transfer-Encoding: gzip"])
def test_an_answer_to_head_in_doubt_is_a_502(lines: bytes) -> None:
    with pytest.raises(RequestRefusal):
        read_head(OK + lines + b"\r\n\r\n", "HEAD")


def test_h9_a_head_that_can_never_end_well_is_known_before_its_end() -> None:
    whole = b"HTTP/1.1 200 OK\r\nX: 1\r\n\r"
    for end in range(len(whole) + 1):
        for start in range(end + 1):
            assert begins_well(whole[:end], start)
    for bad in (
        b"SSH-2.0",
        b"HTTP/1.0 200",
        b"\n",
        b"HTTP/1.1 200 OK\n",
        b"HTTP/1.1 200 OK\r\nX: 1\n",
        b"HTTP/1.1 200 OK\r\n\n",
    ):
        assert not begins_well(bad, 0)
        assert not begins_well(bad, len(bad) - 1), "where the last byte alone is new"


BODY = b"5\r\nhello\r\n00A\r\n0123456789\r\n0\r\n\r\n"


def _fed(data: bytes, *cuts: int) -> tuple[bytes, ChunkedBody, int]:
    """Feed `data` in pieces; return the bytes passed on, the reader, and where it saw the body's end."""
    body = ChunkedBody()
    out = b""
    places = [0, *cuts, len(data)]
    for start, end in itertools.pairwise(places):
        buffer = bytearray(b"??" + data[start:end] + b"\n??")
        stop, tail = body.feed(buffer, 2, 2 + end - start)
        out += buffer[2:stop] + tail
        if body.over or body.broken:
            return out, body, start + stop - 2
    return out, body, len(data)


@pytest.mark.parametrize("first", range(len(BODY) + 1))
def test_a_chunked_body_cut_in_three_passes_unchanged(first: int) -> None:
    for second in range(first, len(BODY) + 1):
        out, body, _ = _fed(BODY, first, second)
        assert out == BODY
        assert (body.over, body.broken, body.payload) == (True, False, 15)


@pytest.mark.parametrize("cut", range(len(BODY)))
def test_trailers_are_dropped(cut: int) -> None:
    data = BODY[:-2] + b"Impersonate-User: root\r\nX: 1\r\n\r\n"
    for second in range(cut, len(data)):
        out, body, _ = _fed(data, cut, second)
        assert out == BODY
        assert body.over


def test_where_payload_lies_is_told() -> None:
    body = ChunkedBody()
    body.feed(bytearray(BODY), 0, len(BODY))
    assert b"".join(BODY[start:end] for start, end in body.spans) == b"hello0123456789"


def test_what_lies_behind_the_end_is_not_passed_on() -> None:
    out, body, end = _fed(BODY + b"HTTP/1.1 200 OK\r\n")
    assert out == BODY
    assert body.over
    assert end == len(BODY)


@pytest.mark.parametrize("data", [
    b"5;name=value\r\nhello\r\n", b"0x5\r\nhello\r\n", b"+5\r\nhello\r\n", b"5\nhello\r\n", b" 5\r\nhello\r\n", b"\r\n",
    b"zz\r\n", b"-1\r\n", b"00000000000000005\r\nhello\r\n", b"5\r\nhelloX\r\n0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n",
    b"1" * 30, b"0\r\n" + (b"X: " + b"x" * 1000 + b"\r\n") * 100, b"0\r\n" + b"x" * 100_000, b"0\r\n\n",
    b"0\r\nX: 1\n\r\n", b"0\r\n fold\r\n\r\n", b"0\r\nno colon\r\n\r\n", b"0\r\nX : 1\r\n\r\n",
    b"0\r\nX: a\x00b\r\n\r\n",
])  # fmt: skip
def test_a_garbled_chunk_is_broken(data: bytes) -> None:
    for cuts in ((), (1,), (2, 3)):
        out, body, _ = _fed(data, *cuts)
        assert body.broken
        assert not body.over
        assert data.startswith(out)

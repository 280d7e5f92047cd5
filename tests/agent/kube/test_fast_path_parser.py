"""Plain requests and their answers: what is plain, what becomes of it, and bodies cut at every place."""

from __future__ import annotations

import dataclasses
import itertools

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arcbridge.agent.kube.fast_path_parser import (
    CHUNKED,
    HEAD_MOST,
    KEPT_LINES,
    ChunkedBody,
    HeadCache,
    answer_of,
    passed_line,
    plain_request,
    subject_block,
    understood,
)
from arcbridge.agent.kube.impersonation import HOP_BY_HOP, Subject
from arcbridge.agent.kube.status import Refusal
from arcbridge.identity.claims import Identity

ALICE = Identity("alice", "u-1", ("dev", "ops"), "https://issuer#alice", "https://issuer", 4e9)
GET = b"GET /api/v1/pods?watch=1 HTTP/1.1\r\nHost: k\r\nUser-Agent: kubectl\r\n\r\n"


def test_a_plain_request() -> None:
    assert plain_request(GET) == (b"/api/v1/pods?watch=1", b"Host: k\r\nUser-Agent: kubectl\r\n")


@pytest.mark.parametrize(
    "data",
    [
        GET[:-1],
        GET + b"x",
        GET + GET,
        b"\r\n" + GET,
        GET.replace(b"GET ", b"HEAD "),
        GET.replace(b"GET ", b"get "),
        GET.replace(b"GET ", b"GET  "),
        GET.replace(b"1.1", b"1.0"),
        GET.replace(b"\r\n", b"\n"),
        GET.replace(b"/api", b"https://k/api"),
        GET.replace(b"/api", b"/api\x7f"),
        GET.replace(b"/api", b"/\xc3\xbc"),
        GET.replace(b"/v1", b"/v 1"),
        GET.replace(b"Host: k\r\nUser-Agent: kubectl\r\n", b""),
        GET.replace(b"Agent:", b"Agent :"),
        GET.replace(b"Agent:", b"_Agent:"),
        GET.replace(b"kubectl", b"kube\x00ctl"),
        GET.replace(b"kubectl", b"kube\rctl"),
        GET.replace(b"kubectl", b"kubectl\r\n folded"),
        GET.replace(b"kubectl", "kübectl".encode()),
        GET.replace(b"kubectl", b"k" * HEAD_MOST),
    ],
)
def test_not_plain(data: bytes) -> None:
    assert plain_request(data) is None


@pytest.mark.parametrize("size", range(len(GET)))
def test_a_head_that_is_not_complete_is_not_plain(size: int) -> None:
    assert plain_request(GET[:size]) is None


_PIECES = st.sampled_from(
    b"GET |/|a|Host|: |:|k| HTTP/1.1|\r\n|\n|\r| |\t|_|\0|?|#|,|\x7f|\xc3\xbc".split(b"|")
    + b"X: 1\r\n|Content-Length: 5\r\n|Transfer-Encoding: chunked\r\n|Impersonate-User: r\r\n".split(b"|")
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_PIECES, max_size=12), st.integers(0, len(GET)))
@example([b"X: 1\r\n"], len(GET) - 2)
@example([b"Impersonate-User: r\r\n"], 45)
@example([], 0)
def test_another_parser_reads_the_same_in_whatever_is_plain(pieces: list[bytes], place: int) -> None:
    data = GET[:place] + b"".join(pieces) + GET[place:]
    found = plain_request(data)
    try:
        if found is None or HeadCache().outgoing(found[1], ALICE, "") is None:
            return
    except Refusal:  # it looks as if it named a second identity, and takes the general way
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    assert (request.method, request.target, request.http_version) == (b"GET", found[0], b"1.1")
    ours = [line.partition(b":") for line in found[1].split(b"\r\n")[:-1]]
    assert [(name.lower(), value.strip(b" \t")) for name, _, value in ours] == list(request.headers)
    assert isinstance(connection.next_event(), h11.EndOfMessage)
    assert connection.trailing_data == (b"", False)


@pytest.mark.parametrize(
    "line",
    [
        b"Impersonate-User: root",
        b"IMPERSONATE-Group: system:masters",
        b"impersonate-future: x",
        b"impersonateuser: x",
        b"Authorization: Bearer x",
        b"Connection: Impersonate-User",
        b"Connection: close",
        b"Connection: keep-alive, X-Remote-User",
        b"Proxy-Connection: keep-alive",
        b"Proxy-Authorization: Basic x",
        b"Keep-Alive: timeout=5",
        b"TE: trailers",
        b"Trailer: X",
        b"Transfer-Encoding: chunked",
        b"Content-Length: 0",
        b"Expect: 100-continue",
        b"Upgrade: websocket",
        b"HTTP2-Settings: x",
    ],
)
def test_lines_for_the_general_parser(line: bytes) -> None:
    assert passed_line(line) is None
    assert HeadCache().outgoing(b"Host: k\r\n" + line + b"\r\n", ALICE, "") is None


@pytest.mark.parametrize(
    ("line", "passed"),
    [
        (b"Accept:application/json", b"Accept: application/json\r\n"),
        (b"X-Empty:", b"X-Empty: \r\n"),
        (b"X-Impersonate-User: x \t", b"X-Impersonate-User: x\r\n"),
        (b"X-Remote-User: root", b""),
        (b"X-Forwarded-For: 10.0.0.1", b""),
        (b"Forwarded: for=x", b""),
        (b"Audit-ID: mine", b""),
        (b"Connection: Keep-Alive", b""),
    ],
)
def test_lines_that_pass_or_are_dropped(line: bytes, passed: bytes) -> None:
    assert passed_line(line) == passed


def test_the_outgoing_lines_are_the_callers_and_then_ours() -> None:
    heads = HeadCache()
    block = b"Host: k\r\nAccept: a\r\nX-Remote-User: root\r\n"
    wanted = (
        b"Accept: a\r\nAuthorization: Bearer t\r\nImpersonate-User: alice\r\nImpersonate-Uid: u-1\r\n"
        b"Impersonate-Group: dev\r\nImpersonate-Group: ops\r\n"
    )
    for _ in range(2):
        assert heads.outgoing(block, ALICE, "Bearer t") == wanted


def test_another_identity_or_credential_counts_at_once() -> None:
    heads = HeadCache()
    block = b"Host: k\r\n"
    assert b"Impersonate-Group: ops" in (heads.outgoing(block, ALICE, "Bearer a") or b"")
    fewer = dataclasses.replace(ALICE, groups=("dev",))
    assert b"ops" not in (heads.outgoing(block, fewer, "Bearer a") or b"")
    assert b"Bearer b\r\n" in (heads.outgoing(block, fewer, "Bearer b") or b"")


def test_an_identity_that_cannot_be_sent_leaves_nothing_of_the_one_before() -> None:
    heads = HeadCache()
    heads.outgoing(b"Host: k\r\n", ALICE, "")
    for bad in ("", "a\r\nImpersonate-Group: system:masters", " alice"):
        broken = dataclasses.replace(ALICE, username=bad)
        for _ in range(2):
            with pytest.raises(Refusal):
                heads.outgoing(b"Host: k\r\n", broken, "")


@pytest.mark.parametrize("block", [b"Accept: a\r\n", b"Host: k\r\nhost: l\r\n"])
def test_one_host(block: bytes) -> None:
    assert HeadCache().outgoing(block, ALICE, "") is None


def test_what_looks_like_a_second_identity_is_refused() -> None:
    with pytest.raises(Refusal, match="identity"):
        HeadCache().outgoing(b"Host: k\r\nX: impersonate-user: root\r\n", ALICE, "")


def test_what_is_remembered_is_bounded() -> None:
    heads = HeadCache()
    for number in range(3 * KEPT_LINES):
        made = heads.outgoing(b"Host: k\r\nX-Seq: %d\r\n" % number, ALICE, "")
        assert made is not None
        assert made.startswith(b"X-Seq: %d\r\n" % number)
    assert len(heads._lines) <= KEPT_LINES


def test_extras_are_escaped_as_for_any_request() -> None:
    block = subject_block(Subject("ü", extra=(("a/b_c", "1"),)), "")
    assert block == "Impersonate-User: ü\r\nImpersonate-Extra-a%2Fb%5Fc: 1\r\n".encode()


def test_what_a_target_asks_for() -> None:
    for _ in range(2):
        info = understood("/api/v1/namespaces/default/pods/web")
        assert (info.verb, info.resource, info.name) == ("get", "pods", "web")
        with pytest.raises(Refusal):
            understood("/api/%2e%2e/x")
    with pytest.raises(Refusal):
        understood("/api/../" + "x" * 1000)


# -- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_passes_as_it_is() -> None:
    lines = b"Content-Length: 2\r\nContent-Type: a\r\nServer: s\r\nX: \xc3\xbc\r\n\r\n"
    answer = answer_of(b"HTTP/1.1 200 Whatever it says\r\n" + lines)
    assert answer is not None
    assert answer.head == b"HTTP/1.1 200 OK\r\n" + lines
    assert (answer.status, answer.length, answer.keep) == (200, 2, True)


def test_an_answer_with_hop_by_hop_headers_loses_them() -> None:
    answer = answer_of(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\nConnection: close, X-Drop\r\nX-Drop: 1\r\nX: 2\r\n\r\n"
    )
    assert answer is not None
    assert answer.head.count(b"\r\n") == 5
    assert b"X: 2\r\n" in answer.head
    assert b"X-Drop" not in answer.head
    assert b"Transfer-Encoding: chunked\r\n" in answer.head
    assert b"Server: arcbridge\r\n" in answer.head
    assert (answer.length, answer.keep) == (CHUNKED, False)


@pytest.mark.parametrize("name", sorted({*HOP_BY_HOP, "proxy-authenticate", "proxy-x"} - {"transfer-encoding"}))
def test_every_hop_by_hop_header_is_found_in_an_answer(name: str) -> None:
    for spelt in (name, name.title(), name.upper()):
        lines = f"X: 1\r\n{spelt}: y\r\nContent-Length: 0\r\n".encode()
        answer = answer_of(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n")
        assert answer is not None
        assert f"\n{spelt}:".encode() not in answer.head
        assert answer.head.startswith(b"HTTP/1.1 200 OK\r\nX: 1\r\n")


@pytest.mark.parametrize("lines", [b"", b"ETag: x\r\n", b"Content-Length: 7\r\n"])
def test_304_has_no_body(lines: bytes) -> None:
    answer = answer_of(b"HTTP/1.1 304 Not Modified\r\n" + lines + b"\r\n")
    assert answer is not None
    assert answer.length == 0


def test_an_interim_answer_is_passed_over() -> None:
    assert answer_of(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n") is None


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 O\rK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n X: fold\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
)
def test_an_answer_in_doubt_is_a_502(head: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        answer_of(head)
    assert caught.value.status_code == 502


BODY = b"5\r\nhello\r\n00A\r\n0123456789\r\n0\r\n\r\n"


def _fed(data: bytes, *cuts: int) -> tuple[bytes, ChunkedBody, int]:
    """What is passed on of `data` when it comes in pieces; the reader; and where the body's end was seen."""
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


def test_what_lies_behind_the_end_is_not_passed_on() -> None:
    out, body, end = _fed(BODY + b"HTTP/1.1 200 OK\r\n")
    assert out == BODY
    assert body.over
    assert end == len(BODY)


@pytest.mark.parametrize(
    "data",
    [
        b"5;name=value\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b"+5\r\nhello\r\n",
        b"5\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"\r\n",
        b"zz\r\n",
        b"-1\r\n",
        b"00000000000000005\r\nhello\r\n",
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"1" * 30,
        b"0\r\n" + (b"X: " + b"x" * 1000 + b"\r\n") * 100,
        b"0\r\n" + b"x" * 100_000,
    ],
)
def test_a_garbled_chunk_is_broken(data: bytes) -> None:
    for cuts in ((), (1,), (2, 3)):
        out, body, _ = _fed(data, *cuts)
        assert body.broken
        assert not body.over
        assert data.startswith(out)

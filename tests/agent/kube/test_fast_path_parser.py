"""Which requests are plain: every parser reads those alike."""

from __future__ import annotations

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arcbridge.agent.kube.fast_path_parser import MAX_KNOWN_LINES, MAX_PLAIN_HEAD, KnownLines, passed_line, plain_head
from arcbridge.agent.kube.impersonation import cleaned_headers
from arcbridge.agent.kube.request_facts import read_facts

GET = b"GET /api/v1/pods?watch=1 HTTP/1.1\r\nHost: k\r\nUser-Agent: kubectl\r\n\r\n"


def test_a_plain_request() -> None:
    known = KnownLines()
    for _ in range(2):
        head = plain_head(GET, known)
        assert (head.method, head.target, head.plain) == ("GET", "/api/v1/pods?watch=1", b"User-Agent: kubectl\r\n")


@pytest.mark.parametrize("data", [
    GET[:-1], GET + b"x", GET + GET, b"\r\n" + GET, GET.replace(b"GET ", b"HEAD "), GET.replace(b"GET ", b"get "),
    GET.replace(b"GET ", b"GET  "), GET.replace(b"1.1", b"1.0"), GET.replace(b"\r\n", b"\n"),
    GET.replace(b"/api", b"https://k/api"), GET.replace(b"/api", b"/api\x7f"), GET.replace(b"/api", b"/\xc3\xbc"),
    GET.replace(b"/v1", b"/v 1"), GET.replace(b"Host: k\r\nUser-Agent: kubectl\r\n", b""),
    GET.replace(b"Agent:", b"Agent :"), GET.replace(b"Agent:", b"_Agent:"), GET.replace(b"kubectl", b"kube\x00ctl"),
    GET.replace(b"kubectl", b"kube\rctl"), GET.replace(b"kubectl", b"kubectl\r\n folded"),
    GET.replace(b"kubectl", "kübectl".encode()), GET.replace(b"kubectl", b"k" * MAX_PLAIN_HEAD),
])  # fmt: skip
def test_not_plain(data: bytes) -> None:
    assert plain_head(data, KnownLines()) is None


@pytest.mark.parametrize("size", range(len(GET)))
def test_a_head_that_is_not_complete_is_not_plain(size: int) -> None:
    assert plain_head(GET[:size], KnownLines()) is None


_LINES = [
    b"Host: k", b"Accept: */*", b"User-Agent: kubectl", b"X-Empty:", b"Connection: keep-alive", b"X-Remote-User: r",
]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(_LINES), max_size=5), min_size=1, max_size=4))
@example([[b"Host: k", b"Accept: */*"], [b"Accept: */*"]])
@example([[b"Host: k", b"X-Empty:", b"Accept: */*"]])
def test_h40_no_part_of_a_head_is_plain_whatever_came_before(blocks: list[list[bytes]]) -> None:
    heads = [b"GET /api HTTP/1.1\r\n" + b"".join([line + b"\r\n" for line in lines]) + b"\r\n" for lines in blocks]
    known = KnownLines()
    first = [plain_head(head, known) for head in heads]
    for head in heads:
        for size in range(len(head)):
            assert plain_head(head[:size], known) is None
    assert [plain_head(head, known) for head in heads] == first, "what was remembered changes no head"
    assert [plain_head(head, KnownLines()) for head in heads] == first


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
    head = plain_head(data, KnownLines())
    if head is None:
        return
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    assert (request.method, request.target, request.http_version) == (b"GET", head.target.encode(), b"1.1")
    passed = [line.partition(b": ") for line in head.plain.split(b"\r\n")[:-1]]
    others = [(name, value) for name, value in request.headers if name != b"connection"]
    kept = cleaned_headers(read_facts("GET", "/", others))
    assert [(name.lower(), value) for name, _, value in passed] == [(n.encode(), v.encode()) for n, v in kept]
    assert isinstance(connection.next_event(), h11.EndOfMessage)
    assert connection.trailing_data == (b"", False)


@pytest.mark.parametrize("line", [
    b"Impersonate-User: root", b"IMPERSONATE-Group: system:masters", b"impersonate-future: x", b"impersonateuser: x",
    b"Authorization: Bearer x", b"Connection: Impersonate-User", b"Connection: close",
    b"Connection: keep-alive, X-Remote-User", b"Proxy-Connection: keep-alive", b"Proxy-Authorization: Basic x",
    b"Keep-Alive: timeout=5", b"TE: trailers", b"Trailer: X", b"Transfer-Encoding: chunked", b"Content-Length: 0",
    b"Expect: 100-continue", b"Upgrade: websocket", b"HTTP2-Settings: x",
])  # fmt: skip
def test_lines_for_the_general_parser(line: bytes) -> None:
    assert passed_line(line) is None
    assert plain_head(b"GET / HTTP/1.1\r\nHost: k\r\n" + line + b"\r\n\r\n", KnownLines()) is None


@pytest.mark.parametrize(("line", "passed"), [
    (b"Accept:application/json", b"Accept: application/json\r\n"), (b"X-Empty:", b"X-Empty: \r\n"),
    (b"X-Impersonate-User: x \t", b"X-Impersonate-User: x\r\n"),
    (b"X: impersonate-user: root", b"X: impersonate-user: root\r\n"), (b"X-Remote-User: root", b""),
    (b"X-Forwarded-For: 10.0.0.1", b""), (b"Forwarded: for=x", b""), (b"Audit-ID: mine", b""),
    (b"Connection: Keep-Alive \t", b""),
])  # fmt: skip
def test_lines_that_pass_or_are_dropped(line: bytes, passed: bytes) -> None:
    assert passed_line(line) == passed


@pytest.mark.parametrize("lines", [b"Accept: a\r\n", b"Host: k\r\nhost: l\r\n"])
def test_one_host(lines: bytes) -> None:
    assert plain_head(b"GET / HTTP/1.1\r\n" + lines + b"\r\n", KnownLines()) is None


def test_what_is_remembered_is_bounded() -> None:
    known = KnownLines()
    for number in range(3 * MAX_KNOWN_LINES):
        head = plain_head(b"GET / HTTP/1.1\r\nHost: k\r\nX-Seq: %d\r\n\r\n" % number, known)
        assert head.plain == b"X-Seq: %d\r\n" % number
        assert max(len(known.lines), len(known.blocks)) <= MAX_KNOWN_LINES
    before = len(known.lines), len(known.blocks)
    assert plain_head(b"GET / HTTP/1.1\r\nHost: k\r\nX: %s\r\n\r\n" % (b"x" * 1000), known) is not None
    assert (len(known.lines), len(known.blocks)) == before

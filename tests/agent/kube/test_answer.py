"""H9: which answers of an API server are passed on."""

from __future__ import annotations

import pytest

from arcbridge.agent.kube.answer import answer_headers
from arcbridge.agent.kube.status import Refusal

CL, TE = b"Content-Length", b"Transfer-Encoding"

BAD: list[tuple[str, int, list[tuple[bytes, bytes]]]] = [
    ("GET", 200, []),
    ("GET", 200, [(CL, b"1"), (CL, b"1")]),
    ("GET", 200, [(CL, b"1"), (TE, b"chunked")]),
    ("GET", 200, [(CL, b"x")]),
    ("GET", 200, [(TE, b"gzip")]),
    ("GET", 101, [(CL, b"0")]),
    ("GET", 200, [(CL, b"0"), (b"X", b"a\x00b")]),
    ("GET", 200, [(CL, b"0"), (b"X", b"a\nb")]),
    ("HEAD", 200, [(CL, b"1"), (CL, b"2")]),
]


@pytest.mark.parametrize(("method", "status", "headers"), BAD, ids=range(len(BAD)))
def test_refused(method: str, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(Refusal) as caught:
        answer_headers(method, status, headers)
    assert caught.value.status_code == 502
    assert caught.value.retry_after is None


def test_framing_and_hop_by_hop_headers_go() -> None:
    out = answer_headers(
        "GET",
        200,
        [(TE, b"chunked"), (b"Connection", b"x-drop"), (b"X-Drop", b"1"), (b"Warning", b"a"), (b"Warning", b"b")],
    )
    assert list(out.items()) == [("Warning", "a"), ("Warning", "b"), ("Server", "arcbridge")]


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_answers_without_a_body_need_no_length(method: str, status: int) -> None:
    assert "Server" in answer_headers(method, status, [])


def test_an_answer_that_was_read_to_its_end_needs_none_either() -> None:
    assert answer_headers("GET", 403, [(b"Server", b"s")], framed=False)["Server"] == "s"

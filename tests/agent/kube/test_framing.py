"""Which heads are passed on (docs/threats.md#H5, docs/threats.md#H6). test_proxy asks the same over real streams."""

from __future__ import annotations

import pytest
from aiohttp import HttpVersion10, HttpVersion11
from aiohttp.http import HttpVersion

from arcbridge.agent.kube.framing import check_framing, check_target, has_body
from arcbridge.agent.kube.status import RequestRefusal

HOST = (b"Host", b"k")
TE = b"Transfer-Encoding"
CL = b"Content-Length"

BAD: list[tuple[str, HttpVersion, list[tuple[bytes, bytes]], int]] = [
    ("TRACE", HttpVersion11, [HOST], 405),
    ("CONNECT", HttpVersion11, [HOST], 405),
    ("get", HttpVersion11, [HOST], 405),
    ("POST", HttpVersion10, [HOST, (TE, b"chunked")], 400),
    ("POST", HttpVersion11, [HOST, (TE, b"gzip, chunked")], 400),
    ("POST", HttpVersion11, [HOST, (TE, b"chunked"), (TE, b"chunked")], 400),
    ("POST", HttpVersion11, [HOST, (TE, b"chunked"), (CL, b"5")], 400),
    ("POST", HttpVersion11, [HOST, (TE, b"identity")], 400),
    ("POST", HttpVersion11, [HOST, (CL, b"5"), (b"content-length", b"5")], 400),
    ("POST", HttpVersion11, [HOST, (CL, b"+5")], 400),
    ("POST", HttpVersion11, [HOST, (CL, b"")], 400),
    ("POST", HttpVersion11, [HOST, (CL, b"5,5")], 400),
    ("POST", HttpVersion11, [HOST, (CL, b"9" * 19)], 400),
    ("GET", HttpVersion11, [], 400),
    ("GET", HttpVersion11, [HOST, (b"host", b"l")], 400),
    ("GET", HttpVersion10, [HOST, HOST], 400),
    ("GET", HttpVersion(0, 9), [], 400),
    ("GET", HttpVersion(1, 2), [HOST], 400),
    ("GET", HttpVersion(2, 0), [HOST], 400),
    ("POST", HttpVersion11, [HOST, (b"Expect", b"anything")], 400),
]


@pytest.mark.parametrize(("method", "version", "headers", "code"), BAD, ids=range(len(BAD)))
def test_refused(method: str, version: HttpVersion, headers: list[tuple[bytes, bytes]], code: int) -> None:
    with pytest.raises(RequestRefusal) as caught:
        check_framing(method, version, headers)
    assert caught.value.status_code == code


def test_accepted() -> None:
    check_framing("POST", HttpVersion11, [HOST, (TE, b" Chunked ")])
    check_framing("POST", HttpVersion11, [HOST, (CL, b"5"), (b"Expect", b"100-Continue")])
    check_framing("GET", HttpVersion10, [])


@pytest.mark.parametrize(
    ("headers", "body"),
    [([], False), ([(CL, b"0")], False), ([(CL, b"1")], True), ([(b"transfer-encoding", b"chunked")], True)],
)
def test_has_body(headers: list[tuple[bytes, bytes]], body: bool) -> None:
    assert has_body(headers) is body


REFUSED_TARGETS = ["", "x", "*", "http://a/", "a:1", "/..", "/a/.", "/%2e", "/a%2f%2E%2e%2fb", "/..;x/y", "/\\", "/%5C"]


@pytest.mark.parametrize("target", [*REFUSED_TARGETS, "/%00", "/#", "/ ", "/é"])
def test_targets_refused(target: str) -> None:
    with pytest.raises(RequestRefusal):
        check_target(target)


@pytest.mark.parametrize(
    "target", ["/", "//a", "/a/...", "/..a", "/a;b", "/%zz", "/%", "/a?../..", "/a?%2e%2e", "/a%2Fb"]
)
def test_targets_accepted(target: str) -> None:
    check_target(target)

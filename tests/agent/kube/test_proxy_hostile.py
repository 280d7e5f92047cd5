"""A hostile or dying API server, and requests that two parsers could read differently
(docs/threats.md#H1, docs/threats.md#H5, docs/threats.md#H6, docs/threats.md#H9).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from tests.support.fake_apiserver import closing

from .bench import Bench, running


@pytest.mark.parametrize("data", [b"", b"SSH-2.0-OpenSSH\r\n\r\n"])
async def test_a_broken_answer_to_a_write_is_a_502_and_not_repeated(bench: Bench, data: bytes) -> None:
    bench.api.routes["/api/v1/a"] = closing(data)
    answer = await bench.get("/api/v1/a", method="DELETE")
    assert (answer.status, answer.header("retry-after"), len(bench.api.requests)) == (502, [], 1)
    assert answer.status_object["reason"] == "BadGateway"


async def test_another_ca_is_a_502_that_says_so(tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    async with running(tmp_path, ca_file=other) as bench:
        answer = await bench.get("/api/v1/namespaces")
        assert answer.status == 502
        assert "kubernetes.ca_file" in answer.status_object["message"]
        assert bench.api.requests == []


# -- docs/threats.md#H1, #H5, #H6 on the wire ------------------------------------------------------------------------

REFUSED_HEADS = [
    ("underscore", "GET /api HTTP/1.1\nHost: k\nImpersonate_User: root"),
    ("underscore elsewhere", "GET /api HTTP/1.1\nHost: k\nX_Y: root"),
    ("space before the colon", "GET /api HTTP/1.1\nHost: k\nImpersonate-User : root"),
    ("NUL", "GET /api HTTP/1.1\nHost: k\nImpersonate-User: a\x00b"),
    ("fold", "GET /api HTTP/1.1\nHost: k\nX: a\n Impersonate-User: root"),
    ("8-bit name", "GET /api HTTP/1.1\nHost: k\nImpersonate-Usér: root"), ("no host", "GET /api HTTP/1.1\nX: 1"),
    ("HTTP/0.9", "GET /api"), ("two hosts", "GET /api HTTP/1.1\nHost: k\nHost: l"),
    ("CL and TE", "POST /api HTTP/1.1\nHost: k\nContent-Length: 5\nTransfer-Encoding: chunked"),
    ("two CL", "POST /api HTTP/1.1\nHost: k\nContent-Length: 5\nContent-Length: 6"),
    ("same CL twice", "POST /api HTTP/1.1\nHost: k\nContent-Length: 5\nContent-Length: 5"),
    ("CL list", "POST /api HTTP/1.1\nHost: k\nContent-Length: 5, 5"),
    ("+5", "POST /api HTTP/1.1\nHost: k\nContent-Length: +5"),
    ("0x5", "POST /api HTTP/1.1\nHost: k\nContent-Length: 0x5"),
    ("-5", "POST /api HTTP/1.1\nHost: k\nContent-Length: -5"),
    ("TE twice", "POST /api HTTP/1.1\nHost: k\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked"),
    ("TE gzip, chunked", "POST /api HTTP/1.1\nHost: k\nTransfer-Encoding: gzip, chunked"),
    ("TE identity", "POST /api HTTP/1.1\nHost: k\nTransfer-Encoding: identity"),
    ("TE in 1.0", "POST /api HTTP/1.0\nHost: k\nTransfer-Encoding: chunked"),
    ("expectation", "POST /api HTTP/1.1\nHost: k\nExpect: 200-ok\nContent-Length: 1"),
    ("absolute-form", "GET https://10.0.0.1/api HTTP/1.1\nHost: k"), ("asterisk", "OPTIONS * HTTP/1.1\nHost: k"),
    ("dots", "GET /api/../../healthz HTTP/1.1\nHost: k"), ("one dot", "GET /api/./v1 HTTP/1.1\nHost: k"),
    ("escaped dots", "GET /api/%2e%2e/healthz HTTP/1.1\nHost: k"),
    ("half escaped", "GET /api/.%2E/healthz HTTP/1.1\nHost: k"),
    ("escaped slash and dots", "GET /api%2f..%2fhealthz HTTP/1.1\nHost: k"),
    ("dots and semicolon", "GET /api/..;/healthz HTTP/1.1\nHost: k"),
    ("NUL in the path", "GET /api/%00 HTTP/1.1\nHost: k"), ("backslash", "GET /api\\v1 HTTP/1.1\nHost: k"),
    ("escaped backslash", "GET /api/%5c HTTP/1.1\nHost: k"), ("fragment", "GET /api#x HTTP/1.1\nHost: k"),
    ("8-bit path", "GET /apí HTTP/1.1\nHost: k"), ("bare LF", "GET /api HTTP/1.1\nHost: k\nX: a\vb"),
]  # fmt: skip


@pytest.mark.parametrize("head", [row[1] for row in REFUSED_HEADS], ids=[row[0] for row in REFUSED_HEADS])
async def test_refused_heads_never_leave(bench: Bench, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcbridge.agent.kube.server.LINGER", 0.05)  # some announce a body that never comes
    wire = await bench.begin(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    answer = await wire.answer()
    assert answer.status == 400
    assert answer.status_object["reason"] == "BadRequest"
    assert bench.api.requests == []
    assert await wire.rest() == b"", "the connection ends with the answer"
    (record,) = await bench.audit.wait(1)
    assert (record.status, record.outcome) == (400, "refused")


@pytest.mark.parametrize("method", ["CONNECT", "TRACE", "PROPFIND"])
async def test_methods_that_are_not_carried(bench: Bench, method: str) -> None:
    answer = await bench.get("/api", method=method)
    assert answer.status in (400, 405)
    assert bench.api.requests == []


async def test_long_tokens_and_many_headers_pass(bench: Bench) -> None:
    answer = await bench.get("/api", "X-Long: " + "x" * 60_000, *(f"X-{n}: {n}" for n in range(400)))
    assert answer.status == 200
    assert len(bench.api.last.lines) > 400

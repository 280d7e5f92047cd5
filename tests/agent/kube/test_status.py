"""Errors of ours as metav1.Status."""

from __future__ import annotations

import json

from arcbridge.agent.kube.status import Refusal, bad_request, status_body, status_bytes, status_response
from arcbridge.errors import Unauthenticated


def test_the_object() -> None:
    assert json.loads(status_body(Refusal(503, "no way", retry_after=1))) == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "arcbridge: no way",
        "reason": "ServiceUnavailable",
        "code": 503,
    }


def test_any_error_of_ours_has_a_code() -> None:
    assert json.loads(status_body(Unauthenticated("who?")))["code"] == 401


async def test_headers() -> None:
    response = status_response(Refusal(429, "busy", retry_after=3), request_id="r-1", close=True)
    assert response.headers["Retry-After"] == "3"
    assert response.headers["Audit-Id"] == "r-1"
    assert response.headers["Connection"] == "close"
    assert response.content_type == "application/json"
    assert "Retry-After" not in status_response(bad_request("no")).headers
    assert status_response(Refusal(401, "who?")).headers["WWW-Authenticate"] == "Bearer"


def test_a_whole_answer() -> None:
    refusal = Refusal(503, "no way", retry_after=1)
    head, _, body = status_bytes(refusal, request_id="r-1").partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 503 Service Unavailable"
    assert {b"Retry-After: 1", b"Audit-Id: r-1", b"Content-Length: %d" % len(body)} <= set(lines)
    assert body == status_body(refusal)
    assert b"Retry-After" not in status_bytes(Refusal(502, "no"), request_id="r-1")

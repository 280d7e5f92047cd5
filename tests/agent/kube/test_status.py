"""The agent's own answers as metav1.Status."""

from __future__ import annotations

import json

from arcbridge.agent.kube.status import RequestRefusal, bad_request, status_answer, status_body
from arcbridge.errors import Unauthenticated


def test_the_object() -> None:
    assert json.loads(status_body(RequestRefusal(503, "no way", retry_after=1))) == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "arcbridge: no way",
        "reason": "ServiceUnavailable",
        "code": 503,
        "details": {"retryAfterSeconds": 1},
    }
    assert "details" not in json.loads(status_body(RequestRefusal(503, "no way")))


def test_any_error_of_ours_has_a_code() -> None:
    assert json.loads(status_body(Unauthenticated("who?")))["code"] == 401


def head_and_body(answer: bytes) -> tuple[set[bytes], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return set(head.split(b"\r\n")), body


def test_a_whole_answer() -> None:
    refusal = RequestRefusal(503, "no way", retry_after=1)
    lines, body = head_and_body(status_answer(refusal, request_id="r-1"))
    assert {
        b"HTTP/1.1 503 Service Unavailable",
        b"Content-Type: application/json; charset=utf-8",
        b"Retry-After: 1",
        b"Audit-Id: r-1",
        b"Content-Length: %d" % len(body),
    } <= lines
    assert b"Connection: close" not in lines
    assert body == status_body(refusal, "r-1")
    assert json.loads(body)["message"] == "arcbridge: no way (request r-1)"


def test_the_words_of_kubernetes_stay_as_they_are() -> None:
    refusal = RequestRefusal(403, 'users "bob" is forbidden', prefix="")
    assert json.loads(status_body(refusal, "r-1"))["message"] == 'users "bob" is forbidden'


def test_a_time_that_is_far_away_is_a_date_and_no_number_of_seconds() -> None:
    refusal = RequestRefusal(429, "wait until tomorrow", retry_at=1795651200.0)
    lines, body = head_and_body(status_answer(refusal))
    assert b"Retry-After: Thu, 26 Nov 2026 00:00:00 GMT" in lines
    assert "details" not in json.loads(body)


def test_what_is_said_only_where_it_holds() -> None:
    answer = status_answer(bad_request("no"), close=True)
    assert b"Connection: close" in head_and_body(answer)[0]
    assert b"Retry-After" not in answer
    assert b"Audit-Id" not in answer
    assert b"WWW-Authenticate: Bearer" in head_and_body(status_answer(RequestRefusal(401, "who?")))[0]


def test_the_answer_to_a_head_has_no_body() -> None:
    refusal = RequestRefusal(502, "no")
    lines, body = head_and_body(status_answer(refusal, method="HEAD"))
    assert body == b""
    assert b"Content-Length: %d" % len(status_body(refusal)) in lines

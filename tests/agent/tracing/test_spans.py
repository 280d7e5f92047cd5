"""Which requests have a span, what goes on to the API server, and what a span says."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.agent.audit.record import AuditRecord, AuditSubject
from arcbridge.agent.kube.request_facts import RequestFacts, read_facts
from arcbridge.agent.tracing.spans import FinishedSpan, export_request, span_of

from .collector import attributes, decoded

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{PARENT}-01"


def plain(*values: str, name: str = "Traceparent") -> RequestFacts:
    """A request of the fast path."""
    lines = "".join(f"{name}: {value}\r\n" for value in values)
    return RequestFacts("GET", "/api/v1/pods", f"Accept: */*\r\n{lines}X-After: 1\r\n".encode())


def general(*values: str) -> RequestFacts:
    """The same by the general parser."""
    headers = [(b"Host", b"k"), *((b"traceparent", value.encode("latin-1", "replace")) for value in values)]
    return read_facts("GET", "/api/v1/pods", headers)


@pytest.mark.parametrize("facts", [plain, general])
@pytest.mark.parametrize(
    ("values", "traced"),
    [
        ([SAMPLED], True),
        ([f" {SAMPLED}\t"], True),
        ([f"00-{TRACE}-{PARENT}-ff"], True),
        ([f"01-{TRACE}-{PARENT}-01-what.will.be"], True),
        ([], False),
        ([f"00-{TRACE}-{PARENT}-00"], False),
        ([f"00-{TRACE}-{PARENT}-02"], False),
        ([SAMPLED, SAMPLED], False),
        ([f"00-{'0' * 32}-{PARENT}-01"], False),
        ([f"00-{TRACE}-{'0' * 16}-01"], False),
        ([f"ff-{TRACE}-{PARENT}-01"], False),
        ([f"{SAMPLED}-more"], False),
        ([SAMPLED.upper()], False),
        ([SAMPLED + "1"], False),
        ([""], False),
    ],
)
def test_only_a_request_that_its_caller_samples_has_a_span(facts: object, values: list[str], traced: bool) -> None:
    assert callable(facts)
    assert (span_of(facts(*values), lambda _: None) is not None) == traced


@given(st.lists(st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=80), max_size=3))
def test_no_header_raises(values: list[str]) -> None:
    for facts in (general(*values), plain(*(value.encode("ascii", "replace").decode() for value in values))):
        assert span_of(facts, lambda _: None) is None


@pytest.mark.parametrize("name", ["traceparent", "Traceparent", "TRACEPARENT"])
def test_the_api_server_has_this_span_as_its_parent(name: str) -> None:
    ended: list[FinishedSpan] = []
    span = span_of(plain(SAMPLED), ended.append)
    head = f"GET /traceparent: HTTP/1.1\r\n{name}: {SAMPLED}\r\ntracestate: a=b\r\nX-traceparent: {SAMPLED}\r\n\r\n"
    passed = span.passed_on(head.encode()).decode()
    span.end(AuditRecord("r-1", AuditSubject("s")))
    (finished,) = ended
    assert passed == head.replace(f"\n{name}: {SAMPLED}", f"\n{name}: 00-{TRACE}-{finished.span}-01")
    assert (finished.trace, finished.parent) == (TRACE, PARENT)
    assert finished.span != PARENT


@pytest.mark.parametrize(("flags", "passed"), [("01", b"01"), ("03", b"03"), ("ff", b"03")])
def test_flags_that_are_known_go_on(flags: str, passed: bytes) -> None:
    """Of level 2 whether the trace's id is random; one that nobody knows yet does not."""
    value = f"00-{TRACE}-{PARENT}-{flags}"
    span = span_of(plain(value), lambda _: None)
    assert span.passed_on(f"GET / HTTP/1.1\r\ntraceparent: {value}\r\n\r\n".encode())[-6:-4] == passed


def test_o10_a_span_says_verb_and_resource_and_no_name() -> None:
    ended: list[FinishedSpan] = []
    span = span_of(general(SAMPLED), ended.append)
    record = AuditRecord("join-1-1", AuditSubject("0123456789abcdef", "anna@example.org"), method="GET")
    record.asks(("get", "apps", "deployments", "scale", "secret-space", "secret-name", "secret-path"), "")
    record.answer(200)
    span.end(record)
    body = json.dumps(export_request(ended, "agent-1")).encode()
    assert not any(word in body for word in (b"secret", b"anna", b"example"))
    ((resource, found),) = decoded(body)
    assert (resource["service.name"], resource["service.instance.id"]) == ("arcbridge-agent", "agent-1")
    assert (found.trace_id.hex(), found.parent_span_id.hex()) == (TRACE, PARENT)
    assert (found.name, found.kind, found.flags, found.status.code) == ("get deployments/scale", 2, 0x301, 0)
    assert found.start_time_unix_nano <= found.end_time_unix_nano
    assert attributes(found) == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "arcbridge.verb": "get",
        "arcbridge.api_group": "apps",
        "arcbridge.resource": "deployments",
        "arcbridge.subresource": "scale",
        "arcbridge.outcome": "answered",
        "arcbridge.session": "0123456789abcdef",
        "audit-id": "join-1-1",
    }


@pytest.mark.parametrize(("status", "cut", "error"), [(503, False, True), (404, False, False), (200, True, True)])
def test_what_failed_is_an_error(status: int, cut: bool, error: bool) -> None:
    ended: list[FinishedSpan] = []
    span = span_of(plain(SAMPLED), ended.append)
    record = AuditRecord("r", AuditSubject("s"))
    record.answer(status)
    if cut:
        record.cut("the answer broke off")
    span.end(record)
    ((_, found),) = decoded(json.dumps(export_request(ended, "a")).encode())
    assert (found.status.code == 2) == error


def test_o10_a_resource_is_bounded_whatever_a_caller_asks_for() -> None:
    for length in (10, 1_000, 100_000):
        long = "é" * length
        span = FinishedSpan(TRACE, PARENT, "1" * 16, 1, 0, long, long, long, long, long, "s", "r", 200, "answered")
        body = json.dumps(export_request([span], "a")).encode()
        ((_, found),) = decoded(body)
        assert len(body) < 1024
        assert found.end_time_unix_nano == found.start_time_unix_nano == 1, "a clock that was set back"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("deployments", True),
        ("rbac.authorization.k8s.io", True),
        ("a" * 63, True),
        ("a" * 64, False),
        ("a" * 250, False),
        ("eyJhbGciOi", False),
        ("anna@example", False),
        ("two words", False),
        ("line\n", False),
    ],
)
def test_o10_a_text_that_kubernetes_does_not_have_is_left_out(text: str, kept: bool) -> None:
    """No pattern searches it: callers choose paths, and the event loop makes spans."""
    span = FinishedSpan(TRACE, PARENT, "1" * 16, 1, 2, text, "get", text, text, text, "s", "r", 200, "answered")
    ((_, found),) = decoded(json.dumps(export_request([span], "a")).encode())
    told = attributes(found)
    assert told["http.request.method"] == "_OTHER"
    for key in ("arcbridge.api_group", "arcbridge.resource", "arcbridge.subresource"):
        assert told.get(key) == (text if kept else None)
    assert found.name == (f"get {text}/{text}" if kept else "get")

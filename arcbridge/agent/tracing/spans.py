"""Makes a span of each request whose caller says that it traces it (W3C Trace Context), and passes its context on.

A request without a `traceparent`, with two, with one that is malformed or that does not say "sampled" has no span, and
its header goes on as it came. A span has no name of an object, namespace or user, no path and no query: what it says of
a request is its verb and its resource. Spans are tuples until they are sent; nothing here waits or raises.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from arcbridge import __version__

if TYPE_CHECKING:
    from arcbridge.agent.audit.record import AuditRecord
    from arcbridge.agent.kube.request_facts import RequestFacts

_LINE: Final = re.compile(rb"(?im)^(traceparent:[ \t]*+)([^\r\n]*+)")
_VALUE: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[ -~]*+)?")
"""https://www.w3.org/TR/trace-context/#traceparent-header: of later versions the first four fields count."""
_TEXT: Final = re.compile(r"[a-z0-9.-]{0,63}")
"""A verb, group, resource or subresource as Kubernetes has them. Callers choose paths: what is of another form may be a
name or a secret, is left out, and costs the event loop nothing more."""
_METHOD: Final = re.compile(r"[A-Z]{1,16}")
_FLAGS: Final = 0x03
"""sampled, and random-trace-id of https://www.w3.org/TR/trace-context-2/#trace-flags. Others are sent as 0."""
_SERVER: Final = 2
"""SPAN_KIND_SERVER of opentelemetry/proto/trace/v1/trace.proto."""
_ERROR: Final = 2
"""STATUS_CODE_ERROR."""
_FAILED: Final = frozenset({"cut", "failed"})
"""Outcomes of a request that are errors whatever its status was."""


class FinishedSpan(NamedTuple):
    """A request that was traced and is over; ids are lower-case hexadecimal, times nanoseconds since 1970."""

    trace: str
    parent: str
    span: str
    begun: int
    ended: int
    method: str
    verb: str
    group: str
    resource: str
    subresource: str
    session: str
    request: str
    status: int
    outcome: str


class Span:
    """A request that is traced and runs."""

    __slots__ = ("_begun", "_finished", "_flags", "_parent", "_span", "_trace")

    def __init__(self, trace: str, parent: str, flags: int, finished: Callable[[FinishedSpan], None]) -> None:
        self._flags = flags & _FLAGS
        self._trace, self._parent, self._finished = trace, parent, finished
        self._span = secrets.token_hex(8)
        self._begun = time.time_ns()

    def passed_on(self, head: bytes) -> bytes:
        """Return the head of the request to the API server, in which this span is the parent."""
        value = f"00-{self._trace}-{self._span}-{self._flags:02x}".encode()
        return _LINE.sub(lambda line: line[1] + value, head, count=1)

    def end(self, record: AuditRecord) -> None:
        """Take what became of the request."""
        self._finished(
            FinishedSpan(
                self._trace,
                self._parent,
                self._span,
                self._begun,
                time.time_ns(),
                record.method,
                *(record.verb, record.group, record.resource, record.subresource),
                record.subject.session,
                record.request,
                record.status,
                record.outcome.value,
            )
        )


def span_of(facts: RequestFacts, finished: Callable[[FinishedSpan], None]) -> Span | None:
    """Return the span of a request, if its caller samples it; `finished` is called with it once."""
    if facts.plain is not None:
        values = [line[2] for line in _LINE.finditer(facts.plain)]
    else:
        values = facts.values.get(b"traceparent", [])
    found = _VALUE.fullmatch(values[0].strip(b" \t")) if len(values) == 1 else None
    if found is None:
        return None
    version, trace, parent, flags, rest = found.groups()
    if version == b"ff" or (version == b"00" and rest) or not trace.strip(b"0") or not parent.strip(b"0"):
        return None
    bits = int(flags, 16)
    return Span(trace.decode(), parent.decode(), bits, finished) if bits & 1 else None


def export_request(spans: Iterable[FinishedSpan], instance: str) -> dict[str, Any]:
    """Return spans as an ExportTraceServiceRequest in OTLP's JSON: ids in hexadecimal, 64-bit numbers as texts."""
    resource = {"service.name": "arcbridge-agent", "service.version": __version__, "service.instance.id": instance}
    scope = {"name": "arcbridge.agent", "version": __version__}
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes(resource)},
                "scopeSpans": [{"scope": scope, "spans": [_json(span) for span in spans]}],
            }
        ]
    }


def _json(span: FinishedSpan) -> dict[str, Any]:
    verb, group, resource, subresource = map(_known, (span.verb, span.group, span.resource, span.subresource))
    # As OpenTelemetry's conventions for HTTP have methods that are not known.
    method = span.method if _METHOD.fullmatch(span.method) else "_OTHER"
    what = "/".join(part for part in (resource, subresource) if part)
    failed = span.status >= 500 or span.outcome in _FAILED
    return {
        "traceId": span.trace,
        "spanId": span.span,
        "parentSpanId": span.parent,
        "flags": 0x301,  # sampled; and the parent is known to be of another process
        "name": f"{verb or method} {what}".strip(),
        "kind": _SERVER,
        "startTimeUnixNano": str(span.begun),
        "endTimeUnixNano": str(max(span.begun, span.ended)),
        "attributes": _attributes(
            {
                "http.request.method": method,
                "http.response.status_code": span.status,
                "arcbridge.verb": verb,
                "arcbridge.api_group": group,
                "arcbridge.resource": resource,
                "arcbridge.subresource": subresource,
                "arcbridge.outcome": span.outcome,
                "arcbridge.session": span.session,
                # The API server's span of the request has it by this name.
                "audit-id": span.request,
            }
        ),
        **({"status": {"code": _ERROR}} if failed else {}),
    }


def _known(text: str) -> str:
    """Return a text as it is where it has the form of one of Kubernetes', else nothing."""
    return text if _TEXT.fullmatch(text) else ""


def _attributes(values: Mapping[str, str | int]) -> list[dict[str, Any]]:
    """Return attributes; those that are empty are left out."""
    return [
        {"key": key, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}}
        for key, value in values.items()
        if value
    ]

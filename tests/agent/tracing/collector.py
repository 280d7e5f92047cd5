"""A collector in this process: an HTTP server that reads what it is sent by OpenTelemetry's own types."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from google.protobuf.json_format import Parse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

IDS = ("traceId", "spanId", "parentSpanId")


def decoded(body: bytes) -> list[tuple[dict[str, str], Span]]:
    """Return the spans of a request with what their resource says. Raises for a field that OTLP does not have.

    OTLP's JSON has ids in hexadecimal, where that of protobuf has base64; all else is alike.
    """
    document = json.loads(body)
    for resource in document["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                for key in IDS:
                    span[key] = base64.b64encode(bytes.fromhex(span[key])).decode()
    request = Parse(json.dumps(document), ExportTraceServiceRequest())
    return [
        ({one.key: one.value.string_value for one in resource.resource.attributes}, span)
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def attributes(span: Span) -> dict[str, str | int]:
    """The attributes of a span."""
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


class Collector:
    """What came, and what is answered: the statuses in `answers` first, then 200."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[web.Response] = []

    @property
    def spans(self) -> list[tuple[dict[str, str], Span]]:
        return [span for body in self.bodies for span in decoded(body)]

    async def _take(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.headers.append(dict(request.headers))
        answer = self.answers.pop(0) if self.answers else None
        if answer is None:
            self.bodies.append(body)
        return answer or web.json_response({"partialSuccess": {}})


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """A collector on loopback."""
    made = Collector()
    app = web.Application(client_max_size=8 * 1024**2)
    app.router.add_post("/v1/traces", made._take)
    runner: Any = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/traces"
    try:
        yield made
    finally:
        await runner.cleanup()

"""Spans from a caller's request to a collector: both entrances, a collector that fails, bounds, and the end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from arcbridge.agent.tracing import exporter
from arcbridge.agent.tracing.exporter import BATCH, MOST_WAITING, SpanExporter
from arcbridge.agent.tracing.spans import FinishedSpan
from arcbridge.observe.metrics import Metrics
from arcbridge.settings.config import TracingConfig
from arcbridge.tasks import cancel_and_wait
from tests.agent.kube.bench import running
from tests.support.eventually import until
from tests.support.fake_apiserver import reply

from .collector import Collector, attributes, collecting
from .test_spans import PARENT, SAMPLED, TRACE

SPAN = FinishedSpan(TRACE, PARENT, "1" * 16, 1, 2, "GET", "list", "", "pods", "", "session", "request", 200, "answered")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "GATHERING", 0.01)


@asynccontextmanager
async def exporting(collector: Collector, **settings: Path) -> AsyncIterator[SpanExporter]:
    made = SpanExporter(TracingConfig(endpoint=collector.url, **settings), "agent-1")
    task = asyncio.get_running_loop().create_task(made.run())
    try:
        yield made
    finally:
        await cancel_and_wait(task)


async def test_a_trace_goes_through_the_agent_by_both_entrances(tmp_path: Path) -> None:
    async with collecting() as collector, running(tmp_path) as bench, exporting(collector) as tracer:
        bench.proxy.context.tracer = tracer
        bench.api.routes["/api/v1/namespaces/a/pods/x"] = reply(404, b"{}")
        await bench.get("/api/v1/pods?labelSelector=canary", f"traceparent: {SAMPLED}", "tracestate: vendor=1")
        await bench.get("/api/v1/namespaces/a/pods/x", f"Traceparent: {SAMPLED}", method="DELETE")
        await bench.get("/api/v1/nodes", f"traceparent: {SAMPLED[:-1]}0")
        await bench.get("/api/v1/nodes")
        refused = await bench.get("/api/../v1/pods", f"traceparent: {SAMPLED}")
        assert refused.status == 400
        await until(lambda: len(collector.spans) == 3)
        spans = [span for _, span in collector.spans]
        assert [(span.name, attributes(span)["arcbridge.outcome"]) for span in spans] == [
            ("list pods", "answered"),
            ("delete pods", "answered"),
            ("GET", "refused"),
        ]
        assert {(span.trace_id.hex(), span.parent_span_id.hex()) for span in spans} == {(TRACE, PARENT)}
        plain, deleted, not_sampled, without = bench.api.requests
        for request, span in ((plain, spans[0]), (deleted, spans[1])):
            assert request.header("traceparent") == [f"00-{TRACE}-{span.span_id.hex()}-01".encode()]
            assert request.header("audit-id") == [str(attributes(span)["audit-id"]).encode()]
        assert plain.header("tracestate") == [b"vendor=1"]
        assert not_sampled.header("traceparent") == [f"{SAMPLED[:-1]}0".encode()], "as it came"
        assert without.header("traceparent") == []
        assert not any(b"canary" in body for body in collector.bodies)


async def test_the_same_batch_comes_again_when_the_collector_says_later(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("t0ken\n")
    async with collecting() as collector, exporting(collector, token_file=token) as tracer:
        collector.answers += [web.Response(status=503), web.Response(status=429, headers={"Retry-After": "0"})]
        tracer._take(SPAN)
        await until(lambda: tracer.sent == 1)
        assert (len(collector.spans), tracer.failures, sum(tracer.dropped.values())) == (1, 2, 0)
        assert {one["Authorization"] for one in collector.headers} == {"Bearer t0ken"}


async def test_a_batch_that_is_refused_is_dropped_and_counted(tmp_path: Path) -> None:
    async with collecting() as collector, exporting(collector) as tracer:
        collector.answers.append(web.Response(status=400))
        tracer._take(SPAN)
        await until(lambda: tracer.dropped["refused"] == 1)
        tracer._take(SPAN)
        await until(lambda: tracer.sent == 1)
        metrics = Metrics("agent")
        tracer.register(metrics)
        text = metrics.render()[0].decode()
        assert 'arcbridge_agent_spans_dropped_total{reason="refused"} 1.0' in text
        assert "arcbridge_agent_spans_waiting 0.0" in text


@pytest.mark.parametrize(
    ("partial", "refused"),
    [
        ({"rejectedSpans": "1"}, 1),
        ({"rejectedSpans": 1}, 1),
        ({"rejectedSpans": "99"}, 2),
        ({"rejectedSpans": "-1"}, 0),
        ({"rejectedSpans": "many"}, 0),
        ({"rejectedSpans": [1]}, 0),
        ({}, 0),
        ("?", 0),
    ],
)
async def test_spans_that_a_collector_says_it_did_not_take_are_dropped(partial: object, refused: int) -> None:
    async with collecting() as collector, exporting(collector) as tracer:
        collector.answers.append(web.json_response({"partialSuccess": partial}))
        tracer._take(SPAN)
        tracer._take(SPAN)
        await until(lambda: tracer.sent + tracer.dropped["refused"] == 2)
        assert (tracer.dropped["refused"], tracer.failures) == (refused, min(refused, 1))


async def test_a_long_answer_is_no_reason_to_send_a_batch_again() -> None:
    async with collecting() as collector, exporting(collector) as tracer:
        collector.answers.append(web.Response(body=b"x" * (2 << 20)))
        tracer._take(SPAN)
        await until(lambda: tracer.sent == 1)
        assert (tracer.failures, len(collector.headers)) == (0, 1)


async def test_spans_that_an_end_loses_are_counted() -> None:
    tracer = SpanExporter(TracingConfig(endpoint="http://127.0.0.1:9/v1/traces"), "agent-1")
    task = asyncio.get_running_loop().create_task(tracer.run())
    await asyncio.sleep(0)
    tracer._take(SPAN)
    await cancel_and_wait(task)
    assert tracer.dropped["stopped"] == 1


async def test_a_change_of_the_reason_and_the_recovery_are_logged(tmp_path: Path) -> None:
    token = tmp_path / "token"
    with capture_logs() as logs:
        async with collecting() as collector, exporting(collector, token_file=token) as tracer:
            collector.answers += [web.Response(status=503, headers={"Retry-After": "0"}) for _ in range(3)]
            tracer._take(SPAN)
            await until(lambda: tracer.failures >= 2)
            token.write_text("t0ken\n")
            await until(lambda: tracer.sent == 1)
    told = [(line["event"], line.get("reason", "")) for line in logs if line["event"].startswith("spans")]
    where = collector.url.split("/")[2]
    assert told == [
        ("spans not sent", f"tracing.token_file: {token} cannot be read"),
        ("spans not sent", f"{where}: answered 503"),
        ("spans are sent again", ""),
    ]


async def test_a_defect_costs_one_batch_and_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context["message"]))
    real = exporter.export_request

    def broken(spans: Iterable[FinishedSpan], instance: str) -> object:
        monkeypatch.setattr(exporter, "export_request", real)
        raise AssertionError

    monkeypatch.setattr(exporter, "export_request", broken)
    async with collecting() as collector, exporting(collector) as tracer:
        tracer._take(SPAN)
        await until(lambda: tracer.dropped["defect"] == 1)
        tracer._take(SPAN)
        await until(lambda: tracer.sent == 1)
    assert seen == ["spans were not sent"]


async def test_o10_spans_that_wait_are_bounded_while_the_collector_is_away() -> None:
    """Callers choose which requests are traced, and how many."""
    tracer = SpanExporter(TracingConfig(endpoint="http://127.0.0.1:9/v1/traces"), "agent-1")
    for count in (10, 1_000, 10 * MOST_WAITING):
        for _ in range(count):
            tracer._take(SPAN)
        assert len(tracer._waiting) <= MOST_WAITING
    assert tracer.dropped["full"] == 1_010 + 10 * MOST_WAITING - MOST_WAITING
    task = asyncio.get_running_loop().create_task(tracer.run())
    await until(lambda: tracer.failures > 0)
    async with asyncio.timeout(5):
        await cancel_and_wait(task)


async def test_what_waits_is_sent_in_batches_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "GATHERING", 600.0)
    async with collecting() as collector:
        async with exporting(collector) as tracer:
            await asyncio.sleep(0)
            for _ in range(BATCH + 3):
                tracer._take(SPAN)
            await until(lambda: tracer.sent == BATCH)
        assert [body.count(b'"spanId"') for body in collector.bodies] == [BATCH, 3]


def test_an_agent_without_spans_does_not_import_them() -> None:
    code = "import arcbridge.agent.service, sys; sys.exit(any('agent.tracing' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What the proxy has the audit log write, and when a request may go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import pytest

from arcbridge.agent.audit import AuditLog, AuditRecord
from arcbridge.errors import StreamReset
from tests.support.eventually import until

from .bench import PODS, Bench

WRITE = f"POST {PODS} HTTP/1.1\nHost: k\nContent-Type: application/json\nContent-Length: 2"


UPGRADE = (
    f"GET {PODS}/p/exec?command=id&container=c&tty=true HTTP/1.1\nHost: k\nConnection: Upgrade\nUpgrade: websocket\n"
    "Sec-WebSocket-Version: 13\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\nSec-WebSocket-Protocol: v5.channel.k8s.io"
)


def held(log: AuditLog) -> list[Callable[[str], None]]:
    """Hold the records that requests wait for: nothing is told before the test says so."""
    waiting: list[Callable[[str], None]] = []

    def begin(record: AuditRecord, recorded: Callable[[str], None]) -> None:
        record.begun = True
        waiting.append(recorded)

    log.begin = begin
    return waiting


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (f"GET {PODS}?watch=1 HTTP/1.1\nHost: k", b""),
        (f"GET {PODS}/p/log?follow=true HTTP/1.1\nHost: k", b""),
        (f"DELETE {PODS}/p HTTP/1.1\nHost: k", b""),
        (WRITE, b"{}"),
        (UPGRADE, b""),
    ],
)
async def test_a12_nothing_leaves_before_the_record(bench: Bench, head: str, body: bytes) -> None:
    waiting = held(bench.audit)
    wire = await bench.begin(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
    await until(lambda: waiting)
    assert bench.api.connections == 0, "not even a connection is made"
    waiting[0]("")
    await wire.head()
    assert bench.api.connections == 1
    (record,) = await bench.audit.wait(1)
    assert record.begun
    assert '"stage":"ended"' in record.line(1.0)


async def test_a12_a_request_that_only_reads_has_one_record(bench: Bench) -> None:
    waiting = held(bench.audit)
    assert (await bench.get(PODS)).status == 200
    assert waiting == []
    (record,) = await bench.audit.wait(1)
    assert '"stage":"complete"' in record.line(1.0)


@pytest.mark.parametrize("head", [f"GET {PODS}?watch=1 HTTP/1.1\nHost: k", WRITE])
async def test_a11_a_request_whose_record_cannot_be_written_is_refused(bench: Bench, head: str) -> None:
    waiting = held(bench.audit)
    wire = await bench.begin(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + b"{}" * (head == WRITE))
    await until(lambda: waiting)
    waiting[0]("the disk is full")
    answer = await wire.answer()
    assert answer.status == 503
    assert answer.status_object["message"].startswith("arcbridge: the disk is full (request ")
    assert bench.api.connections == 0
    assert (await bench.audit.wait(1))[0].outcome == "refused"


async def test_a12_a_caller_that_leaves_before_the_record_is_written(bench: Bench) -> None:
    waiting = held(bench.audit)
    wire = await bench.begin(f"GET {PODS}?watch=1 HTTP/1.1\r\nHost: k\r\n\r\n".encode())
    await until(lambda: waiting)
    wire.transport.abort()
    (record,) = await bench.audit.wait(1)
    assert record.outcome == "cut"
    waiting[0]("")
    await asyncio.sleep(0)
    assert bench.api.connections == 0
    assert len(bench.audit.kept) == 1
    assert bench.proxy.stats.in_flight == 0


async def test_a16_what_exec_asks_for_is_in_both_records(bench: Bench) -> None:
    waiting = held(bench.audit)
    wire = await bench.begin(UPGRADE.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    await until(lambda: waiting)
    waiting[0]("")
    await wire.head()
    (record,) = await bench.audit.wait(1)
    for line in (record.begun_line(), record.line(1.0)):
        assert '"subresource":"exec"' in line
        assert '"container":"c","command":["id"],"tty":true' in line


PRIVILEGED = b'{"spec":{"containers":[{"name":"c","securityContext":{"privileged":true}}]}}'


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a16_the_end_of_a_body_waits_for_the_record_of_what_it_asks_for(bench: Bench, framing: str) -> None:
    details: list[tuple[AuditRecord, Callable[[str], None]]] = []
    bench.audit.detail = lambda *asked: details.append(asked)
    wire = bench.stream()
    if framing == "length":
        body, header = PRIVILEGED, f"Content-Length: {len(PRIVILEGED)}"
    else:
        body, header = b"%x\r\n%b\r\n0\r\n\r\n" % (len(PRIVILEGED), PRIVILEGED), "Transfer-Encoding: chunked"
    head = f"POST {PODS} HTTP/1.1\r\nHost: k\r\nContent-Type: application/json\r\n{header}\r\n\r\n"
    await wire.send(head.encode() + body)
    await until(lambda: details)
    record, recorded = details[0]
    assert '"stage":"details"' in record.details_line()
    assert '"privileged":["privileged c"]' in record.details_line()
    assert not any(request.complete for request in bench.api.requests), "the body has not arrived whole"
    recorded("")
    assert (await wire.answer()).status == 200
    assert bench.api.last.body == PRIVILEGED


async def test_a16_a_body_whose_record_cannot_be_written_never_arrives(bench: Bench) -> None:
    bench.audit.detail = lambda record, recorded: recorded("the disk is full")
    head = f"POST {PODS} HTTP/1.1\nHost: k\nContent-Type: application/json\nContent-Length: {len(PRIVILEGED)}"
    answer = await bench.ask(head, PRIVILEGED, method="POST")
    assert answer.status == 503
    assert answer.status_object["message"].startswith("arcbridge: the disk is full (request ")
    assert not any(request.complete for request in bench.api.requests)


def _fail(*_: object, **__: object) -> None:
    raise RuntimeError("SECRET of a handler")


PLACES = [
    "arcbridge.agent.kube.attempt.request_target", "arcbridge.agent.kube.attempt.Attempt._admit",
    "arcbridge.agent.kube.attempt.authorize", "arcbridge.agent.kube.exchange.Exchange._send_on_idle",
    "arcbridge.agent.kube.upstream_pool.UpstreamPool.send", "arcbridge.agent.kube.exchange.Exchange.response_begins",
    "arcbridge.agent.kube.exchange.Exchange.response_data",
    "arcbridge.agent.kube.upstream_pool.UpstreamConnection.send", "arcbridge.agent.kube.upstream_pool.read_head",
    "arcbridge.agent.kube.upstream_pool.UpstreamPool.dial",
]  # fmt: skip


GENERAL_PLACES = [
    "arcbridge.agent.kube.proxy.read_facts", "arcbridge.agent.kube.authorize.passed_lines",
    "arcbridge.agent.kube.proxy.RequestBody", "arcbridge.agent.kube.proxy.Inspection",
    "arcbridge.agent.kube.pod_body.pod_details", "arcbridge.agent.kube.proxy.is_inspected",
]  # fmt: skip


@pytest.mark.parametrize("place", [*PLACES, *GENERAL_PLACES])
async def test_a20_a_handler_that_fails_anywhere_leaves_one_record(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The request ends, nothing stays counted, and nothing of the failure is told."""
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    monkeypatch.setattr(place, _fail)
    wire = bench.stream()
    write = place in GENERAL_PLACES
    head = WRITE if write else f"GET {PODS}?limit=500 HTTP/1.1\nHost: k"
    await wire.send(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + b"{}" * write)
    (record,) = await bench.audit.wait(1)
    assert record.outcome in ("failed", "cut") or record.status == 502
    assert record.method == ("POST" if write else "GET")
    assert record.status in (0, 500, 502, 503) or record.outcome == "cut"
    assert (record.verb, record.subject.user) in (("create" if write else "list", "alice"), ("", "alice"))
    with suppress(StreamReset, EOFError):
        answer = await wire.answer()
        assert answer.status == record.status
        assert b"SECRET" not in answer.body
    monkeypatch.undo()
    assert len(bench.audit.kept) == 1
    assert bench.proxy.stats.in_flight == 0
    asyncio.get_running_loop().set_exception_handler(None)
    assert (await bench.get("/api")).status == 200, "the next request is served"

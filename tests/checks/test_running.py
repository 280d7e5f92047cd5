"""What is read of a process that runs beside: its readiness, and which of its refusals an operator can do something
about."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from arcbridge.checks.diagnosis import FindingState
from arcbridge.checks.running import look_at_process, look_at_refusals, read_page, samples_of
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.server import ObserveServer

RULES = ("token.iss", "claims.rule", "token.exp")


class Process:
    """A process with a listener."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.refusals: dict[str, int] = {}
        self.without = 0
        metrics, checks = Metrics("agent"), Checks()
        checks.add("control", lambda: self.reason)
        metrics.counter("token_refusals_total", "Refused.", {"rule": RULES}, lambda: self.refusals)
        metrics.counter("tokens_verified_total", "Accepted.", None, lambda: 20)
        metrics.counter("tokens_without_groups_total", "Without.", None, lambda: self.without)
        self.server = ObserveServer("127.0.0.1:0", metrics, checks)
        self.listen = ""


@pytest.fixture
async def process() -> AsyncIterator[Process]:
    made = Process()
    made.listen = await made.server.start()
    yield made
    await made.server.stop()


async def test_a_process_that_is_ready(process: Process) -> None:
    (found,) = await look_at_process(process.listen)
    assert found.state is FindingState.OK
    process.reason = "no relay"
    (found,) = await look_at_process(process.listen)
    assert (found.state, found.code) == (FindingState.FAILED, "not_ready")
    assert "control: no relay" in found.detail


async def test_a_process_that_does_not_run() -> None:
    (found,) = await look_at_process("127.0.0.1:1")
    assert (found.state, found.code) == (FindingState.FAILED, "not_running")
    (found,) = await look_at_process("")
    assert found.state is FindingState.SKIPPED


async def test_refusals_that_settings_can_be_the_cause_of(process: Process) -> None:
    process.refusals = {"token.exp": 5}
    (found,) = await look_at_refusals("arcbridge_agent_", process.listen, "tokens")
    assert found.state is FindingState.OK
    process.refusals = {"token.iss": 2, "claims.rule": 1}
    found, other = await look_at_refusals("arcbridge_agent_", process.listen, "tokens")
    assert (found.state, found.code, other.code) == (FindingState.WARNING, "token_issuer", "token_claim")
    assert found.detail.startswith("2 ")
    (found,) = await look_at_refusals("arcbridge_agent_", "127.0.0.1:1", "tokens")
    assert found.state is FindingState.SKIPPED


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"", None),
        (b"nonsense", None),
        (b"HTTP/1.0 x y\r\n\r\n", None),
        (b"HTTP/1.0 302 Found\r\nLocation: /elsewhere\r\n\r\n", 302),
    ],
)
async def test_another_server_at_that_port(answer: bytes, status: int | None) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer if b" /metrics " in head else b"HTTP/1.0 200 OK\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        page = await read_page(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", "/metrics")
    assert (page and page.status) == status


def test_samples() -> None:
    text = '# HELP a b\na_total{x="1"} 2.0\nb 3e2\nnonsense\n'
    assert samples_of(text) == {'a_total{x="1"}': 2.0, "b": 300.0}


async def test_tokens_without_groups_are_told_where_nearly_all_lack_them(process: Process) -> None:
    process.without = 17
    (found,) = await look_at_refusals("arcbridge_agent_", process.listen, "tokens")
    assert found.state is FindingState.OK, "some users may be in no group"
    process.without = 18
    (found,) = await look_at_refusals("arcbridge_agent_", process.listen, "tokens")
    assert (found.state, found.code) == (FindingState.WARNING, "token_groups")
    assert found.detail == "18 of 20 that were accepted lack the claim that gives the groups"

"""What the fast path alone does, over real streams; test_proxy asks both entrances everything else."""

from __future__ import annotations

import asyncio
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from arcbridge.agent.accounts import DAY
from arcbridge.errors import StreamReset
from arcbridge.settings.config import AgentLimitsConfig
from arcbridge.wire.frames import ResetCode
from tests.support.eventually import until
from tests.support.fake_apiserver import Exchange, Held, Unanswered, chunked, impersonation_of, reply

from .bench import Bench, running

PLAIN = b"GET /api/v1/pods HTTP/1.1\r\nHost: k\r\n\r\n"
WITH_BODY = b"POST /api/v1/pods HTTP/1.1\r\nHost: k\r\nContent-Length: 2\r\n\r\nok"


async def test_a_stream_goes_over_to_the_general_way_and_counts_on(bench: Bench) -> None:
    wire = bench.stream()
    for data in (PLAIN, PLAIN, WITH_BODY, PLAIN):
        await wire.send(data)
        assert (await wire.answer()).status == 200
        assert len(bench.proxy.fast_paths) == (1 if len(bench.api.requests) < 3 else 0)
    assert [request.method for request in bench.api.requests] == ["GET", "GET", "POST", "GET"]
    for request in bench.api.requests:
        assert impersonation_of(request)["impersonate-user"] == [b"alice"]
    records = await bench.audit.wait(4)
    assert [record.request[-2:] for record in records] == ["-1", "-2", "-3", "-4"]
    assert [record.request.encode() for record in records] == [
        request.header("audit-id")[0] for request in bench.api.requests
    ]
    assert bench.proxy.stats.in_flight == 0


async def test_h40_half_a_head_with_a_known_line_waits_for_its_rest(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def denied(*_: object) -> bool:
        return False

    monkeypatch.setattr(bench.proxy.context.reviewer, "_ask", denied)
    wire = await bench.begin(b"GET /api/v1/a HTTP/1.1\r\nHost: k\r\nAccept: */*\r\n\r\n")
    assert (await wire.answer()).status == 200
    await wire.send(b"GET /api/v1/secrets HTTP/1.1\r\nAccept: */*")
    await until(lambda: not bench.proxy.fast_paths or len(bench.api.requests) > 1)
    await wire.send(b"\r\nHost: k\r\nImpersonate-User: bob\r\n\r\n")
    assert (await wire.answer()).status == 403
    assert (await bench.audit.wait(2))[1].as_user == "bob"
    assert len(bench.api.requests) == 1


async def test_what_comes_too_early_waits_its_turn(bench: Bench) -> None:
    bench.api.routes["/api/v1/pods"] = route = Held(reply(200, b"first"))
    wire = await bench.begin(PLAIN)
    await wire.send(b"GET /api/v1/b HTTP/1.1\r\nHost: k\r\n")
    await until(lambda: bench.api.requests)
    await wire.send(b"X: 1\r\n\r\n")
    route.release.set()
    assert (await wire.answer()).body == b"first"
    assert (await wire.answer()).status == 200
    assert [request.target for request in bench.api.requests] == ["/api/v1/pods", "/api/v1/b"]


async def test_a_caller_who_sends_without_end_is_held_back(bench: Bench) -> None:
    bench.api.routes["/api/v1/pods"] = route = Held(reply(200, b"first"))
    wire = await bench.begin(PLAIN)
    async with asyncio.timeout(5):
        await until(lambda: bench.api.requests)
        (path,) = bench.proxy.fast_paths
        await wire.send(b"GET /api HTTP/1.1\r\nHost: k\r\n\r\n" * 40_000)
        await until(lambda: path._unread)
    await asyncio.sleep(0.1)
    assert len(path._unread) <= 512 * 1024, "one read of the session, and no more"
    route.release.set()
    assert (await wire.answer()).body == b"first"
    assert (await wire.answer()).status == 200


async def test_a_connection_that_was_held_back_at_the_end_carries_the_next_request(bench: Bench) -> None:
    for number, size in enumerate((300_000, 1_000_000, 1000)):
        body = bytes([65 + number]) * size
        bench.api.routes["/api/v1/pods"] = chunked(200, *[body[:100_000]] * (size // 100_000), body[size // 2 :])
        bench.api.routes["/api/v1/a"] = reply(200, body)
        for path in (b"pods", b"a"):
            wire = await bench.begin(PLAIN.replace(b"pods", path))
            assert set((await wire.answer()).body) == {65 + number}
            wire.io.finish()
    assert bench.api.connections == 1


async def test_a_caller_who_leaves_while_the_api_server_is_dialled(bench: Bench) -> None:
    """Or, where this machine is slow, while it does not answer."""
    bench.api.routes["/api/v1/pods"] = Unanswered()
    wire = await bench.begin(PLAIN)
    await until(lambda: bench.proxy.stats.in_flight)
    wire.io.reset()
    (record,) = await bench.audit.wait(1)
    assert (record.outcome, record.status) == ("cut", 0)
    assert bench.proxy.stats.in_flight == 0


async def test_the_end_of_the_agent_cuts_what_runs(bench: Bench) -> None:
    bench.api.routes["/api/v1/pods"] = chunked(200, b"event", end=False)
    wire = await bench.begin(PLAIN)
    await wire.until(b"event")
    await bench.proxy.close(0.05)
    with pytest.raises(StreamReset):
        await wire.rest()
    (record,) = await bench.audit.wait(1)
    assert (record.outcome, record.reason) == ("cut", "the agent stopped")


async def test_the_end_of_the_agent_waits_for_what_is_nearly_done(bench: Bench) -> None:
    async def slow(exchange: Exchange) -> None:
        await asyncio.sleep(0.1)
        await exchange.send(reply(200, b"done"))

    bench.api.routes["/api/v1/pods"] = slow
    wire, idle = bench.stream(), bench.stream()
    await idle.send(PLAIN.replace(b"pods", b"x"))
    await idle.answer()
    await wire.send(PLAIN)
    await until(lambda: bench.proxy.stats.in_flight)
    await bench.proxy.close(5)
    assert (await wire.answer()).body == b"done"
    assert await idle.rest() == b""


@pytest.mark.parametrize("head", [PLAIN, PLAIN[:-2] + b"TE: trailers\r\n\r\n"], ids=["fast", "general"])
async def test_l26_a_refused_flood_waits_on_its_streams(
    tmp_path: Path, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcbridge.agent.accounts.PROMPT_REFUSALS", 0)
    monkeypatch.setattr("arcbridge.agent.accounts.HOLD", 0.2)
    async with running(tmp_path, limits=AgentLimitsConfig(concurrent_requests=1)) as bench:
        bench.api.routes["/api/v1/pods"] = route = Held(reply(200, b"{}"))
        first, second, third = bench.stream(), bench.stream(), bench.stream()
        await first.send(head)
        await until(lambda: bench.api.requests)
        started = asyncio.get_running_loop().time()
        await second.send(head)
        answer = await second.answer()
        assert asyncio.get_running_loop().time() - started >= 0.19
        assert (answer.status, answer.header("retry-after")) == (429, ["1"])
        assert answer.status_object["reason"] == "TooManyRequests"
        assert answer.status_object["details"] == {"retryAfterSeconds": 1}
        assert answer.status_object["message"].startswith("arcbridge: 1 requests of yours are under way")
        monkeypatch.setattr("arcbridge.agent.accounts.HOLD", 60.0)
        await third.send(head)
        await until(lambda: bench.proxy.stats.requests >= 3)
        assert bench.proxy.stats.in_flight == 1, "what is refused is not under way"
        third.io.reset(ResetCode.CANCELLED)  # while its answer is held
        await until(lambda: len(bench.agent_streams()) <= 2)
        route.release.set()
        assert (await first.answer()).status == 200
        await second.send(head)
        assert (await second.answer()).status == 200
        assert [record.limit for record in await bench.audit.wait(3)] == ["concurrent_requests", "", ""]
        assert bench.proxy.stats.in_flight == 0


async def test_l25_when_the_days_bytes_are_used_up_the_date_says_until_when(tmp_path: Path) -> None:
    noon = 20_000.5 * DAY  # and not a moment before midnight, when the bytes of another day count
    async with running(tmp_path, limits=AgentLimitsConfig(bytes_per_day=1000), clock=lambda: noon) as bench:
        bench.caller.account.bytes_sent(1000, asyncio.get_running_loop().time())
        answer = await bench.get("/api/v1/pods")
        assert answer.status == 429
        (date,) = answer.header("retry-after")
        assert parsedate_to_datetime(date).timestamp() == 20_001 * DAY
        assert "you moved 1000 bytes today" in answer.status_object["message"]


async def test_a_session_whose_name_could_not_stand_in_a_header_is_not_served(bench: Bench) -> None:
    bench.caller.session = "a\r\nImpersonate-User: root"
    with pytest.raises(StreamReset):
        await bench.get("/api/v1/pods")
    assert bench.api.requests == []


async def test_what_follows_an_answer_that_broke_off_is_not_served(bench: Bench) -> None:
    bench.api.routes["/api/v1/pods"] = route = Held(b"zz\r\n", first=chunked(200, b"hello", end=False))
    wire = await bench.begin(PLAIN)
    await wire.until(b"hello")
    await wire.send(PLAIN.replace(b"pods", b"other"))
    (path,) = bench.proxy.fast_paths
    await until(lambda: path._unread)
    route.release.set()
    with pytest.raises(StreamReset):
        await wire.rest()
    await bench.audit.wait(1)
    assert [request.target for request in bench.api.requests] == ["/api/v1/pods"]
    assert bench.proxy.stats.in_flight == 0

"""Requests whose caller is gone: what becomes of their connections and seats, on both entrances of the agent."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from arcbridge.agent.accounts import ENDED_CONNECTIONS, Account
from arcbridge.agent.kube import abandoned
from arcbridge.agent.kube.abandoned import MOST, AbandonedAnswer
from arcbridge.agent.kube.response import ResponseHead
from arcbridge.agent.kube.upstream_pool import CONNECTION_MEMORY, UpstreamRequest
from tests.support.clock import Clock
from tests.support.eventually import until
from tests.support.fake_apiserver import Exchange, Held, Unanswered, chunked, reply

from .bench import Bench, reachable
from .test_upstream_pool import Collected, account, ask, dialled, taken

FAST = b"GET /x HTTP/1.1\r\nHost: k\r\n\r\n"
GENERAL = b"GET /x HTTP/1.1\r\nHost: k\r\nTE: trailers\r\n\r\n"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for a second must not end what a test watches."""
    monkeypatch.setattr(abandoned, "LONGEST", 60.0)


def ended_connections(user: Account) -> int:
    """Return how many connections the user has ended, none of which is forgotten in the time of a test."""
    return math.ceil(ENDED_CONNECTIONS - user.ended_connections.left)


async def leave(bench: Bench, request: bytes) -> None:
    """Send a request, and leave once the API server has it."""
    before = len(bench.api.requests)
    wire = await bench.begin(request)
    await until(lambda: len(bench.api.requests) > before)
    wire.io.reset()
    await until(lambda: not bench.proxy.stats.in_flight)


@pytest.mark.parametrize("request_bytes", [FAST, GENERAL], ids=["fast", "general"])
@pytest.mark.parametrize(
    "answer", [reply(200, b"the first"), chunked(200, b"the", b"first")], ids=["length", "chunked"]
)
async def test_l32_an_answer_that_comes_soon_leaves_its_connection_to_the_next(
    bench: Bench, request_bytes: bytes, answer: bytes
) -> None:
    half = len(answer) - 4
    bench.api.routes["/x"] = slow = Held(answer[half:], first=answer[:half])
    bench.api.routes["/y"] = reply(200, b"the second")
    user = bench.caller.account
    await leave(bench, request_bytes)
    assert user.seats.held == 1, "the API server still works on it"
    slow.release.set()
    await until(lambda: user.seats.held == 0)
    wire = await bench.begin(request_bytes.replace(b"/x", b"/y"))
    assert (await wire.answer()).body == b"the second"
    assert (bench.api.connections, ended_connections(user)) == (1, 0)
    records = await bench.audit.wait(2)
    assert [record.outcome for record in records] == ["cut", "answered"]


async def test_l32_a_long_answer_ends_its_connection_and_counts(bench: Bench) -> None:
    bench.api.routes["/x"] = held = Held(reply(200, bytes(4 * MOST)))
    user = bench.caller.account
    await leave(bench, FAST)
    held.release.set()
    await until(lambda: user.seats.held == 0)
    assert taken(bench.proxy.api) is None
    assert (user.connections, ended_connections(user)) == (0, 1)


async def test_l32_what_does_not_come_soon_ends_its_connection(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abandoned, "LONGEST", 0.05)
    bench.api.routes["/x"] = never = Unanswered()
    await leave(bench, FAST)
    await asyncio.wait_for(never.gone.wait(), 5)
    await until(lambda: bench.caller.account.seats.held == 0)


async def test_l32_an_api_server_that_goes_gives_the_seat_back(bench: Bench) -> None:
    release = asyncio.Event()

    async def cut(exchange: Exchange) -> None:
        await release.wait()
        exchange.reset()

    bench.api.routes["/x"] = cut
    await leave(bench, FAST)
    assert bench.caller.account.seats.held == 1
    release.set()
    await until(lambda: bench.caller.account.seats.held == 0)


async def test_l32_trailers_of_a_long_answer_give_no_second_seat_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abandoned, "MOST", 10)
    bench.api.routes["/x"] = held = Held(chunked(200, bytes(32))[:-2] + b"X-T: 1\r\n\r\n")
    user = bench.caller.account
    await leave(bench, FAST)
    held.release.set()
    await until(lambda: user.connections == 0)
    assert (user.seats.held, ended_connections(user)) == (0, 1)


async def test_l32_the_memory_of_an_abandoned_answer_counts_for_its_user(bench: Bench) -> None:
    bench.api.routes["/x"] = held = Held(reply(200, b"ok"))
    user = bench.caller.account
    await leave(bench, FAST)
    assert user.waiting.held >= CONNECTION_MEMORY
    held.release.set()
    await until(lambda: user.waiting.held == 0)


async def test_a_write_or_a_watch_is_not_waited_for(bench: Bench) -> None:
    """A write's connection serves no other request, and a watch has no end: it counts as a connection that ended."""
    for request in (b"POST /x HTTP/1.1\r\nHost: k\r\nContent-Length: 2\r\n\r\nok", WATCH):
        bench.api.routes["/x"] = bench.api.routes["/api/v1/pods"] = never = Unanswered()
        await leave(bench, request)
        assert bench.caller.account.seats.held == 0
        await asyncio.wait_for(never.gone.wait(), 5)
    assert ended_connections(bench.caller.account) == 1


WATCH = b"GET /api/v1/pods?watch=true HTTP/1.1\r\nHost: k\r\n\r\n"


class Leaves(Collected):
    """A caller who leaves when the first bytes are there, which may be all of the answer."""

    def __init__(self, user: Account) -> None:
        super().__init__()
        self.user = user
        self.abandon: Callable[[], object] = lambda: None

    def response_data(self, data: bytes | memoryview, payload: int) -> None:
        self.abandon()

    def response_begins(self, head: ResponseHead) -> bytes:
        return head.lines + b"\r\n"


@pytest.mark.parametrize("answer", [reply(200, b"ok"), chunked(200, b"o", b"k")], ids=["length", "chunked"])
async def test_a_caller_may_leave_during_the_read_that_ends_the_answer(tmp_path: Path, answer: bytes) -> None:
    async with reachable(tmp_path, Clock()) as (fake, api):
        fake.routes["/x"] = answer
        user = account()
        assert user.seats.take()
        connection = await dialled(api, user, repeatable=True)
        handler = Leaves(user)
        handler.abandon = lambda: AbandonedAnswer(connection, user)
        connection.send(handler, UpstreamRequest(FAST))
        await until(lambda: user.seats.held == 0)
        assert not handler.done.is_set(), "who has left hears nothing more"
        collected, again = await ask(api)
        assert (collected.payload, again is connection, fake.connections) == (2, True, 1)

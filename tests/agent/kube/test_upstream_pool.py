"""Kept connections to an API server that records bytes: kept, renewed, dropped."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme

from arcbridge.agent.accounts import CONNECTING, ENDED_CONNECTIONS, Account, Accounts
from arcbridge.agent.kube import upstream_pool
from arcbridge.agent.kube.apiserver import REREAD, ApiServer, endpoint_of
from arcbridge.agent.kube.connect_limit import ConnectLimit
from arcbridge.agent.kube.response import ResponseHead
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upstream_pool import CONNECTION_MEMORY, FIRST_READ, UpstreamConnection, UpstreamRequest
from arcbridge.agent.kube.upstream_tls import INCOMING_BUFFER, connect_upstream
from arcbridge.mux import buffer
from arcbridge.mux.socket_error_poll import TransportErrorPoll
from arcbridge.net.tlstransport import TlsTransport
from arcbridge.settings.config import AgentConfig, AgentLimitsConfig
from arcbridge.wire.backlog import Backlog
from tests.agent.kube.bench import ALICE, Member, reachable
from tests.support.clock import Clock
from tests.support.eventually import until
from tests.support.fake_apiserver import Exchange, FakeApiServer, chunked, closing, reply

GET = UpstreamRequest(b"GET /x HTTP/1.1\r\nHost: k\r\n\r\n")


class Collected:
    """Collects an answer."""

    def __init__(self) -> None:
        self.status = 0
        self.data = b""
        self.payload = 0
        self.refusal: RequestRefusal | None = None
        self.broke = False
        self.done = asyncio.Event()

    def response_begins(self, head: ResponseHead) -> bytes:
        self.status = head.status
        return head.lines + b"\r\n"

    def response_data(self, data: bytes | memoryview, payload: int) -> None:
        self.data += data
        self.payload += payload

    def response_complete(self) -> None:
        self.done.set()

    def response_switched(self, head: ResponseHead, rest: bytes) -> None:
        self.status, self.data = head.status, rest
        self.done.set()

    def response_failed(self, refusal: RequestRefusal | None) -> None:
        self.refusal, self.broke = refusal, True
        self.done.set()


@pytest.fixture
async def api(config: AgentConfig) -> AsyncIterator[ApiServer]:
    """The agent's connections to the API server, by a clock that stands still."""
    made = ApiServer(endpoint_of(config.kubernetes, {}), clock=Clock(0.0))
    yield made
    await made.close()


@pytest.fixture(params=["fast", "lossless"], autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What carries the connections of a test."""

    async def connect(*ends: Any, repeatable: bool) -> TransportErrorPoll | None:
        return await connect_upstream(*ends, repeatable=request.param == "fast")

    monkeypatch.setattr(upstream_pool, "connect_upstream", connect)
    name: str = request.param
    return name


def taken(api: ApiServer, account: Account | None = None) -> UpstreamConnection | None:
    """Return an idle connection of the agent's own, if there is one."""
    return api.upstream.take(api.credentials(own=True)[0], account)


async def dialled(api: ApiServer, account: Account | None = None, *, repeatable: bool = False) -> UpstreamConnection:
    """Return a new connection of the agent's own."""
    return await api.upstream.dial(api.credentials(own=True)[0], account, repeatable=repeatable)


async def ask(api: ApiServer) -> tuple[Collected, UpstreamConnection]:
    connection = taken(api) or await dialled(api)
    handler = Collected()
    connection.send(handler, GET)
    await asyncio.wait_for(handler.done.wait(), 5)
    return handler, connection


@pytest.mark.parametrize("repeatable", [True, False])
async def test_a_request_does_not_wait_long_for_an_api_server_that_has_vanished(
    fake: FakeApiServer, api: ApiServer, repeatable: bool
) -> None:
    """A control plane's node that died leaves idle connections on which nothing is confirmed. What is not repeated has
    one of its own, and may have a body that the API server leaves unread."""
    connection = await dialled(api, repeatable=repeatable)
    assert connection.transport is not None
    sock = connection.transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == (30_000 if repeatable else 0)


async def test_one_connection_carries_one_request_after_the_other(fake: FakeApiServer, api: ApiServer) -> None:
    for route in (reply(200, b"ok"), chunked(200, b"o", b"k"), b"HTTP/1.1 204 X\r\n\r\n", reply(404, b"ok")):
        fake.routes["/x"] = route
        handler, _ = await ask(api)
        assert handler.payload == (0 if handler.status == 204 else 2)
    assert fake.connections == 1


@pytest.mark.parametrize("stray", [b"x", reply(200, b"another user's")])
async def test_h7_what_came_before_a_request_is_no_answer_to_it(
    fake: FakeApiServer, api: ApiServer, stray: bytes
) -> None:
    """Bytes that the kernel has and the event loop has not seen when the next request takes the connection."""
    writers: list[asyncio.StreamWriter] = []

    async def kept(exchange: Exchange) -> None:
        writers.append(exchange.writer)
        await exchange.send(reply(200, b"ok"))

    fake.routes["/x"] = kept
    _, first = await ask(api)
    writers[0].write(stray)  # the socket takes it at once, and no turn of the loop follows
    # A busy kernel brings it to the other end a moment later.
    assert select.select([first.transport.get_extra_info("socket")], [], [], 10)[0]
    handler, second = await ask(api)
    assert second is not first
    assert handler.data.endswith(b"\r\n\r\nok")
    assert first.transport is None or first.transport.is_closing()
    assert fake.connections == 2


@pytest.mark.parametrize("pauses", [True, False])
async def test_h7_what_the_transport_holds_behind_an_answer_is_no_answer_to_the_next_request(
    fake: FakeApiServer, api: ApiServer, pauses: bool
) -> None:
    """The answer fills a read to its last byte, and the next request comes before another turn of the loop: the socket
    has nothing more, and the transport has."""
    size = buffer.PORTION - len(reply(200, bytes(10_000))) + 10_000
    fake.routes["/x"] = reply(200, bytes(size)) + reply(200, b"another user's")
    fake.routes["/y"] = reply(200, b"mine")
    following: list[UpstreamConnection] = []

    class Pauses(Collected):
        def response_data(self, data: bytes | memoryview, payload: int) -> None:
            super().response_data(data, payload)
            if pauses:
                connection.pause_reading()

        def response_complete(self) -> None:
            super().response_complete()
            if (found := taken(api)) is not None:
                following.append(found)
                found.send(mine, UpstreamRequest(b"GET /y HTTP/1.1\r\nHost: k\r\n\r\n"))

    connection, mine = await dialled(api, repeatable=True), Collected()
    connection.send(handler := Pauses(), GET, Backlog(0))
    async with asyncio.timeout(10):
        while not handler.done.is_set():
            connection.resume_reading()
            await asyncio.sleep(0)
        await until(lambda: mine.done.is_set() or connection.transport is None)
    assert handler.payload == size
    assert not mine.data.endswith(b"another user's")
    assert not following
    assert taken(api) is None


async def test_interim_answers_and_heads_in_pieces(fake: FakeApiServer, api: ApiServer) -> None:
    async def slow(exchange: Exchange) -> None:
        for piece in (b"HTTP/1.1 103 X\r\n\r\nHTTP/1.1 200 X\r", b"\nContent-Len", b"gth: 2\r\n\r", b"\nok"):
            await exchange.send(piece)
            await asyncio.sleep(0.01)

    fake.routes["/x"] = slow
    for _ in range(2):
        handler, _ = await ask(api)
        assert handler.data.endswith(b"\r\n\r\nok")
        assert handler.data.startswith(b"HTTP/1.1 200 OK\r\n")
    assert fake.connections == 1


@pytest.mark.parametrize(
    "route",
    [
        reply(200, b"ok") + b"x",
        reply(200, b"ok", "Connection: close"),
        chunked(200, b"ok") + b"HTTP/1.1 200 OK\r\n",
        chunked(200, b"ok")[:-2] + b"X: 1\r\n\r\n",
    ],
)
async def test_a_connection_that_is_not_clean_is_not_kept(fake: FakeApiServer, api: ApiServer, route: bytes) -> None:
    fake.routes["/x"] = route
    handler, connection = await ask(api)
    assert handler.payload == 2
    assert not connection.usable
    assert taken(api) is None


async def test_unsolicited_bytes_end_the_connection(fake: FakeApiServer, api: ApiServer) -> None:
    async def more(exchange: Exchange) -> None:
        await exchange.send(reply(200, b"ok"))
        await asyncio.sleep(0.05)
        await exchange.send(reply(200, b"of another request"))

    fake.routes["/x"] = more
    _, connection = await ask(api)
    await until(lambda: not connection.usable)
    assert taken(api) is None


async def test_new_credentials_get_new_connections(tmp_path: Path) -> None:
    clock = Clock(0.0)
    async with reachable(tmp_path, clock) as (fake, api):
        await ask(api)
        trustme.CA().cert_pem.write_to_path(str(fake.ca_file))
        clock.now += REREAD
        with pytest.raises(RequestRefusal, match="certificate is not the configured CA's"):
            await ask(api)


async def test_idle_connections_are_closed(monkeypatch: pytest.MonkeyPatch, api: ApiServer) -> None:
    monkeypatch.setattr("arcbridge.agent.kube.upstream_pool.KEEPALIVE", 0.05)
    _, connection = await ask(api)
    await until(lambda: not connection.usable)
    assert taken(api) is None


async def test_after_close_nothing_is_open(api: ApiServer) -> None:
    _, connection = await ask(api)
    await api.close()
    assert not connection.usable
    with pytest.raises(RequestRefusal):
        await dialled(api)


async def test_an_api_server_that_is_down(fake: FakeApiServer, api: ApiServer) -> None:
    fake.stop()
    with pytest.raises(RequestRefusal) as caught:
        await dialled(api)
    assert (caught.value.status_code, caught.value.retry_after) == (503, 1)


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 10, 20, 40, 80])
async def test_a_cancelled_dial_leaves_no_connection(fake: FakeApiServer, api: ApiServer, turns: int) -> None:
    task = asyncio.get_running_loop().create_task(dialled(api))
    for _ in range(turns):
        await asyncio.sleep(0.0005)
    if not task.cancel():
        task.result().drop()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result().drop()
    await until(lambda: not fake._writers)


def account(connects_per_second: int = 0) -> Account:
    accounts = Accounts(AgentLimitsConfig(connects_per_second=connects_per_second))
    return accounts.enter(ALICE, Member())


async def test_l32_connections_count_for_who_uses_them(fake: FakeApiServer, api: ApiServer) -> None:
    """Dialled or idle, a connection counts for its user until the answer is complete or the connection gone."""
    pool, a, b = api.upstream, account(), account()
    one, two = await dialled(api, a), await dialled(api, a)
    assert (a.connections, pool.limit.held) == (2, 2)
    handler = Collected()
    one.send(handler, GET)
    await asyncio.wait_for(handler.done.wait(), 5)
    assert a.connections == 1
    assert taken(api, b) is one
    assert (a.connections, b.connections, pool.limit.held) == (1, 1, 2)
    two.drop()
    one.drop()
    fake.stop()
    with pytest.raises(RequestRefusal):
        await dialled(api, a)
    assert (a.connections, b.connections, pool.limit.held) == (0, 0, 0)


async def test_l32_who_ends_connections_takes_none_that_others_left(tmp_path: Path) -> None:
    """Others would have to connect for theirs."""
    clock = Clock(0.0)
    clock.now = 1000.0
    async with reachable(tmp_path, clock) as (_, api):
        api.upstream._clock = clock
        await ask(api)
        a, b = account(), account()
        for _ in range(ENDED_CONNECTIONS):
            a.ended_connections.take(clock.now)
        assert taken(api, a) is None
        kept = taken(api, b)
        own = await dialled(api, a)
        for connection in (own, kept):  # the one that others left is the first to be taken
            connection.send(done := Collected(), GET)
            await asyncio.wait_for(done.done.wait(), 5)
        assert taken(api, a) is own, "not a handshake for each request"
        assert taken(api, a) is None
        clock.now += 1.0
        assert taken(api, a) is kept, "the allowance was refilled"
        own.drop()
        kept.drop()


async def test_l32_the_agents_own_calls_wait_for_no_user(api: ApiServer) -> None:
    api.upstream._clock = Clock(0.0)  # no turn comes nearer while others connect
    api.upstream.limit = limit = ConnectLimit(1)
    for _ in range(2):
        (await dialled(api, account())).drop()
    waits = [limit.turn(account(), 0.0) for _ in range(9)]
    task = asyncio.get_running_loop().create_task(dialled(api, account()))
    status, _ = await api.ask("GET", "/x")
    assert (status, limit.delayed, task.done()) == (200, len(waits) + 1, False)
    task.cancel()
    await asyncio.wait([task])


async def test_l32_a_dial_that_is_cancelled_while_it_waits_leaves_nothing(fake: FakeApiServer, api: ApiServer) -> None:
    api.upstream._clock = Clock(0.0)  # no turn comes nearer while others connect
    limit, a = api.upstream.limit, account(1)
    for _ in range(4):
        (await dialled(api, a)).drop()
    waits = [limit.user_turn(a, 0.0) for _ in range(9)]
    task = asyncio.get_running_loop().create_task(dialled(api, a))
    await until(lambda: limit.delayed > len(waits))
    assert (limit.held, a.connections) == (1, 1)
    task.cancel()
    await asyncio.wait([task])
    assert (limit.held, a.connections, fake.connections) == (0, 0, 4)


async def test_l32_few_connections_are_made_for_one_user_at_a_time(api: ApiServer) -> None:
    pool, a = api.upstream, account()
    under_way, most = 0, 0
    connect = pool._connect

    async def counted(connection: UpstreamConnection, repeatable: bool) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await connect(connection, repeatable)
        under_way -= 1

    pool._connect = counted
    made = await asyncio.gather(*(dialled(api, a) for _ in range(3 * CONNECTING)))
    assert most == CONNECTING
    for connection in made:
        connection.drop()


async def test_a_request_waits_for_its_turn_to_connect_no_longer_than_for_a_connection(
    monkeypatch: pytest.MonkeyPatch, api: ApiServer
) -> None:
    """An API server that does not answer keeps those before it for as long, one after the other."""
    monkeypatch.setattr("arcbridge.agent.kube.upstream_pool.CONNECT_DEADLINE", 0.02)
    account = Accounts(AgentLimitsConfig()).enter(ALICE, Member())
    async with AsyncExitStack() as stack:
        for _ in range(CONNECTING):
            await stack.enter_async_context(account.connecting)
        with pytest.raises(RequestRefusal, match="no connection in time") as caught:
            await asyncio.wait_for(dialled(api, account), 10)
        assert caught.value.status_code == 504
        assert account.connections == 0
    assert not account.connecting.locked()


async def test_idle_connections_are_few(monkeypatch: pytest.MonkeyPatch, api: ApiServer) -> None:
    monkeypatch.setattr("arcbridge.agent.kube.upstream_pool.MAX_IDLE", 3)
    connections = [await dialled(api) for _ in range(5)]
    for connection in connections:
        connection.send(handler := Collected(), GET)
        await asyncio.wait_for(handler.done.wait(), 5)
    assert [one.usable for one in connections] == [False, False, True, True, True]


async def stopped(api: ApiServer, backlog: Backlog) -> tuple[UpstreamConnection, Collected]:
    """Return a connection whose caller stops after each piece of its answer, and what it takes."""

    class Stops(Collected):
        def response_data(self, data: bytes | memoryview, payload: int) -> None:
            super().response_data(data, payload)
            connection.pause_reading()

    connection = await dialled(api)
    connection.send(handler := Stops(), GET, backlog)
    return connection, handler


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("full", [False, True])
async def test_what_was_read_ahead_comes_when_the_caller_goes_on(
    fake: FakeApiServer, api: ApiServer, transport: str, full: bool, closes: bool
) -> None:
    """Also where the API server has nothing more to send: aiofastnet alone would wait for that. Where it `closes`, its
    end is read behind what was read ahead."""
    answer = reply(200, bytes(60_000), *["Connection: close"] * closes)
    fake.routes["/x"] = closing(answer) if closes else answer
    backlog = Backlog(0 if full else 1 << 30)

    connection, handler = await stopped(api, backlog)
    async with asyncio.timeout(10):
        while not handler.done.is_set():
            seen = handler.payload
            await asyncio.sleep(0.01)  # all that was sent is there
            connection.resume_reading()
            await until(lambda seen=seen: handler.payload != seen or handler.done.is_set())
    assert handler.payload == 60_000
    connection.drop()


async def test_a_defect_met_by_what_was_read_ahead_ends_the_answer(
    fake: FakeApiServer, api: ApiServer, transport: str
) -> None:
    """The transport did not make the call, so it would go on as if nothing had happened, with a part of the answer."""
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context.get("exception")))
    fake.routes["/x"] = reply(200, bytes(60_000))

    class Breaks(Collected):
        def response_data(self, data: bytes | memoryview, payload: int) -> None:
            if self.payload:
                raise ZeroDivisionError("a defect")
            super().response_data(data, payload)
            connection.pause_reading()

    connection = await dialled(api)
    connection.send(handler := Breaks(), GET)
    await until(lambda: handler.payload)
    await asyncio.sleep(0.01)  # all that was sent is there
    connection.resume_reading()
    await asyncio.wait_for(handler.done.wait(), 5)
    assert handler.broke
    assert "ZeroDivisionError" in repr(faults)


@pytest.mark.parametrize("full", [20, 0])
async def test_m9_what_a_caller_does_not_take_stays_at_the_api_server(
    fake: FakeApiServer, api: ApiServer, transport: str, full: int
) -> None:
    """Of an answer that is not taken nothing is read but what was under way, and its memory counts; also that of what
    the transport has read ahead, and where the backlog is full (from turn `full` on)."""
    fake.routes["/x"] = reply(200, bytes(8 << 20))
    backlog = Backlog(64 * 1024)

    connection, handler = await stopped(api, backlog)
    carrier = connection.transport
    assert isinstance(carrier, TlsTransport) == (transport == "lossless")
    async with asyncio.timeout(10):
        for turn in range(40):
            seen = handler.payload
            held = backlog.held - 64 * 1024 * (turn > full)
            assert CONNECTION_MEMORY + FIRST_READ <= held <= CONNECTION_MEMORY + 4 * buffer.SIZE // 3
            if turn == full:
                backlog.add(64 * 1024)  # full from now on
            connection.resume_reading()
            await until(lambda seen=seen: handler.payload != seen)
            await asyncio.sleep(0.002)
            if isinstance(carrier, TlsTransport):
                assert handler.payload - seen <= (buffer.PORTION if turn >= full else buffer.SIZE)
                assert carrier._incoming.pending <= 17 * 1024, "a part of one record"
            else:
                assert handler.payload - seen <= INCOMING_BUFFER
                assert turn == 0 or held >= CONNECTION_MEMORY + INCOMING_BUFFER
    backlog.remove(64 * 1024)
    connection.drop()
    assert backlog.held == 0

"""The unused connection of a session: who gets it, and when it is made and closed; without sockets, and then with."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import trustme

from arcbridge.agent.accounts import Accounts
from arcbridge.agent.kube import connect_limit, upstream_pool, warm_connections
from arcbridge.agent.kube.apiserver import REREAD
from arcbridge.agent.kube.caller import Caller
from arcbridge.agent.kube.connect_limit import ConnectLimit
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upstream_pool import UpstreamPool
from arcbridge.agent.kube.warm_connections import LATELY, MAX_AGE, WarmConnections
from arcbridge.agent.sessions import Sessions
from arcbridge.agent.targets import TcpTargets
from arcbridge.identity.claims import Identity
from arcbridge.settings.config import AgentLimitsConfig
from tests.support.clock import Clock
from tests.support.eventually import until
from tests.support.fake_apiserver import Exchange
from tests.support.stream_io import StreamIO

from ..pair import FakeAuthenticator, joined, resume
from .bench import ALICE, Bench, Wire, caller_of, session_of
from .test_upgrade import EXEC, SPDY, SWITCH_SPDY, WEBSOCKET, echo

TLS, OTHER = cast(ssl.SSLContext, "tls"), cast(ssl.SSLContext, "other")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_connections, "DELAY", 0.0)


class FakeConnection:
    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self.usable = self.silent = True

    def close(self) -> None:
        self.usable = False


class FakePool:
    """Makes connections at once; `hold` lets a dial wait, `refused` refuses it."""

    def __init__(self) -> None:
        self.limit = ConnectLimit()
        self.made: list[FakeConnection] = []
        self.hold: asyncio.Event | None = None
        self.refused = False
        self.dials = 0

    async def dial(self, tls: ssl.SSLContext) -> FakeConnection:
        self.dials += 1
        if self.hold is not None:
            await self.hold.wait()
        if self.refused:
            raise RequestRefusal(503, "the API server cannot be reached")
        self.made.append(FakeConnection(tls))
        return self.made[-1]

    def hand_over(self, connection: FakeConnection, account: object) -> None:
        pass


class Table:
    """Warm connections of an agent without an API server."""

    def __init__(self, most: int = 8) -> None:
        self.pool, self.clock = FakePool(), Clock()
        self.warm = WarmConnections(cast(UpstreamPool, self.pool), most=most, clock=self.clock)

    async def upgraded(self, *callers: Caller) -> None:
        for caller in callers:
            self.warm.upgraded(caller, TLS)
        await self.settle()

    async def settle(self) -> None:
        for _ in range(8):
            await asyncio.sleep(0)

    def take(self, caller: Caller, tls: ssl.SSLContext = TLS) -> Any:
        return self.warm.take(caller, tls)


@pytest.fixture
async def table() -> AsyncIterator[Table]:
    made = Table()
    yield made
    made.warm.end_all()


async def test_a_session_has_one_after_an_upgrade_and_only_once(table: Table) -> None:
    alice = caller_of(ALICE)
    assert table.take(alice) is None
    await table.upgraded(alice)
    await table.upgraded(alice)
    assert (table.pool.dials, table.warm.held) == (1, 1)
    assert table.take(alice) is table.pool.made[0]
    assert table.take(alice) is None
    assert (table.warm.held, table.warm.counts["used"]) == (0, 1)
    await table.upgraded(alice)
    assert (table.pool.dials, table.warm.held) == (2, 1)


async def test_h29_no_connection_crosses_sessions(table: Table) -> None:
    """Not even to another session of the same user, or to one of the same id, which the relay chooses."""
    accounts = Accounts()
    alice, again = caller_of(ALICE, accounts), caller_of(ALICE, accounts)
    bob = caller_of(Identity("bob", "u-2", (), "https://issuer#bob", "https://issuer", 4e9), accounts)
    assert alice.session == again.session == bob.session
    await table.upgraded(alice)
    assert table.take(again) is table.take(bob) is None
    table.warm.end(bob)
    assert table.take(alice) is table.pool.made[0]


async def test_l51_connections_are_few_however_many_sessions_upgrade() -> None:
    table = Table(most=8)
    accounts = Accounts()
    for number in range(200):
        name = f"user-{number}"
        await table.upgraded(caller_of(Identity(name, "", (), name, "i", 4e9), accounts))
        assert table.warm.held == min(number + 1, 8)
    table.warm.change(3)
    assert (table.warm.held, table.warm.counts["closed"]) == (3, 5)
    table.warm.change(0)
    await table.upgraded(caller_of(ALICE, accounts))
    assert (table.warm.held, table.pool.dials) == (0, 8)


async def test_one_that_is_old_is_made_anew_until_the_session_has_had_no_upgrade_lately(table: Table) -> None:
    alice = caller_of(ALICE)
    await table.upgraded(alice)
    began = table.clock.now
    while table.clock.now - began < 2 * LATELY:
        table.clock.now += 1
        table.warm.sweep()
        await table.settle()
        assert table.warm.held == (table.clock.now - began < LATELY)
    assert table.pool.dials == math.ceil(LATELY / MAX_AGE)
    assert table.warm.counts == {"used": 0, "expired": table.pool.dials, "closed": 0}
    assert not any(one.usable for one in table.pool.made)
    await table.upgraded(alice)
    assert table.warm.held == 1


@pytest.mark.parametrize("fault", ["closed", "bytes came", "other settings"])
async def test_one_that_cannot_be_used_is_closed_and_none_is_given(table: Table, fault: str) -> None:
    alice = caller_of(ALICE)
    await table.upgraded(alice)
    (one,) = table.pool.made
    one.usable, one.silent = fault != "closed", fault != "bytes came"
    assert table.take(alice, OTHER if fault == "other settings" else TLS) is None
    assert not one.usable
    assert table.warm.counts == {"used": 0, "expired": 0, "closed": 1}
    await table.upgraded(alice)
    assert table.take(alice) is table.pool.made[1]


async def test_what_ends_while_it_is_made_is_never_held(table: Table) -> None:
    alice = caller_of(ALICE)
    table.pool.hold = asyncio.Event()
    await table.upgraded(alice)
    assert table.take(alice) is None
    table.warm.end(alice)
    table.pool.hold.set()
    await table.settle()
    assert (table.pool.made, table.warm.held) == ([], 0)


async def test_a_session_without_a_connection_gets_none(table: Table) -> None:
    alice = caller_of(ALICE)
    alice.connected_since = math.inf
    await table.upgraded(alice)
    assert table.pool.dials == 0


async def test_l51_no_request_waits_for_one(table: Table) -> None:
    """Where a connection of its own would wait for a turn, or waits in line, or cannot be made."""
    alice = caller_of(ALICE, Accounts(AgentLimitsConfig(connects_per_second=1), monotonic=table.clock))
    for _ in range(4):
        assert table.pool.limit.user_turn(alice.account, table.clock.now) == 0.0
    await table.upgraded(alice)
    assert table.pool.dials == 0
    assert table.pool.limit.user_turn(alice.account, table.clock.now) == 1.0, "what was refused took no turn"
    bob = caller_of(ALICE)
    while not bob.account.connecting.locked():
        await bob.account.connecting.acquire()
    await table.upgraded(bob)
    assert table.pool.dials == 0
    carol = caller_of(ALICE)
    table.pool.refused = True
    await table.upgraded(carol)
    assert (table.pool.dials, table.take(carol)) == (1, None)
    table.pool.refused = False
    await table.upgraded(carol)
    assert table.take(carol) is not None


# -- with an API server ----------------------------------------------------------------------------------------------


async def shell(bench: Bench, head: bytes = SPDY) -> Wire:
    """Have an upgrade answered, and then used."""
    wire = await bench.begin(head)
    assert (await wire.head())[0] == 101
    await wire.send(b"x")
    assert await wire.exactly(1) == b"x"
    return wire


@pytest.fixture
async def warm(bench: Bench) -> Bench:
    """A session that had an upgrade, and has the second connection of an API server for the next one."""
    bench.api.routes[EXEC] = cast(Any, echo(SWITCH_SPDY))
    bench.proxy.warm.change(8)
    await shell(bench)
    await until(lambda: bench.proxy.warm.held)
    assert bench.api.connections == 2
    return bench


async def test_the_next_upgrade_makes_no_connection(warm: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_connections, "DELAY", 600.0)
    held = warm.proxy.api.upstream.limit.held
    await shell(warm)
    assert warm.api.connections == 2
    assert [request.connection for request in warm.api.requests] == [1, 2]
    assert warm.proxy.api.upstream.limit.held == held + 1, "it counts for the user from now on"
    await shell(warm)
    assert warm.api.requests[-1].connection == 3


async def test_m9_the_kernel_holds_little_for_a_user_with_many_connections(
    warm: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_pool, "SMALL_KERNEL_BUFFER", 20_000)
    monkeypatch.setattr(connect_limit, "FEW_PER_USER", 0)
    (one,) = warm.proxy.warm._warm.values()
    sock = cast(asyncio.Transport, one.connection.transport).get_extra_info("socket")
    before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    await shell(warm)
    assert warm.proxy.warm.counts["used"] == 1
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 20_000 < before, "the kernel doubles it"


async def test_requests_that_are_no_upgrades_leave_it_alone(warm: Bench) -> None:
    await warm.get("/x")
    await warm.ask("POST /y HTTP/1.1\nHost: k\nContent-Length: 1", b"y")
    assert [request.connection for request in warm.api.requests] == [1, 3, 4]
    assert warm.proxy.warm.held == 1


async def test_h29_another_session_makes_its_own(warm: Bench) -> None:
    async with session_of(warm.proxy, caller_of(ALICE)) as made:
        io = StreamIO()
        made.client.open("kubernetes", io)
        await io.write(SPDY)
        assert (await Wire(io).head())[0] == 101
    assert [request.connection for request in warm.api.requests] == [1, 3]


async def test_an_api_server_that_closed_it_gets_the_request_once_on_another(warm: Bench) -> None:
    for writer in warm.api.unused():
        writer.close()
    await until(lambda: not warm.proxy.warm.held)
    await shell(warm)
    assert [request.connection for request in warm.api.requests] == [1, 3]
    assert warm.proxy.warm.counts["used"] == 0


async def test_h29_an_upgrade_that_left_on_it_is_not_sent_again(warm: Bench) -> None:
    async def dies(exchange: Exchange) -> None:
        exchange.reset()

    warm.api.routes[EXEC] = dies
    wire = await warm.begin(WEBSOCKET)
    assert (await wire.answer()).status == 502
    assert [request.connection for request in warm.api.requests] == [1, 2]


async def test_it_is_closed_with_the_settings_that_it_was_made_with(warm: Bench, monkeypatch: Any) -> None:
    clock = Clock(1e9)
    monkeypatch.setattr(warm.proxy.api, "_clock", clock)
    with warm.api.ca_file.open("ab") as file:
        file.write(trustme.CA().cert_pem.bytes())
    clock.now += REREAD
    warm.proxy.api.credentials(own=True)
    assert warm.proxy.warm.held == 0
    await until(lambda: not warm.api.unused())
    await shell(warm)
    assert [request.connection for request in warm.api.requests] == [1, 3]


async def test_it_ends_with_its_session_and_with_the_sessions_connection(bench: Bench) -> None:
    bench.api.routes[EXEC] = cast(Any, echo(SWITCH_SPDY))
    warm, judge = bench.proxy.warm, FakeAuthenticator()
    warm.change(8)
    for token in ("first", "again"):
        judge.add(token, "alice", expires=2000.0 + len(token))
    sessions = Sessions(cast(Any, judge), bench.proxy, TcpTargets({}, bench.audit), clock=lambda: 1000.0)

    async with joined(sessions, token="first") as (client, _):
        await client.wait_established()

        async def upgrade() -> Wire:
            io = StreamIO()
            client.open("kubernetes", io)
            await io.write(SPDY)
            wire = Wire(io)
            assert (await wire.head())[0] == 101
            await until(lambda: warm.held)
            return wire

        running = await upgrade()
        client.transport.abort()
        await until(lambda: sessions.detached)
        assert warm.held == 0
        await resume(sessions, client, "again")
        await running.send(b"still")
        assert await running.exactly(5) == b"still"
        await upgrade()
    await until(lambda: not warm.held)
    await until(lambda: not bench.api.unused())
    assert warm.counts == {"used": 0, "expired": 0, "closed": 2}


async def test_an_agent_that_drains_has_none(warm: Bench) -> None:
    sessions = Sessions(cast(Any, FakeAuthenticator()), warm.proxy, TcpTargets({}, warm.audit))
    sessions.drain()
    assert warm.proxy.warm.held == 0
    await shell(warm)
    await until(lambda: not warm.api.unused())
    assert warm.proxy.warm.held == 0


def test_an_api_server_waits_longer_for_a_first_request() -> None:
    """kube-apiserver's ReadHeaderTimeout (k8s.io/apiserver, pkg/server/secure_serving.go)."""
    assert MAX_AGE + warm_connections.SWEEP < 32

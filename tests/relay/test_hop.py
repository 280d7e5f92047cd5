"""The hop, with two stations that share what relays of a fleet share: the CA, and who is where."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
import structlog

from arcbridge.errors import ArcbridgeError, JoinRefused
from arcbridge.net import client_hello
from arcbridge.net.join import JoinCode, client_join
from arcbridge.net.sockets import receive, send_all
from arcbridge.net.tls import ALPN_HOP, ALPN_JOIN, RelayTrust, outer_client_context
from arcbridge.relay import enforcement
from arcbridge.relay.enforcement import Enforcement
from arcbridge.relay.hop import HOP_NAME, Hops
from arcbridge.relay.pending_dials import key_of, process_of, token_of
from arcbridge.wire.records import Dial, JoinRequest, Status
from tests.net.ends import RELAY, authority, client_context
from tests.relay.station import Agent, Station, is_cut, refused, station
from tests.support.eventually import until

A, B = "a" * 16, "b" * 16


class Pair:
    """Relay A, where clients wait, and relay B, where agents come out."""

    def __init__(self, a: Station, b: Station) -> None:
        self.a = a
        self.b = b
        self.addresses = {A: str(a.address), B: str(b.address)}
        self.asked: list[str] = []
        self._hops: dict[Station, Hops] = {}
        for one, relay_id in ((a, A), (b, B)):
            hops = Hops(Peers(self, relay_id), authority=authority(), pumps=one.pumps)
            one.agents.detour = hops
            one.dials._process_id = relay_id
            hops.attach(one.dials)
            one.listener.handlers[client_hello.HOP] = partial(one.agents.serve_hop, hops.server_context)
            self._hops[one] = hops

    async def address_of(self, relay_id: str) -> str:
        self.asked.append(relay_id)
        return self.addresses.get(relay_id, "")

    async def tell_failed(self, relay_id: str, token: str) -> None:
        {A: self.a, B: self.b}[relay_id].dials.hop_failed(key_of(token))

    def hops(self, relay: Station) -> dict[str, int]:
        return {name: count for name, count in self._hops[relay].outcomes.items() if count}


class Peers:
    """What relay `relay_id` of the pair knows of the other one; a `fleet.base.RelayPeers`."""

    def __init__(self, pair: Pair, relay_id: str) -> None:
        self.relay_id = relay_id
        self.address_of = pair.address_of
        self.tell_failed = pair.tell_failed
        self.on_failed: Callable[[bytes], None] = lambda key: None


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    async with station(tmp_path / "a", "prod", "other") as a, station(tmp_path / "b", "prod", "other") as b:
        yield Pair(a, b)


def joining_at(relay: Station, cluster: str = "") -> object:
    """The agent consents, and its join comes out at `relay`."""

    async def on_dial(agent: Agent, dial: Dial) -> None:
        agent.session.send(Status(token=dial.token))
        agent.relay = relay
        await agent.join(dial.token, cluster)

    return on_dial


async def exchange(one: socket.socket, other: socket.socket, size: int) -> None:
    sent = bytes(range(256)) * (size // 256)

    async def read() -> bytes:
        got = b""
        while len(got) < len(sent):
            got += await receive(other, 65536)
        return got

    _, got = await asyncio.gather(send_all(one, sent), read())
    assert got == sent


async def test_a_join_that_comes_out_elsewhere(pair: Pair) -> None:
    async with Agent(pair.a, on_dial=joining_at(pair.b)) as agent:
        sock, reply = await pair.a.join()
        with sock:
            async with asyncio.timeout(10):
                await until(lambda: agent.sockets)
                await exchange(sock, agent.sockets[0], 2_000_000)
                await exchange(agent.sockets[0], sock, 2_000_000)
            # Bytes have passed through both, so both pumps are there.
            assert (len(pair.a.pumps), len(pair.b.pumps)) == (1, 1)
            assert pair.hops(pair.b) == {"joined": 1}
            assert next(iter(pair.b.pumps)).join_id == reply.join_id
            # FIN and its absence go through both.
            sock.shutdown(socket.SHUT_WR)
            assert await receive(agent.sockets[0], 10) == b""
            await exchange(agent.sockets[0], sock, 2560)


@pytest.mark.parametrize("where", ["client's", "agent's"])
async def test_a_right_that_is_lost_ends_both_pumps(pair: Pair, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#V3: the relay where the client came in knows whose session it is; the other one knows the
    cluster."""
    monkeypatch.setattr(enforcement, "GRACE", 0.0)
    async with Agent(pair.a, on_dial=joining_at(pair.b)) as agent:
        sock, _ = await pair.a.join()
        async with asyncio.timeout(10):
            await until(lambda: agent.sockets)
            await exchange(sock, agent.sockets[0], 2560)
        at = {"client's": pair.a, "agent's": pair.b}[where]
        if where == "client's":
            at.policy.allowed.clear()
        else:
            at.access.clusters = frozenset({"prod"})
        await Enforcement(at.access, at.pumps, at.clients, at.counters, lambda lost: None).enforce()
        await is_cut(sock, agent.sockets[0])
        sock.close()
        assert (len(pair.a.pumps), len(pair.b.pumps)) == (0, 0)


async def test_raw_bytes_behind_the_close(pair: Pair) -> None:
    """docs/threats.md#J5: what the client sends first reaches the agent through both relays, in order, once."""
    async with Agent(pair.a, on_dial=joining_at(pair.b)) as agent:
        for n in range(20):
            sock, _ = await pair.a.join()
            with sock:
                await send_all(sock, f"hello {n}".encode())
                async with asyncio.timeout(10):
                    await until(lambda n=n: len(agent.sockets) > n)
                    got = b""
                    while len(got) < len(f"hello {n}"):
                        got += await receive(agent.sockets[n], 100)
                assert got == f"hello {n}".encode()
            agent.relay = pair.a


async def test_never_two_hops(pair: Pair) -> None:
    """docs/threats.md#F6: a token that names no client, a relay that is gone or a third relay is void, at once."""
    agent = Agent(pair.b)
    for relay_id in ("c" * 16, A):
        assert (await refused(agent.join(token_of(relay_id, "x" * 22)))).code == JoinCode.GONE
    assert pair.hops(pair.b) == {"gone": 2}
    asked = len(pair.asked)
    # A relay with an old list would send this: hops is 1 already, and the token is a third relay's.
    certificate = authority().issue_relay()
    context = outer_client_context(
        RelayTrust(authority().certificate_pem), ALPN_HOP,
        client_certificate=(certificate.certificate_pem, certificate.key_pem),
    )  # fmt: skip
    for hops in (1, 2, 0):
        sock = await pair.b.dial()
        request = JoinRequest(role="agent", cluster="prod", token=token_of(A, "x"), hops=hops)
        error = await refused(client_join(sock, context, HOP_NAME, request, alpn=ALPN_HOP))
        assert error.code == (JoinCode.GONE if hops == 1 else JoinCode.BAD_REQUEST)
    # An agent that claims to have come over a hop is not passed on.
    sock = await pair.b.dial()
    request = JoinRequest(role="agent", token=token_of(A, "x"), hops=1)
    assert (await refused(client_join(sock, client_context(ALPN_JOIN, "prod"), RELAY, request))).code == JoinCode.GONE
    assert len(pair.asked) == asked
    await agent.__aexit__()


async def test_an_agent_of_another_cluster(pair: Pair) -> None:
    """docs/threats.md#J1: the agent is refused, and the join that the token belongs to goes on."""

    async def on_dial(agent: Agent, dial: Dial) -> None:
        agent.session.send(Status(token=dial.token))
        agent.relay = pair.b
        assert (await refused(agent.join(dial.token, "other"))).code == JoinCode.GONE
        await agent.join(dial.token)

    async with Agent(pair.a, on_dial=on_dial):
        sock, _ = await pair.a.join()
        sock.close()
        await until(lambda: pair.hops(pair.b) == {"gone": 1, "joined": 1})


@pytest.mark.parametrize("how", ["own", "agent", "none"])
async def test_only_relays_are_let_in(pair: Pair, how: str) -> None:
    """An agent's certificate is of the same CA, and is no relay's."""
    if how == "own":
        context = client_context(ALPN_HOP)
    elif how == "agent":
        context = client_context(ALPN_HOP, "prod")
    else:
        stranger = authority().issue_client("relay")
        context = outer_client_context(
            RelayTrust(authority().certificate_pem), ALPN_HOP,
            client_certificate=(stranger.certificate_pem, stranger.key_pem),
        )  # fmt: skip
    sock = await pair.a.dial()
    request = JoinRequest(role="agent", cluster="prod", token=token_of(A, "x"), hops=1)
    with pytest.raises(ArcbridgeError) as caught:
        await client_join(sock, context, HOP_NAME, request, alpn=ALPN_HOP)
    assert not isinstance(caught.value, JoinRefused) or caught.value.code == JoinCode.FORBIDDEN


async def test_what_an_agent_calls_a_cluster_over_a_hop_fills_no_log(pair: Pair) -> None:
    request = JoinRequest(role="agent", cluster="x" * 60_000, token=token_of(A, "x"), hops=1)
    with structlog.testing.capture_logs() as lines:
        error = await refused(
            client_join(await pair.a.dial(), client_context(ALPN_HOP, "prod"), HOP_NAME, request, alpn=ALPN_HOP)
        )
    assert error.code == JoinCode.FORBIDDEN
    assert [len(line["cluster"]) for line in lines if line["event"] == "hop refused"] == [253]


@pytest.mark.parametrize("how", ["no listener", "another service", "draining"])
async def test_the_client_is_told_at_once(pair: Pair, how: str) -> None:
    """docs/threats.md#N8: the relays cannot reach each other; the client hears of it long before its deadline."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        if how == "no listener":
            pair.addresses[A] = "127.0.0.1:9"
        elif how == "another service":
            pair.addresses[A] = "127.0.0.1:" + str(server.getsockname()[1])
            server.settimeout(10)
            asyncio.get_running_loop().run_in_executor(None, lambda: server.accept()[0].close())
        else:
            pair.b.clients.draining = True

        async def on_dial(agent: Agent, dial: Dial) -> None:
            agent.session.send(Status(token=dial.token))
            agent.relay = pair.b
            await refused(agent.join(dial.token))

        async with Agent(pair.a, on_dial=on_dial):
            began = time.monotonic()
            error = await refused(pair.a.join())
            assert (error.code, error.retry_after) == (JoinCode.AGENT_REFUSED, 1)
            assert time.monotonic() - began < 5
            assert not len(pair.b.pumps)


async def test_the_client_that_left_meanwhile(pair: Pair) -> None:
    waiting = asyncio.Event()

    async def on_dial(agent: Agent, dial: Dial) -> None:
        agent.session.send(Status(token=dial.token))
        agent.relay = pair.b
        waiting.set()
        await until(lambda: not pair.a.clients.pending)
        assert (await refused(agent.join(dial.token))).code == JoinCode.GONE
        waiting.set()

    async with Agent(pair.a, on_dial=on_dial):
        join = asyncio.create_task(pair.a.join())
        await waiting.wait()
        waiting.clear()
        join.cancel()
        await asyncio.gather(join, return_exceptions=True)
        async with asyncio.timeout(10):
            await waiting.wait()
        assert not len(pair.b.pumps)


def test_tokens() -> None:
    assert process_of(token_of(A, "secret.with.dots")) == A
    for token in ("", "secret", ".x", "short.x", "a" * 17 + ".x"):
        assert process_of(token) == ""


async def test_certificates_are_made_anew(pair: Pair) -> None:
    now = 0.0
    hops = Hops(Peers(pair, A), authority=authority(), pumps=pair.a.pumps, clock=lambda: now)
    first = hops.server_context()
    assert hops.server_context() is first
    now = 8 * 86400.0
    assert hops.server_context() is not first

"""Which dials are accepted (docs/threats.md#J19, docs/threats.md#B7), and how one becomes a session."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from arcbridge.agent import dials as module
from arcbridge.agent.dials import DialStatus
from arcbridge.mux.session import MuxSession
from arcbridge.net.join import JoinCode
from arcbridge.net.tls import inner_client_context
from arcbridge.wire.records import Auth, JoinReply
from arcbridge.wire.session import Kind, Side
from tests.support.stream_io import StreamIO

from .control_world import World, agent_of
from .pair import ClientSide


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with agent_of(tmp_path) as made:
        await made.until(lambda: made.connected, "connected")
        yield made


async def test_a_dial_becomes_a_session(world: World) -> None:
    relay, control = world.relay, world.control
    dial = relay.dial()
    assert (await relay.status(dial.token)).code == DialStatus.WILL_JOIN
    request, sock = await asyncio.wait_for(relay.joins.get(), 5)
    assert (request.role, request.token, request.cluster, request.instance) == ("agent", dial.token, "one", "agent-1")
    handler = ClientSide()
    client = MuxSession(Side.INITIATOR, Kind.SESSION, handler)
    client.authenticate(Auth(kind="oidc", token="t"))
    ca = control._keeper.current.cluster_ca_certificate_pem
    await asyncio.get_running_loop().create_connection(
        client.protocol, sock=sock, ssl=inner_client_context(ca), server_hostname="one.cluster.arcbridge"
    )
    io = StreamIO()
    client.open("kubernetes", io)
    await io.write(b"hello")
    assert await io.read() == b"hello"
    assert client.peer_hello.agent == "agent-1"
    assert (control.dials.joins, len(world.sessions)) == (1, 1)
    (session,) = world.sessions._open
    assert session.via == relay.address
    client.close()
    await client.wait_ended()


REFUSED = [
    ({"address": "127.0.0.1:22"}, DialStatus.ADDRESS),
    ({"address": "169.254.169.254:80"}, DialStatus.ADDRESS),
    ({"address": "localhost:1"}, DialStatus.ADDRESS),
    ({"address": ""}, DialStatus.ADDRESS),
    ({"address": "a b"}, DialStatus.ADDRESS),
    ({"address": "http://x"}, DialStatus.ADDRESS),
    ({"cluster": "two"}, DialStatus.CLUSTER),
    ({"instance": "agent-2"}, DialStatus.INSTANCE),
    ({"join_id": ""}, DialStatus.JOIN_ID),
    ({"join_id": "0" * 65}, DialStatus.JOIN_ID),
    ({"join_id": "x\r\nImpersonate-Group: system:masters"}, DialStatus.JOIN_ID),
]


@pytest.mark.parametrize(("fields", "code"), REFUSED, ids=range(len(REFUSED)))
async def test_j19_other_dials_are_refused_and_connect_to_nothing(
    world: World, fields: dict[str, str], code: DialStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay, control = world.relay, world.control
    monkeypatch.setattr(module, "connect", lambda *a, **k: pytest.fail("it dialled"))
    dial = relay.dial(**fields)
    status = await relay.status(dial.token)
    assert status.code == code
    assert status.message
    assert control.dials.refused == 1
    assert len(control.dials) == 0


async def test_j19_a_relay_of_the_list_may_be_named_without_a_control_connection(tmp_path: Path) -> None:
    async with agent_of(tmp_path, relays=2, wanted=1) as world:
        await world.until(lambda: world.connected == [0], "connected to the first")
        dial = world.relay.dial(address=world.relays[1].address)
        assert (await world.relay.status(dial.token)).code == DialStatus.WILL_JOIN
        request, sock = await asyncio.wait_for(world.relays[1].joins.get(), 5)
        assert request.token == dial.token
        sock.close()


async def test_b7_no_more_than_64_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    relay, control = world.relay, world.control

    async def hang(*args: object, **kwargs: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(module, "connect", hang)
    for number in range(module.MAX_DIALS + 10):
        relay.dial(token=f"{number:032}")
    assert (await relay.status(f"{module.MAX_DIALS + 9:032}")).code == DialStatus.OVERLOADED
    assert len(control.dials) == module.MAX_DIALS
    assert control.dials.refused == 10


async def test_j31_a_relay_whose_joins_stall_keeps_no_other_relay_s_users_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*args: object, **kwargs: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(module, "connect", hang)
    async with agent_of(tmp_path, relays=2, wanted=2) as world:
        await world.until(lambda: len(world.connected) == 2, "connected to both")
        honest, hostile = world.relays
        # Whichever relay's address it names: the relay that asks is the one that counts.
        for number in range(module.MAX_DIALS + 10):
            hostile.dial(token=f"{number:032}", address=(honest if number % 2 else hostile).address)
        assert (await hostile.status(f"{module.MAX_DIALS + 9:032}")).code == DialStatus.OVERLOADED
        for number in range(module.MAX_DIALS):
            assert (await honest.status(honest.dial(token=f"h{number:031}").token)).code == DialStatus.WILL_JOIN
        assert (await honest.status(honest.dial(token="x" * 32).token)).code == DialStatus.OVERLOADED


async def test_l47_joins_of_a_relay_that_takes_too_much_of_the_loop_wait(tmp_path: Path) -> None:
    """The relay that asks pays for the connection, its handshake and that of the session, and others' joins go on."""
    async with agent_of(tmp_path, relays=2, wanted=2) as world:
        await world.until(lambda: len(world.connected) == 2, "connected to both")
        honest, greedy = world.relays
        payers = world.sessions.accounts.relays
        payers.of(greedy.address, 0.0).held_until = time.monotonic() + 3600.0
        greedy.dial(token="g" * 32)
        honest.dial(token="h" * 32)
        request, sock = await asyncio.wait_for(honest.joins.get(), 5)
        sock.close()
        assert request.token == "h" * 32
        assert payers.of(honest.address, 0.0).spent > 0.0
        assert greedy.joins.empty()


async def test_j31_failing_joins_of_one_relay_leave_the_agent_ready_for_another(tmp_path: Path) -> None:
    async with agent_of(tmp_path, relays=2, wanted=2) as world:
        await world.until(lambda: len(world.connected) == 2, "connected to both")
        for failures, relay in enumerate(world.relays, 1):
            assert world.control.unready() is None
            relay.refuse = JoinReply(code=JoinCode.INTERNAL, message="no")
            relay.dial()
            await world.until(lambda wanted=failures: world.control.dials.join_failures == wanted, "a failure")
        assert world.control.unready() is not None


async def test_a_client_that_never_speaks_keeps_no_dial_busy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#L4: a dial is over when the relay has joined it; what the client does then counts elsewhere."""
    monkeypatch.setattr(module, "MAX_DIALS", 2)
    relay, control = world.relay, world.control
    silent = []
    for number in range(2):
        relay.dial(token=f"{number:032}")
        silent.append((await asyncio.wait_for(relay.joins.get(), 5))[1])
    await world.until(lambda: not control.dials._dialling, "both are joined")
    assert len(control.dials) == 2
    dial = relay.dial(token="n" * 32)
    assert (await relay.status(dial.token)).code == DialStatus.WILL_JOIN
    silent.append((await asyncio.wait_for(relay.joins.get(), 5))[1])
    for sock in silent:
        sock.close()
    await world.until(lambda: not len(control.dials), "all are over")


async def test_what_may_come_back_is_let_through_when_nothing_new_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcbridge.agent.sessions.MAX_SESSIONS", 0)
    relay = world.relay
    assert (await relay.status(relay.dial(token="n" * 32).token)).code == DialStatus.OVERLOADED
    back = relay.dial(token="b" * 32, instance="agent-1")
    assert (await relay.status(back.token)).code == DialStatus.WILL_JOIN
    monkeypatch.setattr("arcbridge.agent.sessions.MAX_UNAUTHENTICATED", 0)
    flood = relay.dial(token="f" * 32, instance="agent-1")
    assert (await relay.status(flood.token)).code == DialStatus.OVERLOADED


async def test_a_join_that_fails_makes_it_unready(world: World) -> None:
    relay, control = world.relay, world.control
    relay.refuse = JoinReply(code=JoinCode.INTERNAL, message="no")
    relay.dial()
    await world.until(lambda: control.dials.join_failures, "a failure")
    assert control.unready() == "the last join that each connected relay asked for failed"


async def test_a_client_that_left_says_nothing_about_the_agent(world: World) -> None:
    relay, control = world.relay, world.control
    relay.refuse = JoinReply(code=JoinCode.GONE, message="the client is gone")
    relay.dial()
    await world.until(lambda: control.dials.join_failures, "a failure")
    assert control.unready() is None

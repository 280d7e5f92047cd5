"""J19, B7: the control connection, and which dials are answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from arcbridge.agent import control as module
from arcbridge.agent.control import ControlRoom, DialStatus
from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.agent.sessions import Sessions
from arcbridge.mux.session import MuxSession
from arcbridge.mux.stream import StreamIO
from arcbridge.net.address import parse_address
from arcbridge.net.join import JoinCode
from arcbridge.net.tls import inner_client_context
from arcbridge.pki.credentials import DirectoryStore
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import Auth, JoinReply
from arcbridge.wire.session import Kind, Side

from .fake_relay import FakeRelay
from .pair import ClientSide, Clock, FakeAuthenticator, make_sessions


@asynccontextmanager
async def connected(directory: Path) -> AsyncIterator[tuple[FakeRelay, ControlRoom, Sessions]]:
    async with FakeRelay.serving() as relay:
        relay.tokens["id.secret"] = "one"
        (directory / "token").write_text("id.secret")
        keeper = CredentialKeeper(
            DirectoryStore(directory / "state"),
            [parse_address(relay.address)],
            relay_ca_pin=relay.pin,
            join_token_file=directory / "token",
        )
        await keeper.start()
        judge = FakeAuthenticator()
        judge.add("t", "alice")
        sessions, _ = make_sessions(judge, Clock())
        room = ControlRoom([parse_address(relay.address)], keeper, sessions, instance="agent-1", software="test")
        room.start()
        try:
            async with asyncio.timeout(10):
                await room.connected.wait()
                await relay.connected.wait()
            yield relay, room, sessions
        finally:
            await room.close()
            await sessions.close()


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[tuple[FakeRelay, ControlRoom, Sessions]]:
    async with connected(tmp_path) as found:
        yield found


Made = tuple[FakeRelay, ControlRoom, Sessions]


async def test_it_says_who_it_is(made: Made) -> None:
    relay, room, _ = made
    session = relay.links[0].session
    assert session is not None
    assert session.peer_hello is not None
    assert session.peer_hello.agent == "agent-1"
    assert room.unready() is None
    async with asyncio.timeout(5):
        while not relay.statuses:
            await relay.status_arrived.wait()
    assert relay.statuses[0].ready


async def test_a_dial_becomes_a_session(made: Made) -> None:
    relay, room, sessions = made
    dial = relay.dial()
    assert (await relay.status(dial.token)).code == DialStatus.WILL_JOIN
    request, sock = await asyncio.wait_for(relay.joins.get(), 5)
    assert (request.role, request.token, request.cluster, request.instance) == ("agent", dial.token, "one", "agent-1")
    handler = ClientSide()
    client = MuxSession(Side.INITIATOR, Kind.SESSION, handler)
    client.authenticate(Auth(kind="oidc", token="t"))
    ca = room._keeper.current.cluster_ca_certificate_pem
    await asyncio.get_running_loop().create_connection(
        client.protocol, sock=sock, ssl=inner_client_context(ca), server_hostname="one.cluster.arcbridge"
    )
    io = StreamIO()
    client.open("kubernetes", io)
    await io.write(b"hello")
    assert await io.read() == b"hello"
    assert client.peer_hello is not None
    assert client.peer_hello.agent == "agent-1"
    assert (room.joins, len(sessions)) == (1, 1)
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
]


@pytest.mark.parametrize(("fields", "code"), REFUSED, ids=range(len(REFUSED)))
async def test_j19_other_dials_are_refused_and_connect_to_nothing(
    made: Made, fields: dict[str, str], code: DialStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay, room, _ = made
    monkeypatch.setattr(module, "connect", lambda *a, **k: pytest.fail("it dialled"))
    dial = relay.dial(**fields)
    status = await relay.status(dial.token)
    assert status.code == code
    assert status.message
    assert room.dials_refused == 1
    assert room.dials_open == 0


async def test_b7_no_more_than_64_at_once(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    relay, room, _ = made

    async def hang(*args: object, **kwargs: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(module, "connect", hang)
    for number in range(module.MAX_DIALS + 10):
        relay.dial(token=f"{number:032}")
    assert (await relay.status(f"{module.MAX_DIALS + 9:032}")).code == DialStatus.OVERLOADED
    assert room.dials_open == module.MAX_DIALS
    assert room.dials_refused == 10


async def test_a_join_that_fails_makes_it_unready(made: Made) -> None:
    relay, room, _ = made
    relay.refuse = JoinReply(code=JoinCode.INTERNAL, message="no")
    relay.dial()
    async with asyncio.timeout(5):
        while not room.join_failures:
            await asyncio.sleep(0.01)
    assert room.unready() == "the last join that a relay asked for failed"


async def test_a_client_that_left_says_nothing_about_the_agent(made: Made) -> None:
    relay, room, _ = made
    relay.refuse = JoinReply(code=JoinCode.GONE, message="the client is gone")
    relay.dial()
    async with asyncio.timeout(5):
        while not room.join_failures:
            await asyncio.sleep(0.01)
    assert room.unready() is None


async def test_it_comes_back(made: Made) -> None:
    relay, _, _ = made
    relay.connected.clear()
    session = relay.links[0].session
    assert session is not None
    session.abort()
    async with asyncio.timeout(10):
        await relay.connected.wait()
    assert len(relay.links) == 2


async def test_drain_asks_for_no_more(made: Made) -> None:
    relay, room, _ = made
    link = relay.links[0]
    assert link.session is not None
    room.drain()
    assert room.unready() == "the agent is stopping"
    async with asyncio.timeout(5):
        while not link.goaways:
            await asyncio.sleep(0.01)
    assert link.goaways == [GoawayCode.DRAINING]
    await room.close()
    async with asyncio.timeout(5):
        await link.session.wait_ended()
    assert len(relay.links) == 1


async def test_a_revoked_cluster_is_not_tried_every_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hints: list[float] = []
    asked = asyncio.Event()

    class Recorded:
        def next_delay(self, *, lasted: float = 0.0, hint: float | None = None) -> float:
            hints.append(hint or 0)
            asked.set()
            return 1000.0

    monkeypatch.setattr(module, "Backoff", Recorded)
    async with connected(tmp_path) as (relay, _, _):
        session = relay.links[0].session
        assert session is not None
        session.close(GoawayCode.REVOKED, "revoked")
        await asyncio.wait_for(asked.wait(), 5)
    assert hints[0] >= 30

"""The control connections: how many, to whom, and what happens when a relay dies, returns, goes away or paces."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from arcbridge.agent import control as module
from arcbridge.agent import revocations
from arcbridge.agent.control import ControlConnections, ControlLink, ControlTransport
from arcbridge.agent.dials import DialStatus
from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.agent.relay_choice import RelayChoice
from arcbridge.agent.sessions import Sessions
from arcbridge.errors import ArcbridgeError, ConfigError, StateError, Unreachable
from arcbridge.identity.claims import Identity
from arcbridge.mux.session import MuxSession
from arcbridge.net.address import Address, parse_address
from arcbridge.net.backoff import Backoff
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.ledger import LedgerEntries, entries_of, frames
from arcbridge.wire.records import CaSuccession, Ledger, Revoke
from arcbridge.wire.session import Introduction
from bench.virtual.loop import VirtualLoop
from tests.support.clock import Clock

from .control_world import World, agent_of
from .pair import FakeAuthenticator, make_sessions


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the waits that take minutes in production. How long a relay may take to answer is made longer: a machine
    that stands still for a moment must not have the next one tried, or sessions moved, but where a test is about that.
    """
    for name, seconds in {
        "HEAD_START": 60.0,
        "FAIL_OVER_SPREAD": 0.1,
        "BALANCE_FIRST": 0.1,
        "BALANCE_LAST": 0.3,
        "SETTLED": 0.1,
        "LEAVE_GRACE": 0.05,
        "REPLACEMENT_WAIT": 60.0,
        "PROBATION": 0.1,
    }.items():
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """An agent with one relay, connected."""
    async with agent_of(tmp_path) as made:
        await made.until(lambda: made.connected, "connected")
        yield made


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[World]:
    """An agent that knows three relays and wants two, connected to the first two."""
    async with agent_of(tmp_path, relays=3) as made:
        await made.until(lambda: made.connected == [0, 1], "connected to two")
        yield made


def link_of(world: World, number: int = 0) -> MuxSession:
    session = world.relays[number].agents[-1].session
    assert session is not None
    return session


class Moves:
    """Stands for `Sessions.ask_to_move` and remembers which relays were connected at each call."""

    def __init__(self, world: World) -> None:
        self.asked: list[tuple[str, list[int]]] = []
        self._world = world
        world.sessions.ask_to_move = self

    def __call__(self, via: str, before: float) -> int:
        assert before > 0
        self.asked.append((via, self._world.connected))
        return 1


# -- one relay ------------------------------------------------------------------------------------------------


async def test_it_says_who_it_is(world: World) -> None:
    hello = link_of(world).peer_hello
    assert hello.agent == "agent-1"
    assert hello.cluster_ca == world.control._keeper.current.cluster_ca_certificate_pem
    assert world.control.unready() is None
    await world.until(lambda: world.relay.statuses, "a status")
    assert world.relay.statuses[0].ready


async def test_while_sessions_wait_it_comes_back_sooner(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sessions, "streams_wait", True)
    monkeypatch.setattr(module, "RETRY_DELAY_LIMIT", 0.1)
    world.choice._backoffs = {
        relay: Backoff(first=600.0, cap=600.0, random=lambda: 1.0) for relay in world.choice.order
    }
    await world.relay.stop()
    await world.until(lambda: world.control.connects_failed >= 2, "tried in vain")
    world.relay.start()
    await world.until(lambda: world.control.up == 1, "connected again")


async def test_drain_asks_for_no_more(world: World) -> None:
    link = world.relay.links[0]
    session = link_of(world)
    world.control.drain()
    assert world.control.unready() == "the agent is stopping"
    await world.until(lambda: link.goaways, "GOAWAY")
    assert link.goaways == [GoawayCode.DRAINING]
    await world.control.close()
    async with asyncio.timeout(30):
        await session.wait_ended()
    assert len(world.relay.links) == 1


async def test_an_agent_that_stops_without_a_relay_connects_for_its_sessions_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else their clients find no agent with the session, and wait for up to a minute whether it comes back."""
    monkeypatch.setattr(Sessions, "streams_wait", True)
    await world.relay.stop()
    await world.until(lambda: world.control.connects_failed >= 1, "tried in vain")
    world.control.drain()
    world.relay.start()
    await world.until(lambda: world.control.up == 1, "connected again")
    link = world.relay.links[-1]
    await world.until(lambda: link.goaways, "GOAWAY")
    assert (link.goaways, world.control.unready()) == ([GoawayCode.DRAINING], "the agent is stopping")
    for token, instance, code in (("n", "", DialStatus.DRAINING), ("b", "agent-1", DialStatus.WILL_JOIN)):
        status = await world.relay.status(world.relay.dial(token=token * 32, instance=instance).token)
        assert (status.code, status.ready) == (code, False)
    monkeypatch.setattr(Sessions, "streams_wait", False)
    await world.relay.stop()
    await world.until(world.control._balancing.done, "no more tries")


async def test_without_any_it_is_not_ready(world: World) -> None:
    await world.relay.stop()
    await world.until(lambda: world.control.up == 0, "nothing is up")
    unready = "no control connection to a relay is up (0 of 1); the last attempt: "
    await world.until(lambda: (world.control.unready() or "").startswith(unready), "the reason is there")
    world.relay.start()
    await world.until(lambda: world.control.unready() is None, "ready again")


async def test_the_only_relay_goes_away_and_is_kept_until_it_closes(world: World) -> None:
    moves = Moves(world)
    session = link_of(world)
    world.relay.turn_away = (GoawayCode.DRAINING, "going away", 0)
    session.goaway(GoawayCode.DRAINING, "going away", 0)
    await world.until(lambda: world.relay.turned_away >= 2, "tries in vain")
    assert not session.closed
    assert moves.asked == []
    await world.until(lambda: world.control.unready() is not None, "not ready between two tries")
    world.relay.turn_away = None
    session.close(GoawayCode.DRAINING, "gone")
    await world.until(lambda: len(world.relay.agents) == 1 and world.control.up == 1, "back")
    assert world.control.unready() is None


async def test_a_load_balancers_other_relay_replaces_the_leaving_one(world: World) -> None:
    """Several relays share one address: the new connection lands on another relay."""
    moves = Moves(world)
    before = link_of(world)
    before.goaway(GoawayCode.DRAINING, "going away", 0)
    await world.until(lambda: moves.asked, "asked to move")
    assert moves.asked == [(world.relay.address, [0])]
    async with asyncio.timeout(30):
        await before.wait_ended()
    assert world.control.up == 1


# -- a list of relays -----------------------------------------------------------------------------------------


async def test_one_that_was_down_at_the_start(tmp_path: Path) -> None:
    async with agent_of(tmp_path, relays=3, down=(1,)) as world:
        await world.until(lambda: world.connected == [0, 2], "the third stands in")


async def test_one_that_hangs_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_DEADLINE", 60.0)
    monkeypatch.setattr(module, "HEAD_START", 0.3)
    async with agent_of(tmp_path, relays=3, wanted=1, down=(0,)) as world:
        world.relays[0].mute = True
        world.relays[0].start()
        await world.until(lambda: world.connected == [1], "the second, beside it")


async def test_a_preferred_relay_that_returns_takes_its_place_again(three: World) -> None:
    await three.relays[0].stop()
    await three.until(lambda: three.connected == [1, 2], "the third stands in")
    three.relays[0].start()
    await three.until(lambda: three.connected == [0, 1], "the first is back, the third was left")
    assert three.relays[2].links[0].goaways == [GoawayCode.DONE]
    assert three.control.unready() is None


async def test_a_nearer_relay_takes_the_place_of_the_farthest(three: World) -> None:
    far = {three.relays[0].address: 0.150, three.relays[1].address: 0.012, three.relays[2].address: 0.010}
    three.choice.round_trips.least = lambda name, within=0.0: far[name]
    await three.until(lambda: three.connected == [1, 2], "the far one was left, once the near one was up")
    assert three.relays[0].links[0].goaways == [GoawayCode.DONE]
    assert three.control.unready() is None


async def test_a_start_measures_the_relays_that_it_does_not_know(tmp_path: Path) -> None:
    async with agent_of(tmp_path, relays=3, wanted=1, down=(1,), measures=True) as world:
        await world.until(lambda: world.connected, "connected")
        known = [world.choice.round_trips.least(relay.address) for relay in world.relays]
        assert known[1] == math.inf
        assert 0 < known[0] < 1
        assert 0 < known[2] < 1
        assert world.choice.order[2] == parse_address(world.relays[1].address), "what does not answer is last"


async def test_all_preferred_relays_that_are_away_are_tried_in_one_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with agent_of(tmp_path, relays=4) as world:
        await world.until(lambda: world.connected == [0, 1], "connected to two")
        monkeypatch.setattr(module, "BALANCE_FIRST", 3600.0)
        monkeypatch.setattr(module, "BALANCE_LAST", 3600.0)
        for relay in world.relays[:2]:
            await relay.stop()
        await world.until(lambda: world.connected == [2, 3], "the others stand in")
        for relay in world.relays[:2]:
            relay.start()
        control, choice = world.control, world.choice
        await world.until(lambda: all(choice.may_try(one, time.monotonic()) for one in choice.preferred), "backoff")
        await world.until(lambda: all(link.up for link in control._links), "no attempt is under way")
        if world.connected == [2, 3]:
            control._balance_at = 0.0
            control._changed.set()
        await world.until(lambda: world.connected == [0, 1], "both are back after one round")


async def test_a_relay_is_not_left_while_a_dial_is_under_way(three: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*args: object, **kwargs: object) -> None:
        await release.wait()
        raise OSError("enough")

    await three.relays[0].stop()
    await three.until(lambda: three.connected == [1, 2], "the third stands in")
    release = asyncio.Event()
    monkeypatch.setattr("arcbridge.agent.dials.connect", hang)
    three.relays[2].dial()
    await three.until(lambda: len(three.control.dials) == 1, "a dial")
    three.relays[0].start()
    await three.until(lambda: three.connected == [0, 1, 2], "the first is back")
    await asyncio.sleep(0.4)  # time enough to leave the third, if a dial did not keep it
    assert three.connected == [0, 1, 2]
    release.set()
    await three.until(lambda: three.connected == [0, 1], "the third was left")


async def test_a_relay_that_goes_away_is_replaced_first_and_its_sessions_move(three: World) -> None:
    moves = Moves(three)
    leaving = link_of(three, 0)
    leaving.goaway(GoawayCode.DRAINING, "an upgrade", 600)
    await three.until(lambda: moves.asked, "asked to move")
    assert moves.asked == [(three.relays[0].address, [0, 1, 2])], "the old one was still there"
    async with asyncio.timeout(30):
        await leaving.wait_ended()
    assert three.connected == [1, 2]
    await asyncio.sleep(0.5)  # time enough to come back, if its hint were not obeyed
    assert len(three.relays[0].links) == 1, "its hint is obeyed"


async def test_a_relay_that_goes_away_while_the_agent_leaves_it_has_its_sessions_moved(
    three: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAVE_GRACE", 60.0)
    await three.relays[0].stop()
    await three.until(lambda: three.connected == [1, 2], "the third stands in")
    three.relays[0].start()
    await three.until(lambda: three.relays[2].links[0].goaways == [GoawayCode.DONE], "the third is being left")
    moves = Moves(three)
    session = three.relays[2].links[0].session
    session.goaway(GoawayCode.DRAINING, "an upgrade", 600)
    await three.until(lambda: moves.asked, "asked to move")
    assert moves.asked[0][0] == three.relays[2].address


async def test_what_is_left_of_the_list_has_to_do(tmp_path: Path) -> None:
    async with agent_of(tmp_path, relays=2) as world:
        await world.until(lambda: world.connected == [0, 1], "connected")
        moves = Moves(world)
        link_of(world, 1).goaway(GoawayCode.DRAINING, "an upgrade", 600)
        await world.until(lambda: moves.asked, "asked to move")
        assert moves.asked == [(world.relays[1].address, [0, 1])]
        await world.until(lambda: world.connected == [0], "left")
        assert world.control.unready() is None


async def test_a_replacement_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPLACEMENT_WAIT", 0.5)
    async with agent_of(tmp_path, relays=3) as world:
        await world.until(lambda: world.connected == [0, 1], "connected")
        moves = Moves(world)
        world.relays[2].mute = True
        link_of(world, 0).goaway(GoawayCode.DRAINING, "an upgrade", 600)
        await world.until(lambda: moves.asked, "asked to move")
        assert moves.asked == [(world.relays[0].address, [0, 1])]


# -- relays that pace, and other refusals ---------------------------------------------------------------------


class Hints:
    """Remembers what `RelayChoice.failed` is told."""

    def __init__(self, world: World) -> None:
        self.told: list[float | None] = []
        self._failed = world.choice.failed
        world.choice.failed = self

    def __call__(self, *args: Any, hint: float | None = None, **more: Any) -> float:
        self.told.append(hint)
        return self._failed(*args, hint=hint, **more)


@pytest.mark.parametrize("code", [GoawayCode.LIMIT, GoawayCode.UNAVAILABLE, GoawayCode.DRAINING])
async def test_a_relay_that_paces_is_obeyed_and_another_one_tried(tmp_path: Path, code: GoawayCode) -> None:
    async with agent_of(tmp_path, relays=2, wanted=1, down=(0,)) as world:
        hints = Hints(world)
        world.relays[0].turn_away = (code, "too many at once", 7)
        world.relays[0].start()
        await world.until(lambda: world.connected == [1], "connected to the other")
        assert 7 in hints.told
    assert world.relays[0].links == []


async def test_the_hint_of_a_live_connections_end(world: World) -> None:
    hints = Hints(world)
    link_of(world).close(GoawayCode.UNAVAILABLE, "overload", 9)
    await world.until(lambda: hints.told, "a failure")
    assert hints.told == [9]
    assert world.control.unready() is not None


async def test_a_revoked_cluster_is_not_tried_every_second(world: World) -> None:
    hints = Hints(world)
    revoked: list[str] = []
    world.sessions.revoke = lambda via, message: revoked.append(via)
    link_of(world).close(GoawayCode.REVOKED, "revoked")
    await world.until(lambda: hints.told, "a failure")
    assert hints.told == [30]
    assert revoked == [world.relay.address]


async def test_e10_an_instance_id_used_twice_is_not_fought_over(world: World) -> None:
    hints = Hints(world)
    with capture_logs() as logs:
        link_of(world).close(GoawayCode.REPLACED, "another agent with the same instance id has connected")
        await world.until(lambda: hints.told, "a failure")
    assert hints.told == [30]
    (said,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert "restart" in said["advice"]


# -- revocations ----------------------------------------------------------------------------------------------


def identity(name: str) -> Identity:
    return Identity(name, "", (), f"i#{name}", "i", 9000.0, issued_at=1000.0)


async def test_v11_each_relay_has_a_list_that_outlives_its_connection(three: World) -> None:
    lists = three.sessions.revocations
    for number, name in ((0, "alice"), (0, "bob"), (1, "carol")):
        link_of(three, number).send(Revoke(name, 5000, name != "bob"))
    await three.until(lambda: len(lists) == 3, "three are revoked")
    await three.relays[0].stop()
    await three.until(lambda: three.connected == [1, 2], "another relay stands in")
    assert [name for name in ("alice", "bob", "carol", "dave") if lists.find(identity(name))] == [
        "alice",
        "bob",
        "carol",
    ]
    three.relays[0].start()
    await three.until(lambda: 0 in three.connected, "the relay is back")
    assert len(lists) == 3, "until it says otherwise"
    link_of(three, 0).send(Revoke("bob", 5000, True))
    await three.until(lambda: len(lists) == 2, "its list begins anew")
    assert lists.find(identity("alice")) is None
    link_of(three, 0).send(Revoke("bob", 0))
    link_of(three, 0).send(Revoke("carol", 0))
    await three.until(lambda: lists.find(identity("bob")) is None, "bob is restored")
    assert lists.find(identity("carol")) is not None, "another relay has revoked her"


async def test_v14_a_list_that_is_too_long_is_an_error_in_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations, "MAX_LIST", 2 * revocations.ENTRY + 8)
    with capture_logs() as logs:
        link_of(world).send(Revoke("alice", 5000, True))
        link_of(world).send(Revoke("bob", 5000))
        link_of(world).send(Revoke("carol", 5000))
        await world.until(lambda: world.sessions.revocations.left_out, "one is left out")
    (error,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert error["event"] == "a relay's list of revocations is too long"
    assert world.connected == [0], "the connection is kept: the agent is needed"


def ledger_of(world: World) -> LedgerEntries:
    return world.control.ledgers[world.control.relays[0]]


async def test_what_a_relay_gives_to_keep_outlives_the_connection_and_is_given_back_once(world: World) -> None:
    entries = [bytes([number]) * 30 for number in range(3)]
    for one in frames(entries, first=True):
        link_of(world).send(one)
    await world.until(lambda: len(ledger_of(world)) == 3, "it is kept")
    await world.relay.stop()
    world.relay.ledgers.clear()
    world.relay.start()
    await world.until(lambda: world.relay.ledgers and world.relay.agents, "the agent is back")
    assert world.relay.ledgers == [Ledger(digest=ledger_of(world).digest())]
    for _ in range(2):
        link_of(world).send(Ledger(wanted=True))
    link_of(world).send(Revoke("last", 5))
    await world.until(lambda: len(world.sessions.revocations) == 1, "the agent has read all")
    await world.until(lambda: len(world.relay.ledgers) == 2, "it has answered, once")
    assert list(entries_of(world.relay.ledgers[1])) == entries
    assert world.relay.ledgers[1].last
    for one in frames([b"other" * 8], first=True):
        link_of(world).send(one)
    await world.until(lambda: len(ledger_of(world)) == 1, "the former ones are void")


async def test_a_ledger_that_cannot_be_read_ends_the_connection(world: World) -> None:
    link_of(world).send(Ledger(b"\0\1"))
    await world.until(lambda: "impossible size" in world.control.last_failure, "the reason is known")


@pytest.mark.parametrize(("pause", "wrong"), [("FOLLOW_PAUSE", ""), ("REFUSED_PAUSE", "not a succession")])
async def test_e14_a_flood_of_announcements_costs_an_agent_the_last_one_and_one_judgement_in_a_pause(
    world: World, monkeypatch: pytest.MonkeyPatch, pause: str, wrong: str
) -> None:
    assert (module.FOLLOW_PAUSE, module.REFUSED_PAUSE) == (2.0, 30.0)
    monkeypatch.setattr(module, pause, 3600.0)
    judged: list[str] = []

    async def follow(cas: str) -> None:
        judged.append(cas)
        if wrong:
            raise ConfigError(wrong)

    monkeypatch.setattr(world.control._keeper, "follow_relay", follow)
    for sent in (1, 10, 1000):
        for number in range(sent):
            link_of(world).send(CaSuccession(f"{number} of {sent} " + "x" * 100))
        link_of(world).send(Ledger(bytes([0, 30]) + f"{sent:030}".encode()))
        await world.until(lambda sent=sent: f"{sent:030}".encode() in ledger_of(world), "the agent has read all")
        assert [one.split(" x")[0] for one in judged] == ["0 of 1"]
    (link,) = world.control._links
    assert link.unfollowed.startswith("999 of 1000"), "nothing but the last is kept"
    assert world.connected == [0]


async def test_an_announcement_that_cannot_be_kept_is_taken_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay announces a step once: the store of a cluster whose API server restarts must not lose it."""
    monkeypatch.setattr(module, "FOLLOW_PAUSE", 0.0)
    monkeypatch.setattr(module, "REFUSED_PAUSE", 0.0)
    answers: list[ArcbridgeError | None] = [StateError("no API server"), StateError("no API server"), None]
    judged: list[str] = []

    async def follow(cas: str) -> None:
        judged.append(cas)
        if (error := answers.pop(0)) is not None:
            raise error

    monkeypatch.setattr(world.control._keeper, "follow_relay", follow)
    link_of(world).send(CaSuccession("step"))
    await world.until(lambda: not answers, "it is tried again")
    assert judged == ["step"] * 3
    answers += [ConfigError("not a succession"), None]
    link_of(world).send(CaSuccession("wrong"))
    await world.until(lambda: len(judged) == 4, "it is judged")
    link_of(world).send(CaSuccession("right"))
    await world.until(lambda: not answers, "the next one is judged")
    assert judged[3:] == ["wrong", "right"], "what is wrong stays so"


# -- many agents come at once ---------------------------------------------------------------------------------


class Queues(ControlTransport):
    """Relays that let an agent wait for its turn, under a virtual clock; `tried` is when each was connected to."""

    def __init__(self, turns: dict[str, list[float]]) -> None:
        """`turns`: how long a handshake waits for its turn each time, by the relay's host; negative: it has none."""
        self.turns = turns
        self.tried: list[tuple[str, float]] = []

    async def connect(self, relay: Address) -> socket.socket:
        self.tried.append((relay.host, asyncio.get_running_loop().time()))
        await asyncio.sleep(1.0)
        if not self.turns[relay.host]:
            raise Unreachable("refused")
        return cast(socket.socket, SimpleNamespace(close=lambda: None))

    def make_session(self, link: ControlLink, introduction: Introduction) -> MuxSession:
        lasts = asyncio.get_running_loop().create_future()
        session = SimpleNamespace(link=link, closed=False, round_trip=1.0, wait_ended=lambda: lasts)
        session.send = session.abort = session.close = lambda *args: None
        return cast(MuxSession, session)

    async def secure(self, session: MuxSession, sock: socket.socket, relay: Address) -> None:
        turn = self.turns[relay.host].pop(0)
        await asyncio.sleep(abs(turn))
        if turn < 0:
            raise ConnectionResetError("no turn")
        cast(Any, session).link.established(session)


def come(turns: dict[str, list[float]], seconds: float) -> list[tuple[str, float]]:
    """Return which relays an agent that wants one tries, and when, in so many seconds."""
    transport = Queues(turns)
    addresses = [Address(host, 443) for host in turns]
    keeper = cast(CredentialKeeper, SimpleNamespace(stated_ca_pem="", announcement=None))

    async def run() -> list[tuple[str, float]]:
        clock = asyncio.get_running_loop().time
        choice = RelayChoice(addresses, 1, draw=lambda: 0.0, make_backoff=lambda: Backoff(first=0.1, cap=0.1))
        choice.round_trips.least = lambda name, within=0.0: 0.010
        choice.round_trips.age = lambda name: 0.0
        sessions, _ = make_sessions(FakeAuthenticator(), Clock())
        control = ControlConnections(
            addresses, keeper, sessions, instance="a", choice=choice, clock=clock, draw=lambda: 0.5, transport=transport
        )
        began = clock()
        control.start()
        await asyncio.sleep(seconds)
        await control.close()
        return [(host, round(when - began, 1)) for host, when in transport.tried]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(run())


def test_who_waits_for_a_turn_does_not_queue_at_the_next_relay_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_START", 2.0)
    assert come({"a": [1.5], "b": [0.1]}, 30) == [("a", 0.0)]
    assert come({"a": [2.5], "b": [0.1]}, 30) == [("a", 0.0), ("b", 3.0)], "but for one that does not answer"


def test_who_was_turned_away_by_most_relays_goes_home_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns are for agents that have no relay: 99 of 100 were back after 67 s, 57 s since (3000 agents, seed 5)."""
    monkeypatch.setattr(module, "BALANCE_FIRST", 60.0)
    monkeypatch.setattr(module, "BALANCE_LAST", 120.0)

    def home(turned_away: dict[str, list[float]]) -> float:
        tried = come({"a": [], "b": [], "c": []} | turned_away, 200)
        (standing_in,) = [when for host, when in tried if host != "a"][-1:]
        return next(when for host, when in tried if host == "a" and when > standing_in + 5)

    assert home({"b": [0.5]}) == pytest.approx(90, abs=1)
    assert home({"b": [-3.0] * 6 + [0.5], "c": [-3.0] * 6}) > 120

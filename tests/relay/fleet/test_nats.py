from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from arcbridge.errors import JoinRefused
from arcbridge.net.join import JoinCode
from arcbridge.relay.fleet.base import AgentLink, Fleet, Lost
from arcbridge.relay.fleet.nats import Accept, DialAnswer, DialAsk, NatsFleet, Offer, _hashed
from arcbridge.relay.nats import NatsConnection, NoReply, NoResponder
from arcbridge.relay.operations import Operations
from arcbridge.relay.pump import Pumps
from arcbridge.relay.recent_users import RecentUsers
from arcbridge.settings.config import RelayFleetConfig
from arcbridge.wire.records import Dial, Status
from tests.relay.conftest import Connect, Connections, settings
from tests.relay.fleet.conformance import DIAL, FleetConformance, Link
from tests.relay.station import refused
from tests.support.eventually import until
from tests.support.nats_server import NatsServer


@pytest.fixture(autouse=True)
def _counting_waits_for_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not answered within half a second is left out: for people that is good enough, and not for a test."""
    monkeypatch.setattr("arcbridge.relay.fleet.nats.COUNT_DEADLINE", 10.0)


async def started(connections: Connections) -> NatsFleet:
    """One relay's fleet; what it subscribed is known to the server."""
    connection = await connections.make()
    fleet = NatsFleet(connection, internal_address="10.0.0.1:443")
    answers_for(fleet)
    await fleet.start()
    await connection.flush(10)
    return fleet


def answers_for(fleet: NatsFleet) -> None:
    """Have the fleet answer the questions of others as a relay does."""
    policy: Any = None  # no question here is about it
    fleet.on_question = Operations(
        Pumps(lambda pump: None), fleet, fleet.tell_lost, policy, RecentUsers(), relay="relay:443"
    ).answer


async def settled(*fleets: NatsFleet) -> None:
    """Wait until the NATS server knows all subscriptions."""
    for fleet in fleets:
        await fleet._nats.flush(10)


class TestNats(FleetConformance):
    """One relay: everything is here, as without an engine."""

    @pytest.fixture(autouse=True)
    def _use(self, connections: Connections) -> None:
        self.connections = connections

    async def make(self) -> Fleet:
        return await started(self.connections)


class Apart(Fleet):
    """A fleet whose agents are all at one relay and whose clients are all at another."""

    def __init__(self, clients: NatsFleet, agents: NatsFleet) -> None:
        self.clients = clients
        self.at = agents

    async def close(self) -> None:
        await self.clients.close()
        await self.at.close()

    async def register(self, link: AgentLink) -> None:
        await self.at.register(link)
        await settled(self.at)

    async def unregister(self, link: AgentLink) -> None:
        await self.at.unregister(link)
        await settled(self.at)

    async def dial(self, cluster: str, dial: Dial, timeout: float) -> Status:
        return await self.clients.dial(cluster, replace(dial, cluster=cluster), timeout)

    async def count(self, clusters: Sequence[str]) -> Mapping[str, int]:
        return await self.clients.count(clusters)

    def links(self) -> list[AgentLink]:
        return self.at.links()


class TestNatsApart(FleetConformance):
    """Two relays: every dial goes through NATS."""

    @pytest.fixture(autouse=True)
    def _use(self, connections: Connections) -> None:
        self.connections = connections

    async def make(self) -> Fleet:
        return Apart(await started(self.connections), await started(self.connections))

    async def test_cancelled_dials_leave_nothing(self, fleet: Fleet) -> None:
        await super().test_cancelled_dials_leave_nothing(fleet)
        assert isinstance(fleet, Apart)
        # An ASK whose offer came too late was repeated: an offer that nobody accepts lapses.
        await until(lambda: not fleet.at._offers)
        await until(lambda: not fleet.at._dials)


async def dial_refused(fleet: NatsFleet, cluster: str = "prod", timeout: float = 10, **more: str) -> JoinRefused:
    return await refused(fleet.dial(cluster, replace(DIAL, cluster=cluster, **more), timeout))


@pytest.fixture
async def pair(connections: Connections) -> AsyncIterator[tuple[NatsFleet, NatsFleet]]:
    fleets = await started(connections), await started(connections)
    yield fleets
    for fleet in fleets:
        await fleet.close()


class TestTwoRelays:
    async def test_the_own_relay_first(self, pair: tuple[NatsFleet, NatsFleet]) -> None:
        here, there = Link(instance="here"), Link(instance="there")
        await pair[0].register(here)
        await pair[1].register(there)
        await settled(*pair)
        for _ in range(5):
            await pair[0].dial("prod", DIAL, 10)
        assert (len(here.asked), len(there.asked)) == (5, 0)
        assert pair[0].dials["local"] == 5

    async def test_a_wanted_instance_wherever_it_is(self, pair: tuple[NatsFleet, NatsFleet]) -> None:
        here, there = Link(instance="here"), Link(instance="there >.* ä")
        await pair[0].register(here)
        await pair[1].register(there)
        await settled(*pair)
        status = await pair[0].dial("prod", replace(DIAL, instance=there.instance), 10)
        assert status.instance == there.instance
        assert (len(here.asked), len(there.asked)) == (0, 1)
        await pair[1].unregister(there)
        await settled(*pair)
        error = await refused(pair[0].dial("prod", replace(DIAL, instance=there.instance), 10))
        assert error.code == JoinCode.NO_INSTANCE
        assert not here.asked
        await pair[0].unregister(here)
        await settled(*pair)
        error = await refused(pair[0].dial("prod", replace(DIAL, instance=there.instance), 10))
        assert error.code == JoinCode.NO_AGENT, "others are not there either"

    @pytest.mark.parametrize("answer", [1, None])
    async def test_the_second_attempt_may_be_at_the_other(
        self, pair: tuple[NatsFleet, NatsFleet], answer: int | None
    ) -> None:
        bad, same, good = Link(instance="a", answer=answer), Link(instance="a"), Link(instance="b")
        await pair[0].register(bad)
        await pair[1].register(same)
        await pair[1].register(good)
        await settled(*pair)
        status = await pair[0].dial("prod", DIAL, 2)
        assert status.instance == "b"
        assert not same.asked

    async def test_a_consent_counts_that_comes_while_another_agent_is_looked_for(
        self, pair: tuple[NatsFleet, NatsFleet], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        consents = asyncio.Event()

        class Slow(Link):
            async def dial(self, dial: Dial) -> Status:
                await consents.wait()
                return await super().dial(dial)

        slow, bad = Slow(instance="a"), Link(instance="b", answer=1)
        await pair[0].register(slow)
        await pair[1].register(bad)
        await settled(*pair)
        find = pair[0]._find

        async def late(cluster: str, wanted: str, tried: list[AgentLink], avoid: str) -> object:
            if avoid:
                consents.set()
            return await find(cluster, wanted, tried, avoid)

        monkeypatch.setattr(pair[0], "_find", late)
        assert (await pair[0].dial("prod", DIAL, 2)).instance == "a"
        assert not bad.asked

    async def test_a_relay_whose_agents_drain_is_asked_for_their_sessions_alone(
        self, pair: tuple[NatsFleet, NatsFleet], connections: Connections
    ) -> None:
        """Five relays are asked at most, and those whose agents drain would hide the one whose agent stays."""
        link, stranger = Link(instance="a"), await connections.make()
        await pair[1].register(link)
        await settled(*pair)
        assert (await offered(stranger)).instance == "a"
        link.draining = True
        pair[1].reported(link)

        async def nobody_listens() -> bool:
            try:
                await stranger.request(f"{stranger.prefix}.dial.prod", DialAsk("r", "prod").encode(), 0.5)
            except NoResponder:
                return True
            except NoReply:  # it was under way when the relay left the subject
                pass
            return False

        await until(nobody_listens)
        assert (await pair[0].dial("prod", replace(DIAL, instance="a"), 10)).instance == "a"

    async def test_no_dial_after_a_drain(self, pair: tuple[NatsFleet, NatsFleet]) -> None:
        """docs/threats.md#F8: no client is sent to a relay that goes away, and its own clients still find an agent."""
        link, late = Link(instance="a"), Link(instance="b")
        await pair[1].register(link)
        await settled(*pair)
        await pair[1].drain()
        await pair[1].register(late)
        assert (await dial_refused(pair[0])).code == JoinCode.NO_AGENT
        assert (await pair[1].dial("prod", DIAL, 10)).token == "t"

    async def test_names_that_are_no_names(self, pair: tuple[NatsFleet, NatsFleet]) -> None:
        """docs/threats.md#F7: nothing of a name becomes a part of a subject."""
        await pair[1].register(Link("a.b"))
        await settled(*pair)
        for name in ("a.*", "a.>", ">", "a b", "a\r\nPUB x", "", "a" * 300):
            assert (await dial_refused(pair[0], name)).code == JoinCode.NO_AGENT
        assert (await dial_refused(pair[0], "a")).code == JoinCode.NO_AGENT
        assert (await pair[0].dial("a.b", replace(DIAL, cluster="a.b"), 10)).token == "t"

    async def test_an_agent_at_two_relays_counts_once(self, pair: tuple[NatsFleet, NatsFleet]) -> None:
        for fleet in pair:
            await fleet.register(Link(instance="a"))
            await fleet.register(Link(instance="b"))
        await settled(*pair)
        assert dict(await pair[0].count(["prod"])) == {"prod": 2}

    async def test_more_clusters_than_a_question_names(self, pair: tuple[NatsFleet, NatsFleet]) -> None:
        names = [f"c{n}" for n in range(450)]
        for name in (*names, "another"):
            for instance in range(3):
                pair[1].add(Link(name, str(instance)))
        assert dict(await pair[0].count(names)) == dict.fromkeys(names, 3)

    async def test_that_a_right_is_lost_is_told_to_all(self, pair: tuple[NatsFleet, NatsFleet]) -> None:
        heard: list[Lost] = []
        pair[1].on_lost = heard.append
        lost = [Lost("prod", f"user {n}", f"https://issuer#{n}", n + 1, "the policy") for n in range(50)]
        for one in lost:
            pair[0].tell_lost(one)
        await until(lambda: len(heard) == len(lost))
        assert set(heard) == set(lost)

    async def test_where_a_relay_is(self, pair: tuple[NatsFleet, NatsFleet]) -> None:
        assert await pair[0].address_of(pair[1].relay_id) == "10.0.0.1:443"
        assert await pair[0].address_of("0" * 16) == ""
        for odd in ("", "*", ">", "../..", "0" * 15 + "*"):
            assert await pair[0].address_of(odd) == ""


async def offered(stranger: NatsConnection) -> Offer:
    """What a relay offers for a dial of `prod`."""
    return Offer.decode(await stranger.request(f"{stranger.prefix}.dial.prod", DialAsk("r", "prod").encode(), 10))


class TestOddReplies:
    """docs/threats.md#F3, #F5, #F7: a message that is late, doubled, crossed or a stranger's changes nothing."""

    async def test_a_late_dial_reaches_no_agent(
        self, pair: tuple[NatsFleet, NatsFleet], connections: Connections, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An ASK is held up: its offer is not accepted, no agent hears of it, and it lapses."""
        monkeypatch.setattr("arcbridge.relay.fleet.nats.OFFER_LIFE", 0.1)
        link = Link()
        await pair[1].register(link)
        await settled(*pair)
        stranger = await connections.make()
        offer = await offered(stranger)
        assert (offer.request, offer.cluster, offer.instance) == ("r", "prod", "i1")
        assert not link.asked
        await until(lambda: not pair[1]._offers)
        accept = Accept("prod", replace(DIAL, cluster="prod").encode(), 1000).encode()
        answer = DialAnswer.decode(await stranger.request(offer.subject, accept, 10))
        assert answer.code == JoinCode.NO_AGENT
        assert not link.asked

    async def test_an_offer_is_good_for_one_dial(
        self, pair: tuple[NatsFleet, NatsFleet], connections: Connections
    ) -> None:
        link = Link()
        await pair[1].register(link)
        await settled(*pair)
        stranger = await connections.make()
        offer = await offered(stranger)
        accept = Accept("prod", replace(DIAL, cluster="prod").encode(), 1000).encode()
        answers = [DialAnswer.decode(await stranger.request(offer.subject, accept, 10)) for _ in range(3)]
        assert [answer.code for answer in answers] == [0, JoinCode.NO_AGENT, JoinCode.NO_AGENT]
        assert len(link.asked) == 1

    @pytest.mark.parametrize("wrong", ["ask", "dial"])
    async def test_a_dial_of_another_cluster_is_not_passed_on(
        self, pair: tuple[NatsFleet, NatsFleet], connections: Connections, wrong: str
    ) -> None:
        link = Link()
        await pair[1].register(link)
        await settled(*pair)
        stranger = await connections.make()
        offer = await offered(stranger)
        dial = replace(DIAL, cluster="other" if wrong == "dial" else "prod")
        await stranger.publish(
            offer.subject, Accept("other" if wrong == "ask" else "prod", dial.encode(), 1000).encode()
        )
        await until(lambda: pair[1].crossed)
        assert not link.asked

    @pytest.mark.parametrize("wrong", ["request", "cluster", "instance", "noise"])
    async def test_a_wrong_offer_is_not_accepted(
        self, pair: tuple[NatsFleet, NatsFleet], connections: Connections, wrong: str
    ) -> None:
        stranger = await connections.make()
        accepted: list[object] = []

        def lie(message: object) -> None:
            ask = DialAsk.decode(message.data)
            offer = Offer(ask.request, ask.cluster, "i1", f"{stranger.prefix}.offer.somewhere")
            offer = replace(offer, **{wrong: "wrong"}) if wrong != "noise" else offer
            payload = b"\xff" if wrong == "noise" else offer.encode()
            task = asyncio.ensure_future(stranger.publish(message.reply, payload))
            accepted.append(task)

        await stranger.subscribe(f"{stranger.prefix}.offer.somewhere", accepted.append)
        # Where any instance will do there is no wrong one.
        for subject in ("prod", f"prod.{_hashed('i1')}")[wrong == "instance" :]:
            await stranger.subscribe(f"{stranger.prefix}.dial.{subject}", lie)
        await stranger.flush(10)
        error = await dial_refused(pair[0], instance="i1")
        assert error.code in (JoinCode.NO_AGENT, JoinCode.NO_INSTANCE, JoinCode.INTERNAL)
        await stranger.flush(10)
        assert all(isinstance(one, asyncio.Future) for one in accepted)

    @pytest.mark.parametrize("wrong", ["token", "cluster", "status", "noise"])
    async def test_a_wrong_answer_is_no_consent(
        self, pair: tuple[NatsFleet, NatsFleet], connections: Connections, wrong: str
    ) -> None:
        stranger = await connections.make()
        kept: list[object] = []

        def offer(message: object) -> None:
            ask = DialAsk.decode(message.data)
            made = Offer(ask.request, ask.cluster, "i1", f"{stranger.prefix}.offer.trap")
            kept.append(asyncio.ensure_future(stranger.publish(message.reply, made.encode())))

        def answer(message: object) -> None:
            status = Status(token="other" if wrong == "status" else "t").encode()
            made = DialAnswer(
                "other" if wrong == "token" else "t", "other" if wrong == "cluster" else "prod", 0, "", 0, status
            )
            payload = b"\xff" if wrong == "noise" else made.encode()
            kept.append(asyncio.ensure_future(stranger.publish(message.reply, payload)))

        await stranger.subscribe(f"{stranger.prefix}.dial.prod", offer)
        await stranger.subscribe(f"{stranger.prefix}.offer.trap", answer)
        await stranger.flush(10)
        assert (await dial_refused(pair[0])).code == JoinCode.AGENT_TIMEOUT

    async def test_noise_on_every_subject(self, pair: tuple[NatsFleet, NatsFleet], connections: Connections) -> None:
        link = Link()
        await pair[1].register(link)
        await settled(*pair)
        stranger = await connections.make()
        name, relay_id = pair[1]._nats.name, pair[1].relay_id
        subjects = [
            "dial.prod",
            "relay.questions",
            f"offer.{name}.{relay_id}.x",
            f"relay.{relay_id}",
            f"inbox.{name}.ask{relay_id}.x",
            "relay.lost",
        ]
        for subject in subjects:
            for noise in (
                b"",
                b"\xff\xff\xff\xff\xff",
                b"[1,2",
                b'{"a":3}',
                b'{"a":[["i","v",1' + b"0" * 400 + b"]]}",
                b"[[]]",
                b"null",
                b"x" * 100_000,
            ):
                await stranger.publish(f"{stranger.prefix}.{subject}", noise, f"{stranger.prefix}.inbox.unused")
        await stranger.flush(10)
        assert (await pair[0].dial("prod", replace(DIAL, cluster="prod"), 10)).token == "t"
        assert dict(await pair[0].count(["prod"])) == {"prod": 1}

    async def test_f20_a_reply_goes_to_an_inbox_of_the_fleet_alone(
        self, pair: tuple[NatsFleet, NatsFleet], connections: Connections
    ) -> None:
        """The relay has permissions that the stranger lacks: no message makes it publish where the stranger wants."""
        await pair[1].register(Link())
        await settled(*pair)
        stranger, (published, elsewhere) = await connections.make(), ([], [])
        prefix, relay_id = stranger.prefix, pair[1].relay_id
        question = b'{"from": "x", "question": {"ask": "agents"}}'
        replies = ("$KV.x.cluster.prod.binding", "$JS.API.STREAM.PURGE.KV_x", f"{prefix}.roll", f"{prefix}.inbox.a b")
        asked = {"dial.prod": DialAsk("r", "prod").encode(), "relay.questions": question, f"relay.{relay_id}": b""}
        await stranger.subscribe(f"{prefix}.inbox.mine", lambda message: published.append(message.data))
        for reply in replies[:2]:
            await stranger.subscribe(reply, lambda message: elsewhere.append(message.subject))
        await stranger.flush(10)
        for subject, payload in asked.items():
            for reply in replies[:3]:
                await stranger.publish(f"{prefix}.{subject}", payload, reply)
        await until(lambda: pair[1]._nats.foreign_replies == len(asked) * 3)
        for subject, payload in asked.items():
            await stranger.publish(f"{prefix}.{subject}", payload, f"{prefix}.inbox.mine")
        await until(lambda: len(published) >= len(asked))
        await stranger.flush(10)
        assert elsewhere == []
        assert not stranger.is_below("inbox", replies[3])

    async def test_f20_an_offer_names_a_subject_for_offers(
        self, pair: tuple[NatsFleet, NatsFleet], connections: Connections
    ) -> None:
        stranger, kept = await connections.make(), []
        accepted: list[object] = []

        def offer(message: object) -> None:
            ask = DialAsk.decode(message.data)
            made = Offer(ask.request, ask.cluster, "i1", f"$KV.{stranger.prefix}.cluster.prod.binding").encode()
            kept.append(asyncio.ensure_future(stranger.publish(message.reply, made)))

        await stranger.subscribe(f"{stranger.prefix}.dial.prod", offer)
        await stranger.subscribe(f"$KV.{stranger.prefix}.>", accepted.append)
        await stranger.flush(10)
        await dial_refused(pair[0])
        await stranger.flush(10)
        assert pair[0].crossed
        assert accepted == []

    async def test_f21_a_false_address_does_not_stay(
        self, pair: tuple[NatsFleet, NatsFleet], connections: Connections
    ) -> None:
        stranger, answers = await connections.make(), [b"10.6.6.6:443", b"not an address", b"10.0.0.7:443"]
        kept = []
        replies = iter(answers)

        def lie(message: object) -> None:
            kept.append(asyncio.ensure_future(stranger.publish(message.reply, next(replies))))

        await stranger.subscribe(f"{stranger.prefix}.relay.{'a' * 16}", lie)
        await stranger.flush(10)
        assert await pair[0].address_of("a" * 16) == "10.6.6.6:443"
        assert await pair[0].address_of("a" * 16) == "10.6.6.6:443"
        assert len(kept) == 1
        pair[0]._addresses.update({relay: (address, 0.0) for relay, (address, _) in pair[0]._addresses.items()})
        with pytest.raises(NoReply):
            await pair[0].address_of("a" * 16)
        assert await pair[0].address_of("a" * 16) == "10.0.0.7:443"


class TestNatsDown:
    @pytest.fixture
    async def two(self, own_server: NatsServer, connect: Connect) -> AsyncIterator[tuple[NatsFleet, NatsFleet]]:
        connections = connect(own_server)
        fleets = await started(connections), await started(connections)
        yield fleets
        for fleet in fleets:
            await fleet.close()

    @pytest.mark.parametrize("how", ["stop", "freeze"])
    async def test_here_goes_on_and_elsewhere_is_told(
        self, two: tuple[NatsFleet, NatsFleet], own_server: NatsServer, how: str
    ) -> None:
        """docs/threats.md#F1."""
        here, there = Link("here", "h"), Link("there", "t")
        await two[0].register(here)
        await two[1].register(there)
        await settled(*two)
        getattr(own_server, how)()
        for _ in range(2):
            began = time.monotonic()
            assert (await two[0].dial("here", replace(DIAL, cluster="here"), 10)).token == "t"
            # No other relay was asked.
            assert time.monotonic() - began < 1
            wanting = replace(DIAL, cluster="here", instance="h")
            assert (await two[0].dial("here", wanting, 10)).instance == "h"
            began = time.monotonic()
            error = await dial_refused(two[0], "there")
            assert (error.code, error.retry_after) == (JoinCode.INTERNAL, 5)
            assert time.monotonic() - began < 5, "long before the dial's ten seconds"
            assert dict(await two[0].count(["here", "there"])) == {"here": 1, "there": 0}
        if how == "stop":
            own_server.start()
        else:
            own_server.thaw()
        back = time.monotonic()
        while True:
            try:
                await two[0].dial("there", replace(DIAL, cluster="there"), 10)
                break
            except JoinRefused:
                await asyncio.sleep(0.05)
        assert time.monotonic() - back < 15
        assert (await two[1].dial("here", replace(DIAL, cluster="here"), 10)).token == "t"

    async def test_what_changes_meanwhile_is_right_afterwards(
        self, two: tuple[NatsFleet, NatsFleet], own_server: NatsServer
    ) -> None:
        leaving, coming = Link("leaving"), Link("coming")
        await two[1].register(leaving)
        await settled(*two)
        own_server.stop()
        await until(lambda: not two[1]._nats.connected)
        await two[1].unregister(leaving)
        await two[1].register(coming)
        own_server.start()
        await until(lambda: all(fleet._nats.connected for fleet in two))
        await settled(*two)
        assert (await two[0].dial("coming", replace(DIAL, cluster="coming"), 10)).token == "t"
        assert (await dial_refused(two[0], "leaving")).code == JoinCode.NO_AGENT

    async def test_a_relay_starts_without_nats(self, own_server: NatsServer) -> None:
        own_server.stop()
        connection = NatsConnection(settings(own_server))
        assert not await connection.start()
        fleet = NatsFleet(connection)
        await fleet.start()
        link = Link()
        await fleet.register(link)
        assert (await fleet.dial("prod", DIAL, 10)).token == "t"
        assert (await dial_refused(fleet, "other")).code == JoinCode.INTERNAL
        own_server.start()
        await until(lambda: connection.connected)
        assert (await dial_refused(fleet, "other")).code == JoinCode.NO_AGENT
        await fleet.close()
        await connection.close()

    async def test_a_frozen_holder_is_passed_over(self, own_server: NatsServer) -> None:
        """docs/threats.md#F3: NATS still knows the subscription of a relay that has stopped; another of the group
        answers.
        """
        config = RelayFleetConfig(servers=(own_server.url,))
        connections = [NatsConnection(config) for _ in range(3)]
        for connection in connections:
            assert await connection.start(30)
        asking, frozen, holder = (NatsFleet(connection) for connection in connections)
        for fleet in (asking, frozen, holder):
            await fleet.start()
        frozen._asked = lambda message: None
        silent, good = Link(instance="s"), Link(instance="g")
        await frozen.register(silent)
        await holder.register(good)
        await settled(asking, frozen, holder)
        codes = []
        for _ in range(3):
            try:
                codes.append((await asking.dial("prod", replace(DIAL, cluster="prod"), 10)).instance)
            except JoinRefused as error:
                codes.append(str(error.code))
        # The server picks at random: one agent is found, or it is said that the others cannot be asked.
        assert set(codes) <= {"g", str(int(JoinCode.INTERNAL))}
        assert not silent.asked
        assert all(connection.connected for connection in connections)
        for fleet in (asking, frozen, holder):
            await fleet.close()
        for connection in connections:
            await connection.close()

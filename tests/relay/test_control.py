from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from arcbridge.agent.revocations import Revocations
from arcbridge.errors import ArcbridgeError, JoinRefused, StateError
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.backoff import Backoff
from arcbridge.net.join import JoinCode
from arcbridge.net.sockets import send_all
from arcbridge.net.tls import ALPN_CONTROL
from arcbridge.net.tlspipe import TlsPipe
from arcbridge.net.tlstransport import BoundedTlsTransport
from arcbridge.pki.authority import Authority, agent_expiry
from arcbridge.pki.rotation import Rotation
from arcbridge.relay import control as control_module
from arcbridge.relay.admission import Ticket
from arcbridge.relay.control import FULL_RETRY, LAPSED_MARGIN, SETTLE
from arcbridge.relay.fleet.base import Lost
from arcbridge.relay.registry.base import RegistryUnavailable, UserRevocation
from arcbridge.settings.config import RelayLimitsConfig
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import CaSuccession, Dial, Goaway, Revoke, Status
from arcbridge.wire.session import Introduction, Kind, Side
from tests.net.ends import RELAY, agent_certificate, client_context, completed_work, tcp_pair
from tests.net.test_client_hello import client_hello
from tests.relay.registry.conformance import known
from tests.relay.station import Agent, Station, refused, station, swallow
from tests.support.eventually import until


async def connected(relay: Station, agents: int) -> None:
    await until(lambda: len(relay.control) == agents)


async def test_an_agent_is_registered_and_noted(relay: Station) -> None:
    async with Agent(relay, instance="pod-7"):
        assert relay.admission.waiting == 0
        (info,) = relay.fleet.links()
        assert (info.instance, info.version) == ("pod-7", "test 1")
        async with asyncio.timeout(5):
            while not (record := await relay.registry.cluster("prod")) or not record.last_seen:
                await asyncio.sleep(0.005)
        assert record.version == "test 1"
    await connected(relay, 0)
    assert relay.fleet.links() == []


async def test_the_handshake_of_an_agent_is_charged_to_its_address(
    monkeypatch: pytest.MonkeyPatch, relay: Station
) -> None:
    """docs/threats.md#L43. Without the listener, which charges what the connection's task does."""
    payers = completed_work(monkeypatch)
    near, far = await tcp_pair()
    ticket = relay.admission.enter("127.0.0.1")
    assert isinstance(ticket, Ticket)
    payer = ticket.loop_time
    with near:
        serving = asyncio.create_task(relay.control.serve(far, ticket))
        pipe = TlsPipe(near, client_context(ALPN_CONTROL, "prod"), server_hostname=RELAY)
        await pipe.handshake()
        await pipe.flush()
        await pipe.read()
        assert len(payers) >= 2, "for the ClientHello, and for what ends the handshake"
        assert set(payers) == {payer}
    await asyncio.wait_for(serving, 5)


class Told(BaseHandler):
    def __init__(self) -> None:
        self.goaway: Goaway | None = None

    def goaway_received(self, session: MuxSession, goaway: Goaway) -> None:
        self.goaway = goaway


async def agent_comes(
    relay: Station,
    cluster: str,
    instance: str = "i1",
    *,
    pin: str = "",
    cluster_ca: str = "",
    announced: CaSuccession | None = None,
) -> tuple[MuxSession, Told]:
    """A control connection whose certificate states `pin` and whose HELLO carries `cluster_ca`; it announces these CAs
    and reports, as an agent does."""
    told = Told()
    session = MuxSession(Side.INITIATOR, Kind.CONTROL, told, introduction=Introduction(instance, cluster_ca=cluster_ca))
    sock = await relay.dial()
    await asyncio.get_running_loop().create_connection(
        session.protocol, sock=sock, ssl=client_context(ALPN_CONTROL, cluster, pin), server_hostname=RELAY
    )
    with contextlib.suppress(ArcbridgeError):
        await session.wait_established()
        for record in filter(None, (announced, Status(instance=instance, ready=True))):
            session.send(record)
    return session, told


async def sent_away(relay: Station, cluster: str, instance: str = "i1", **brought: Any) -> Goaway:
    """Connect such an agent and return what it was told when its connection has ended."""
    session, told = await agent_comes(relay, cluster, instance, **brought)
    await asyncio.wait_for(session.wait_ended(), 5)
    assert told.goaway is not None
    return told.goaway


@pytest.mark.parametrize("revoked", [True, False])
async def test_revoked_or_unknown_clusters_are_told(tmp_path: Path, revoked: bool) -> None:
    async with station(tmp_path, *(["prod"] if revoked else [])) as relay:
        if revoked:
            await relay.registry.revoke_cluster("prod")
        assert (await sent_away(relay, "prod")).code == GoawayCode.REVOKED
        assert relay.counters.agents_refused == 1
        assert len(relay.control) == 0


@pytest.mark.parametrize("instance", ["", "x" * 129, "new\nline", "ünïcode"])
async def test_an_instance_id_is_printable_and_short(relay: Station, instance: str) -> None:
    assert (await sent_away(relay, "prod", instance)).code == GoawayCode.PROTOCOL
    assert relay.fleet.links() == []


async def test_without_a_certificate_there_is_no_control_connection(relay: Station) -> None:
    session, told = await agent_comes(relay, "")
    await asyncio.wait_for(session.wait_ended(), 5)
    assert told.goaway is None
    await until(lambda: relay.counters.rejected["handshake"])
    assert relay.admission.waiting == 0


class Listening(Agent):
    """An agent that keeps what it is told of users."""

    def __init__(self, relay: Station, cluster: str = "prod", instance: str = "i1") -> None:
        super().__init__(relay, cluster, instance)
        self.told: list[Revoke] = []

    def revoke_received(self, session: MuxSession, revoke: Revoke) -> None:
        self.told.append(revoke)

    async def hears(self, *expected: Revoke) -> None:
        """Wait until it was told exactly this since the last call."""
        await until(lambda: len(self.told) >= len(expected))
        assert self.told == list(expected)
        self.told.clear()


def users(**before: int) -> dict[str, UserRevocation]:
    return {user: UserRevocation(user, at, f"{user} left") for user, at in before.items()}


async def test_agents_are_told_which_users_are_revoked(relay: Station) -> None:
    """docs/protocol.md, "Revocations": nothing while it is not known, then all of it, then each change."""
    async with Listening(relay, instance="early") as early:
        relay.control.tell_users(None)
        relay.control.tell_users(users(alice=7, bob=8))
        await early.hears(Revoke("alice", 7, True, "alice left"), Revoke("bob", 8, False, "bob left"))
        known = users(alice=9, carol=10)
        relay.control.tell_users(known)
        await early.hears(
            Revoke("alice", 9, False, "alice left"), Revoke("carol", 10, False, "carol left"), Revoke("bob", 0)
        )
        # One that comes later hears what holds now.
        async with Listening(relay, instance="late") as late:
            await late.hears(Revoke("alice", 9, True, "alice left"), Revoke("carol", 10, False, "carol left"))
            relay.control.tell_users(known)
            relay.control.tell_users({})
            for agent in (early, late):
                await agent.hears(Revoke("alice", 0), Revoke("carol", 0))
        async with Listening(relay, instance="later") as later:
            await later.hears(Revoke(first=True))


async def test_a_relay_that_does_not_know_yet_says_nothing_to_an_agent_that_connects(relay: Station) -> None:
    """Else the agent would forget what it knew from an earlier connection."""
    async with Listening(relay) as agent:
        await agent.relay.settled()
        assert agent.told == []
        relay.control.tell_users({})
        await agent.hears(Revoke(first=True))


async def test_agents_of_a_cluster_are_to_end_a_user_s_sessions_and_nothing_is_left_behind(tmp_path: Path) -> None:
    """What they are told is taken back in the same breath, down to what is revoked besides."""
    lost = Lost("prod", "alice", "https://i#7", 99, "the policy")
    async with (
        station(tmp_path, "prod", "other") as relay,
        Listening(relay) as agent,
        Listening(relay, "other", "i2") as another,
    ):
        # Before the list is known, taking back would say too much.
        relay.control.end_sessions(lost)
        relay.control.tell_users(users(alice=7))
        await agent.hears(Revoke("alice", 7, True, "alice left"))
        relay.control.end_sessions(lost)
        await agent.hears(
            Revoke("alice", 99, reason="the policy"),
            Revoke("alice", 7, reason="alice left"),
            Revoke("https://i#7", 99, reason="the policy"),
            Revoke("https://i#7"),
        )
        relay.control.tell_users({})
        await another.hears(Revoke("alice", 7, True, "alice left"), Revoke("alice"))


async def test_one_session_is_ended_at_the_agents_of_its_cluster(tmp_path: Path) -> None:
    """A REVOKE of no user: an agent that does not know the field changes nothing by it."""
    lost = Lost("prod", "alice", "https://i#7", 0, "maintenance", "a" * 16)
    async with station(tmp_path, "prod", "other") as relay, Listening(relay) as agent:
        relay.control.tell_users({})
        relay.control.end_sessions(lost)
        await agent.hears(Revoke("", 0, True), Revoke(reason="maintenance", session="a" * 16))
        revocations = Revocations()
        assert revocations.hear("relay:443", Revoke(reason="maintenance", session="a" * 16))
        assert len(revocations) == 0


async def test_a_full_list_reaches_an_agent(relay: Station) -> None:
    """10 000 users with a reason each, in one go: no bound of the protocol ends the connection."""
    known = {f"user-{n}@example.com": UserRevocation(f"user-{n}@example.com", n + 1, "r" * 60) for n in range(10_000)}
    relay.control.tell_users(known)
    async with Listening(relay) as agent:
        await until(lambda: len(agent.told) >= len(known))
        assert {revoke.user: revoke.before for revoke in agent.told} == {
            user: entry.before for user, entry in known.items()
        }
        assert [revoke.first for revoke in agent.told[:3]] == [True, False, False]
        assert agent.ended is None


async def test_a_revoked_cluster_is_cut_and_others_stay(tmp_path: Path) -> None:
    async with station(tmp_path, "prod", "other") as relay, Agent(relay) as agent, Agent(relay, "other", "o") as other:
        relay.control.revoke(frozenset({"prod"}))
        assert (await agent.left()).code == GoawayCode.REVOKED
        await connected(relay, 1)
        assert not other.session.closed


async def test_draining_says_goodbye_with_a_schedule(relay: Station) -> None:
    async with Agent(relay) as agent:
        await relay.control.drain("this relay is going away")
        assert relay.fleet.links() == []
        await until(lambda: agent.goaway is not None)
        assert agent.goaway.code == GoawayCode.DRAINING
        assert agent.goaway.retry_after == 1
        # The agent may open its next connection before it leaves this one, but the relay dials it no more.
        assert not agent.session.closed
        assert (await refused(relay.fleet.dial("prod", Dial(token="t"), 1))).code == JoinCode.NO_AGENT
        assert (await sent_away(relay, "prod", "late")).code == GoawayCode.DRAINING
        relay.control.close()
        await asyncio.wait_for(agent.session.wait_ended(), 5)
        await connected(relay, 0)


async def test_statuses_late_twice_and_of_others_change_nothing(relay: Station) -> None:
    async def odd(agent: Agent, dial: Dial) -> None:
        agent.session.send(Status(token="never sent", code=1))
        agent.session.send(Status(ready=False, instance="i1"))
        agent.session.send(Status(token=dial.token))
        agent.session.send(Status(token=dial.token, code=1))

    async with Agent(relay, on_dial=odd):
        (link,) = relay.fleet.links()
        status = await asyncio.wait_for(link.dial(Dial(token="t1")), 5)
        assert status.code == 0
        assert (await asyncio.wait_for(link.dial(Dial(token="t2")), 5)).token == "t2"
        assert link.pending == 0


async def test_dials_in_flight_end_with_the_connection_and_are_bounded(relay: Station) -> None:
    async with Agent(relay, on_dial=swallow) as agent:
        (link,) = relay.fleet.links()
        dials = [asyncio.create_task(link.dial(Dial(token=f"t{n}"))) for n in range(64)]
        await until(lambda: len(agent.dials) >= 64)
        assert (await refused(link.dial(Dial(token="one more")))).code == JoinCode.OVERLOADED
        agent.session.abort()
        results = await asyncio.wait_for(asyncio.gather(*dials, return_exceptions=True), 5)
        assert {result.code for result in results if isinstance(result, JoinRefused)} == {JoinCode.NO_AGENT}
        assert len(results) == 64


# Adoption: several relays over one CA, each with a registry of its own.


@functools.cache
def cluster_ca(name: str = "cluster") -> Authority:
    return Authority.create(name)


async def test_an_unknown_cluster_is_adopted_and_serves(tmp_path: Path) -> None:
    ca = cluster_ca()
    async with station(tmp_path) as relay:
        session, _ = await agent_comes(relay, "prod", pin=ca.pin, cluster_ca=ca.certificate_pem)
        await connected(relay, 1)
        record = await known(relay.registry)
        assert relay.control.audit.records == 1
        assert (record.ca_pem, record.ca_pin) == (ca.certificate_pem, ca.pin)
        assert record.certificate_expires > record.created
        assert relay.counters.clusters_adopted == 1
        (link,) = relay.control._open
        assert link.session is not None
        assert link.session.peer_hello is not None
        assert (link.session.peer_hello.agent, link.session.peer_hello.cluster_ca) == (link.instance, ""), (
            "it is in the registry, and would stay here for as long as the agent"
        )
        assert isinstance(transport := link.session.transport, BoundedTlsTransport)
        assert transport.payer is None, "its address has paid for the handshake alone"
        session.abort()
        await connected(relay, 0)
        # From now on it is known: its agents need not bring the CA, and the next one adopts nothing.
        async with Agent(relay):
            near, reply = await relay.join()
            near.close()
            assert reply.cluster_ca == ca.certificate_pem
        assert relay.counters.clusters_adopted == 1


@pytest.mark.parametrize(
    ("pin", "sent", "words"),
    [
        ("", "one", "not enrolled here: enrol with"),
        ("one", "", "does not send its CA: upgrade the agent"),
        ("one", "two", "another CA than its certificate states"),
        ("one", "one two", "not exactly one CA certificate"),
        ("one", "leaf", "not exactly one CA certificate"),
        ("one", "nonsense", "not exactly one CA certificate"),
    ],
)
async def test_what_does_not_prove_a_cluster_is_refused(tmp_path: Path, pin: str, sent: str, words: str) -> None:
    one, two = cluster_ca("one"), cluster_ca("two")
    pem = {
        "": "",
        "one": one.certificate_pem,
        "two": two.certificate_pem,
        "one two": one.certificate_pem + two.certificate_pem,
        "leaf": agent_certificate("prod")[0],
        "nonsense": "-----BEGIN",
    }[sent]
    async with station(tmp_path) as relay:
        told = await sent_away(relay, "prod", pin=one.pin if pin else "", cluster_ca=pem)
        assert told.code == GoawayCode.REVOKED
        assert words in told.message
        assert await relay.registry.clusters() == []
        assert relay.counters.clusters_adopted == 0
        assert len(relay.control) == 0


@pytest.mark.parametrize(
    ("known", "revoked", "words"),
    [
        (True, True, "revoked: the relay's operator"),
        (True, False, "another cluster CA at this relay"),
        (False, True, "revoked: the relay's operator"),
    ],
)
async def test_a_known_or_revoked_cluster_is_not_adopted(
    tmp_path: Path, known: bool, revoked: bool, words: str
) -> None:
    """docs/threats.md#E12. `station` enrols the cluster with the relay's own CA as the cluster's."""
    async with station(tmp_path, *["prod"][: int(known)]) as relay:
        if revoked:
            assert await relay.registry.revoke_cluster("prod") is known
        before = await relay.registry.cluster("prod")
        told = await sent_away(relay, "prod", pin=cluster_ca().pin, cluster_ca=cluster_ca().certificate_pem)
        assert told.code == GoawayCode.REVOKED
        assert words in told.message
        assert await relay.registry.cluster("prod") == before
        assert relay.counters.clusters_adopted == 0


async def test_an_adoption_is_recorded_whatever_comes_behind_it(
    monkeypatch: pytest.MonkeyPatch, relay: Station
) -> None:
    ca, noted = Authority.create("cluster"), []
    unavailable = mock.AsyncMock(side_effect=RegistryUnavailable("NATS does not answer"))
    monkeypatch.setattr(relay.registry, "certificate_issued", unavailable)
    monkeypatch.setattr(relay.control.audit, "note", lambda act, *_: noted.append(act))
    told = await sent_away(relay, "berlin", pin=ca.pin, cluster_ca=ca.certificate_pem)
    assert told.code == GoawayCode.UNAVAILABLE
    assert noted == ["cluster adopt"]


async def test_of_two_clusters_with_one_name_the_first_is_adopted(tmp_path: Path) -> None:
    one, two = cluster_ca("one"), cluster_ca("two")
    async with station(tmp_path) as relay:
        session, _ = await agent_comes(relay, "prod", pin=one.pin, cluster_ca=one.certificate_pem)
        await connected(relay, 1)
        told = await sent_away(relay, "prod", "i2", pin=two.pin, cluster_ca=two.certificate_pem)
        assert one.pin in told.message
        assert two.pin in told.message
        session.abort()


@pytest.mark.parametrize("missed", ["activate", "retire"])
async def test_a_relay_that_was_away_follows_a_cluster_s_ca_before_it_judges_the_certificate(
    tmp_path: Path, missed: str
) -> None:
    """Another relay over the same CA has renewed the certificate; docs/threats.md#E14: what the known CA has not signed
    opens nothing, and a successor that is known does not give the name back to the one before."""
    ca = cluster_ca()
    states = [Rotation(ca.certificate_pem, ca.key_pem)]
    for step in ("next", "activate", "retire"):
        states.append(states[-1].take(step, time.time()))
    state = states[3]
    other = Rotation(cluster_ca("other").certificate_pem, cluster_ca("other").key_pem).take("next", time.time())
    forged = state.list.text.replace(state.list.cas[0], other.list.cas[0])
    async with station(tmp_path) as relay:
        await relay.registry.adopt("prod", ca.certificate_pem, time.time())
        if missed == "retire":
            session, _ = await agent_comes(
                relay, "prod", pin=ca.pin, announced=CaSuccession(states[2].succession, states[2].oldest)
            )
            await until_bound(relay, states[2].list.pins, ca.pin)
            session.abort()
            await connected(relay, 0)
        else:
            for text in ("", other.list.text, forged, "x"):
                told = await sent_away(
                    relay, "prod", pin=state.list.pins[1], announced=CaSuccession(text, state.certificate)
                )
                assert "another cluster CA at this relay" in told.message
            assert (await known(relay.registry)).ca_pin == ca.pin
        session, _ = await agent_comes(
            relay, "prod", pin=state.list.pins[1], announced=CaSuccession(state.succession, state.oldest)
        )
        await connected(relay, 1)
        await until_bound(relay, state.list.pins, state.list.pins[1])
        session.abort()


async def test_e14_a_name_that_is_bound_to_a_successor_is_not_given_back(tmp_path: Path) -> None:
    """A former CA can certify any key, also one that has not agreed."""
    ca = cluster_ca()
    state = Rotation(ca.certificate_pem, ca.key_pem).take("next", time.time()).take("activate", time.time())
    async with station(tmp_path) as relay:
        await relay.registry.adopt("prod", state.certificate, time.time())
        told = await sent_away(relay, "prod", pin=ca.pin, announced=CaSuccession(state.succession, state.oldest))
        assert "another cluster CA at this relay" in told.message


async def until_bound(relay: Station, pins: tuple[str, ...], pin: str) -> None:
    async with asyncio.timeout(10):
        while (record := await known(relay.registry)).succession.pins != pins or record.ca_pin != pin:
            await asyncio.sleep(0.02)


# Certificates, instances, pace.


async def test_a_connection_ends_some_time_after_its_certificate(relay: Station) -> None:
    async with Agent(relay) as agent:
        expiry = agent_expiry(ssl.PEM_cert_to_DER_cert(agent_certificate("prod")[0]))
        relay.control.expire(expiry + LAPSED_MARGIN - 1)
        assert not agent.session.closed
        relay.control.expire(expiry + 2 * LAPSED_MARGIN)
        assert (await agent.left()).code == GoawayCode.EXPIRED
        await connected(relay, 0)


async def test_instances_that_replace_each_other_are_slowed_down(tmp_path: Path) -> None:
    """docs/threats.md#E10: the newer wins, the third has to wait; both are told when to come back."""
    async with station(tmp_path, "prod") as relay, Agent(relay) as one, Agent(relay) as two:
        left = await one.left()
        assert (left.code, left.retry_after) == (GoawayCode.REPLACED, int(SETTLE))
        await connected(relay, 1)
        told = await sent_away(relay, "prod")
        assert told.code == GoawayCode.REPLACED
        assert 0 < told.retry_after <= SETTLE + 1
        assert (relay.counters.agents_replaced, relay.counters.agents_flapping) == (1, 1)
        assert not two.session.closed
    # Once the connection is gone there is no agent to replace, however soon the next one comes.
    async with station(tmp_path / "again", "prod") as relay:
        async with Agent(relay), Agent(relay):
            pass
        await connected(relay, 0)
        async with Agent(relay):
            assert relay.counters.agents_flapping == 0


async def test_strangers_without_a_certificate_do_not_take_the_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/threats.md#L1: a flood of control connections without a certificate uses up the handshakes that there are.
    An agent from elsewhere has its turn at once all the same."""
    monkeypatch.setattr(control_module, "BURST", 30)
    async with station(tmp_path, "prod", limits=RelayLimitsConfig(agents_per_second=2)) as relay:

        async def stranger(source: str) -> None:
            with socket.socket() as sock:
                sock.setblocking(False)
                sock.bind((source, 0))
                try:
                    await asyncio.get_running_loop().sock_connect(sock, (relay.address.host, relay.address.port))
                    pipe = TlsPipe(sock, client_context(ALPN_CONTROL), server_hostname=RELAY)
                    await pipe.handshake()
                    while await pipe.read():
                        pass
                except (OSError, EOFError):
                    pass

        for _ in range(8):
            await asyncio.gather(*(stranger("127.0.7.1") for _ in range(10)))
        assert relay.counters.rejected["handshake"] >= 20
        paced = relay.counters.agents_paced
        flood = asyncio.gather(*(stranger("127.0.7.1") for _ in range(20)))
        async with asyncio.timeout(10):
            while relay.counters.agents_paced < paced + 10:
                await asyncio.sleep(0)
            async with Agent(relay):
                pass
        await flood
        assert relay.control.waiting == 0


async def test_a_herd_is_let_in_at_a_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All come at once from one address, and again when they are told to or turned away: all are in at the end."""
    monkeypatch.setattr(control_module, "BURST", 5)
    monkeypatch.setattr(control_module, "LONGEST_WAIT", 0.2)
    told: list[Goaway] = []
    hints: list[tuple[float, int]] = []

    async def comes(relay: Station, number: int) -> MuxSession:
        backoff = Backoff(first=0.1, cap=0.5)
        hint = None
        while True:
            delay = backoff.next_delay(hint=hint)
            if hint is not None:
                hints.append((delay, hint))
            await asyncio.sleep(delay)
            hint = None
            try:
                session, heard = await agent_comes(relay, "prod", f"i{number}")
                await session.wait_established()
                await until(
                    lambda session=session, name=f"i{number}": (
                        session.closed or any(link.instance == name for link in relay.fleet.links())
                    )
                )
            except (OSError, ArcbridgeError):
                continue
            if not session.closed:
                return session
            await session.wait_ended()
            if heard.goaway is not None:
                told.append(heard.goaway)
                hint = heard.goaway.retry_after

    limits = RelayLimitsConfig(unauthenticated_per_address=1000, agents_per_second=50)
    async with station(tmp_path, "prod", limits=limits) as relay:
        begun = time.monotonic()

        def clock() -> float:
            # It stands still until the first one is turned away: a slow machine sends no herd in two seconds.
            return time.monotonic() if relay.counters.agents_paced else begun

        monkeypatch.setattr(relay.control, "clock", clock)
        async with asyncio.timeout(60):
            sessions = await asyncio.gather(*(comes(relay, number) for number in range(100)))
        await connected(relay, 100)
        assert relay.counters.agents_refused == 0
        assert relay.counters.agents_paced > 0
        assert relay.control.waiting == 0
        assert relay.admission.waiting == 0
        assert {goaway.code for goaway in told} == {GoawayCode.LIMIT}
        assert all(goaway.retry_after >= 1 for goaway in told)
        assert all(delay >= hint for delay, hint in hints)
        assert len(hints) == len(told)
        for session in sessions:
            session.abort()
        await connected(relay, 0)


async def test_a_relay_that_holds_all_the_agents_it_may_sends_the_next_one_away(tmp_path: Path) -> None:
    async with station(tmp_path, "prod", limits=RelayLimitsConfig(agents=2)) as relay:
        first, _ = await agent_comes(relay, "prod", "i1")
        second, _ = await agent_comes(relay, "prod", "i2")
        await connected(relay, 2)
        third, heard = await agent_comes(relay, "prod", "i3")
        async with asyncio.timeout(5):
            await third.wait_ended()
        assert heard.goaway.code == GoawayCode.LIMIT
        assert heard.goaway.retry_after == FULL_RETRY
        assert relay.counters.agents_refused == 1
        # An agent that comes again while the relay does not know yet that its connection is dead takes its own place.
        again, _ = await agent_comes(relay, "prod", "i2")
        async with asyncio.timeout(5):
            await again.wait_established()
            await second.wait_ended()
        assert not first.closed
        await connected(relay, 2)
        for session in (first, again):
            session.abort()
        await connected(relay, 0)


async def test_an_agent_that_leaves_during_its_admission_replaces_none(
    monkeypatch: pytest.MonkeyPatch, relay: Station
) -> None:
    first, _ = await agent_comes(relay, "prod")
    await connected(relay, 1)
    take = relay.control._take_what_returns

    async def left(link: Any, session: MuxSession, ticket: Ticket) -> bool:
        await session.wait_ended()
        return await take(link, session, ticket)

    monkeypatch.setattr(relay.control, "_take_what_returns", left)
    second, _ = await agent_comes(relay, "prod")
    second.abort()
    await relay.settled()
    assert (relay.counters.agents_total, relay.counters.agents_replaced) == (1, 0)
    assert not first.closed
    first.abort()
    await connected(relay, 0)


async def test_a_damaged_registry_is_an_answer_too(monkeypatch: pytest.MonkeyPatch, relay: Station) -> None:
    async def damaged(name: str) -> None:
        raise StateError("registry.db is damaged or not a registry: restore it from a backup")

    async with Agent(relay, instance="i2") as agent:
        monkeypatch.setattr(relay.registry, "cluster", damaged)
        assert (await refused(agent.join("guess"))).code == JoinCode.INTERNAL
        assert (await sent_away(relay, "prod")).code == GoawayCode.UNAVAILABLE
        assert relay.counters.rejected["failed"] == 0


async def test_the_fleet_hears_at_once_that_an_agent_drains(monkeypatch: pytest.MonkeyPatch, relay: Station) -> None:
    heard: list[bool] = []
    monkeypatch.setattr(relay.fleet, "reported", lambda link: heard.append(link.draining))
    async with Agent(relay) as agent:
        agent.session.goaway(GoawayCode.DRAINING, "the agent is stopping", 0)
        await until(lambda: heard == [True])


async def test_j30_a_cluster_with_every_place_gives_way_to_another(tmp_path: Path) -> None:
    async with station(tmp_path, "evil", "honest", limits=RelayLimitsConfig(agents=3)) as relay:
        held = [await agent_comes(relay, "evil", f"i{number}") for number in range(3)]
        await connected(relay, 3)
        honest, _ = await agent_comes(relay, "honest")
        async with asyncio.timeout(5):
            await honest.wait_established()
            while len([link for link in relay.fleet.links() if link.cluster == "honest"]) != 1:
                await asyncio.sleep(0.005)
            while not (heard := [told.goaway for _, told in held if told.goaway is not None]):
                await asyncio.sleep(0.005)
        assert [(goaway.code, goaway.retry_after) for goaway in heard] == [(GoawayCode.LIMIT, FULL_RETRY)]
        await connected(relay, 3)
        # The one that left takes no place of the cluster that has fewer.
        assert (await sent_away(relay, "evil", "i9")).code == GoawayCode.LIMIT
        assert not honest.closed
        for session in (honest, *(session for session, _ in held)):
            session.abort()
        await connected(relay, 0)


async def test_who_leaves_while_it_waits_costs_no_handshake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "BURST", 1)
    async with station(tmp_path, "prod", limits=RelayLimitsConfig(agents_per_second=2)) as relay:
        # No turn comes back while the first agent registers: the second connection waits, however long that takes.
        monkeypatch.setattr(relay.control, "clock", lambda: 1000.0)
        async with Agent(relay):
            sock = await relay.dial()
            with sock:
                await send_all(sock, client_hello([ALPN_CONTROL]))
                await until(lambda: relay.control.waiting)
            await until(lambda: not relay.control.waiting and len(relay.listener._tasks) <= 1)
            assert relay.counters.rejected["handshake"] == 0

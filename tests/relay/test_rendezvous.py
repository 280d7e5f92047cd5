"""The rendezvous with real ends: what pairs, and docs/threats.md#J1 to #J7, #J22 in short form."""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from arcbridge.errors import ArcbridgeError, ConnectionLost, JoinRefused, StateError, Unreachable
from arcbridge.identity.claims import Identity
from arcbridge.identity.proof import ProofChecker, ProofKey, ProofPolicy, binding, spki_of
from arcbridge.identity.refusal import GroupsUnavailable, TokenRefused
from arcbridge.loop_shares import LoopTime
from arcbridge.net import join as join_module
from arcbridge.net.join import JoinCode, client_join
from arcbridge.net.sockets import receive, reset, send_all
from arcbridge.net.tls import ALPN_JOIN
from arcbridge.refusals import NO_REFUSAL, Refusal, RefusalRule
from arcbridge.relay import rendezvous
from arcbridge.relay.access import Loss
from arcbridge.relay.admission import Ticket
from arcbridge.relay.registry.base import UserRevocation
from arcbridge.relay.session_slots import SessionSlots
from arcbridge.settings.config import RelayLimitsConfig
from arcbridge.wire.records import Dial, JoinReply, JoinRequest, Status
from tests.net.ends import RELAY, authority, client_context
from tests.relay.station import Agent, Station, asking, consent_and_join, exactly, refuse, refused, station, swallow
from tests.relay.test_session_slots import person
from tests.support.eventually import until


async def first_socket(agent: Agent) -> socket.socket:
    await until(lambda: agent.sockets)
    return agent.sockets[0]


async def test_a_client_and_its_agent_become_one_pump(relay: Station) -> None:
    async with Agent(relay) as agent:
        client, reply = await relay.join()
        with client:
            assert reply.code == 0
            assert len(reply.join_id) == 16
            assert reply.cluster_ca.strip() == authority().certificate_pem.strip()
            assert reply.subject == "alice"
            dial = agent.dials[0]
            assert (dial.address, dial.cluster, dial.join_id) == ("relay.test:443", "prod", reply.join_id)
            assert len(dial.token) >= 22
            await send_all(client, b"client hello")
            far = await first_socket(agent)
            assert await exactly(far, 12) == b"client hello"
            await send_all(far, b"server hello")
            assert await exactly(client, 12) == b"server hello"
            await relay.settled()
            assert relay.counters.joins["ok"] == 1
            assert sum(relay.counters.join_seconds.counts) == 1
            client.shutdown(socket.SHUT_WR)
            assert await receive(far, 1) == b""
            far.shutdown(socket.SHUT_WR)
            assert await receive(client, 1) == b""
        assert [pump.error for pump in relay.ended] == [None]
        assert relay.pumps.bytes() == (12, 12)


@pytest.mark.parametrize(("said", "noted"), [("a" * 16, "a" * 16), ("", ""), ("x" * 65, ""), ("a b", ""), ("a\nb", "")])
async def test_the_first_session_is_for_logs_alone(relay: Station, said: str, noted: str) -> None:
    """docs/threats.md#K4: what the client says is noted, if it looks like an id, and nothing is decided by it."""
    async with Agent(relay, instance="i1"):
        with capture_logs() as lines:
            near, reply = await relay.join(instance="i1", first_session=said)
            await until(lambda: any(line["event"] == "joined" for line in lines))
        near.close()
        (joined,) = (line for line in lines if line["event"] == "joined")
        assert joined.get("first_session", "") == noted
        assert joined["session"] == reply.join_id


@pytest.mark.parametrize(("said", "passed_on"), [(12_000, 12_000), (0, 0), (10_000_000, 0), (2**63, 0)])
async def test_j33_the_client_learns_how_far_the_agent_is(relay: Station, said: int, passed_on: int) -> None:
    async with Agent(relay) as agent:
        agent.round_trip = said
        client, reply = await relay.join()
        with client:
            assert reply.agent_round_trip == passed_on
            await until(lambda: len(relay.pumps) == 1)
            (pump,) = relay.pumps
            assert 0 < pump.round_trip < 1, "as both sockets show it"


async def test_of_what_a_session_gave_up_the_known_kinds_are_noted(relay: Station) -> None:
    """docs/threats.md#K4: a client says it, for operators to read; it decides nothing."""
    async with Agent(relay):
        near, _ = await relay.join(restricted="read-only namespaces=secret-name \x1b[31m" + " until" * 1000)
        await until(lambda: len(relay.pumps) == 1)
        assert [pump.restricted for pump in relay.pumps] == ["read-only until"]
        near.close()


async def test_joins_are_counted_by_whether_the_client_keeps_the_newest_ca(relay: Station) -> None:
    newest = [""]
    async with Agent(relay):
        relay.clients.relay_cas = lambda: ("", newest[0])
        for newest[0], relay_ca in (("", "x"), ("next", ""), ("next", "present"), ("next", "next")):
            (await relay.join(relay_ca=relay_ca))[0].close()
        assert relay.counters.joins_newest_ca == {"yes": 1, "no": 2}, "none before the first rotation"


async def refused_and_logged(relay: Station, cluster: str = "prod") -> tuple[JoinRefused, MutableMapping[str, Any]]:
    """Return the refusal of alice's join, and what the log says of it."""
    with capture_logs() as lines:
        error = await refused(relay.join("alice", cluster))
    (failed,) = (line for line in lines if line["event"] == "join failed")
    assert (failed["cluster"], error.session) == (cluster, failed["session"])
    return error, failed


async def test_a_cluster_that_the_policy_does_not_allow_is_named_in_the_log(relay: Station) -> None:
    relay.policy.allowed.clear()
    _, failed = await refused_and_logged(relay, "munich")
    assert failed["code"] == "FORBIDDEN"


@pytest.mark.parametrize(
    ("raised", "rule", "logged", "words", "retry_after"),
    [
        (TokenRefused("token.aud", "not for this place", wanted="relay", detail='for "x"'), "token.aud", 'for "x"',
         "not for this place; log in again", None),
        # No fault of the issuer's keys, and the files of the operator are for the log alone.
        (GroupsUnavailable("Graph is away", detail="/etc/secret does not exist"), "groups.unavailable",
         "/etc/secret does not exist", "Graph is away; try again shortly", 5),
        (Unreachable("login.example does not answer"), "issuer.keys", "login.example does not answer",
         "the issuer does not answer; try again", 5),
    ],
)  # fmt: skip
async def test_the_client_gets_the_rule_and_the_log_the_cause(
    relay: Station, raised: ArcbridgeError, rule: str, logged: str, words: str, retry_after: int | None
) -> None:

    async def refuse(token: str) -> Identity:
        raise raised

    relay.checks.verifier.verify = refuse
    error, failed = await refused_and_logged(relay)
    assert error.refusal.rule == rule == failed["rule"]
    assert (words in error.message, logged in error.message) == (True, False)
    assert error.retry_after == retry_after
    assert logged in (failed.get("detail"), failed["reason"])


async def test_bytes_in_one_segment_with_close_notify_reach_the_agent(relay: Station) -> None:
    """docs/threats.md#J5 through the whole relay: close_notify and a large ClientHello as one string, cut in two."""
    hello = secrets.token_bytes(9000)
    async with Agent(relay) as agent:
        for cut in (1, 5, 23, 24, 25, 40, 4000):
            agent.sockets.clear()
            near = await relay.dial()
            with near:
                pipe = await asking(near)
                while await pipe.read():
                    pass
                pipe.feed_close_notify()
                data = pipe._outgoing.read() + hello
                await send_all(near, data[:cut])
                await asyncio.sleep(0.01)
                await send_all(near, data[cut:])
                assert await exactly(await first_socket(agent), len(hello)) == hello


async def test_before_it_is_known_who_is_revoked_every_client_is_told_to_try_again(relay: Station) -> None:
    async with Agent(relay):
        relay.access.users = None
        error = await refused(relay.join("alice"), "registry does not answer; try again")
        assert (error.code, error.retry_after) == (JoinCode.INTERNAL, 5)
        relay.access.learn_users({})
        (await relay.join("alice"))[0].close()


@pytest.mark.parametrize(
    ("user", "cluster"),
    [("carol", "prod"), ("alice", "unknown"), ("carol", "unknown"), ("alice", "PROD"), ("alice", "x" * 60_000),
     ("alice", "a..b"), ("alice", "*"), ("alice", "")],
)  # fmt: skip
async def test_unknown_and_forbidden_are_one_answer(relay: Station, user: str, cluster: str) -> None:
    """docs/threats.md#J22."""
    async with Agent(relay) as agent:
        error = await refused(relay.join(user, cluster))
        assert error.code == JoinCode.FORBIDDEN
        assert error.message.startswith("there is no such cluster, or you may not reach it")
        assert agent.dials == []


async def test_refusals_before_an_agent_is_asked(tmp_path: Path) -> None:
    async with station(tmp_path, "prod", "other") as relay:
        assert (await refused(relay.join("bad"), "expired; log in again")).code == JoinCode.UNAUTHENTICATED
        error = await refused(asyncio.wait_for(relay.join(), 5), "no agent of cluster prod is connected")
        assert error.code == JoinCode.NO_AGENT
        assert error.retry_after
        await relay.registry.revoke_cluster("prod")
        assert (await refused(relay.join())).code == JoinCode.FORBIDDEN
        relay.clients.draining = True
        assert (await refused(relay.join("alice", "other"))).code == JoinCode.DRAINING
        await relay.settled()
        assert relay.counters.joins["no_agent"] == relay.counters.joins["draining"] == 1


async def test_the_caps_on_joins_and_sessions(tmp_path: Path) -> None:
    limits = RelayLimitsConfig(pending_joins=1, sessions=1)
    async with station(tmp_path, "prod", limits=limits) as relay, Agent(relay, on_dial=swallow) as agent:
        first = asyncio.create_task(relay.join())
        await until(lambda: agent.dials)
        assert (await refused(relay.join(), "wait for their agents")).code == JoinCode.OVERLOADED
        await agent.join(agent.dials[0].token)
        client, _ = await first
        with client:
            assert (await refused(relay.join(), "all the sessions")).code == JoinCode.OVERLOADED


async def test_k11_what_is_about_the_relays_machine_is_for_its_log(
    monkeypatch: pytest.MonkeyPatch, relay: Station
) -> None:
    """docs/threats.md#K11: who reads the refusals of one cluster reads no path of the relay's machine. Why the policy
    refuses is theirs."""
    await refused(relay.join("mallory"))
    cause = StateError("cannot open /var/lib/arcbridge/registry.sqlite: disk I/O error")

    async def broken(name: str) -> None:
        raise cause

    monkeypatch.setattr(relay.registry, "cluster", broken)
    with capture_logs() as logs:
        error = await refused(relay.join("alice"))
        await relay.settled()
    assert error.code == JoinCode.INTERNAL
    policy, internal = relay.checks.refusals.rows(["*"])
    assert (internal["code"], internal["reason"]) == ("INTERNAL", error.message)
    assert policy["reason"] == "the policy does not allow it"
    assert [line["reason"] for line in logs if line["event"] == "join failed"] == [cause.message]


async def test_a_code_of_a_newer_relay_is_an_answer_too(monkeypatch: pytest.MonkeyPatch, relay: Station) -> None:
    async def newer(cluster: str, dial: Dial, timeout: float) -> None:
        raise JoinRefused(99, "in the words of a newer relay of the fleet")

    monkeypatch.setattr(relay.fleet, "dial", newer)
    assert (await refused(relay.join(), "in the words of a newer relay")).code == JoinCode.INTERNAL


async def test_a_dial_token_counts_once_and_for_its_cluster_only(tmp_path: Path) -> None:
    """docs/threats.md#J1: guessed, of another cluster, again during and after its join; its own join goes on."""
    async with (
        station(tmp_path, "prod", "other") as relay,
        Agent(relay, on_dial=swallow) as agent,
        Agent(relay, "other", "o1") as stranger,
    ):
        joining = asyncio.create_task(relay.join())
        await until(lambda: agent.dials)
        token = agent.dials[0].token
        for _ in range(10):
            assert (await refused(agent.join(secrets.token_urlsafe(16)))).code == JoinCode.GONE
        assert (await refused(stranger.join(token))).code == JoinCode.GONE
        assert not joining.done()
        far = await agent.join(token)
        near, _ = await joining
        with near:
            for other in (agent, stranger):
                assert (await refused(other.join(token))).code == JoinCode.GONE
            await send_all(near, b"still here")
            assert await exactly(far, 10) == b"still here"
        assert relay.counters.tokens_refused == 13


async def test_void_tokens_keep_no_agent_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#L5: agents show void tokens without end, as they do when clients join and leave. They are told to
    wait, and the agent whose client still waits is let in, as is that of another cluster behind the same address."""
    # No guess grows back while the machine makes the handshakes.
    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    async with (
        station(tmp_path, "prod", "other") as relay,
        Agent(relay, on_dial=swallow) as agent,
        Agent(relay, "other", "o1") as neighbour,
    ):
        told = []
        for _ in range(55):
            told.append(await refused(agent.join("guess")))
        assert told[0].code == JoinCode.GONE
        assert (told[-1].code, told[-1].retry_after is None) == (JoinCode.OVERLOADED, False)
        joining = asyncio.create_task(relay.join())
        await until(lambda: agent.dials)
        await agent.join(agent.dials[0].token)
        near, _ = await joining
        near.close()
        near, _ = await relay.join("alice", "other")
        near.close()
        assert len(neighbour.dials) == 1


async def test_joins_without_end_of_one_user(tmp_path: Path) -> None:
    """docs/threats.md#L3: alice joins thirty times without a pause, and her joins come to nothing. Bob joins, and a
    session of alice's comes back, as if she had not."""
    limits = RelayLimitsConfig(joins_per_minute_per_user=5, pending_joins=20, sessions=20)

    async def only_for_bob(agent: Agent, dial: Dial) -> None:
        if relay.clients.slots.pending_of.get("https://issuer.test#bob") or dial.instance:
            await consent_and_join(agent, dial)

    async with station(tmp_path, "prod", limits=limits) as relay, Agent(relay, on_dial=only_for_bob) as agent:
        # The time stands still: thirty handshakes may take a second, and what is left of the wait is told.
        relay.clients.slots = SessionSlots(limits, clock=lambda: 1000.0)
        flood = [asyncio.create_task(relay.join("alice")) for _ in range(30)]
        await until(lambda: relay.clients.slots.refused["user_joins"] >= 25 and len(agent.dials) >= 5)
        near, _ = await relay.join("bob")
        back, _ = await relay.join("alice", instance="i1")
        for sock in (near, back):
            sock.close()
        done = [task for task in flood if task.done()]
        assert len(done) == 25
        for task in done:
            error = task.exception()
            assert isinstance(error, JoinRefused)
            assert (error.code, error.retry_after) == (JoinCode.LIMIT, 12)
            assert "at most 5 in a minute" in error.message
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
    assert relay.counters.joins["limit"] == 25


async def test_a_join_is_charged_to_its_address_and_then_to_its_user(
    monkeypatch: pytest.MonkeyPatch, relay: Station
) -> None:
    """docs/threats.md#L45."""
    async with Agent(relay):
        alice, address = relay.pumps.payer_of(person("alice")), relay.admission.loop_times.of("127.0.0.1", 0.0)
        judged: list[LoopTime] = []
        verify, loss = relay.checks.verifier.verify, relay.access.loss

        async def verified(token: str) -> Identity:
            judged.append(address)
            assert alice.spent == 0.0
            return await verify(token)

        def lost(identity: Identity | None, cluster: str) -> Loss | None:
            judged.append(alice)
            until = time.monotonic() + 0.02
            while time.monotonic() < until:
                pass
            return loss(identity, cluster)

        monkeypatch.setattr(relay.checks.verifier, "verify", verified)
        monkeypatch.setattr(relay.access, "loss", lost)
        near, _ = await relay.join("alice")
        near.close()
        assert judged[:2] == [address, alice]
        assert address.spent > 0.0
        assert alice.spent >= 0.02 * judged.count(alice)
        assert alice.inner >= 0.02 * judged.count(alice), "its address does not count it as one that waits"


async def test_joins_of_a_user_who_takes_too_much_of_the_loop_wait_or_are_refused(relay: Station) -> None:
    """docs/threats.md#L45. Other users behind the same address come in meanwhile."""
    async with Agent(relay):
        alice = relay.pumps.payer_of(person("alice"))
        alice.held_until = time.monotonic() + 0.5
        waiting = asyncio.create_task(relay.join("alice"))
        bob, _ = await relay.join("bob")
        near, _ = await waiting
        assert time.monotonic() > alice.held_until
        alice.refused_until = time.monotonic() + 7.0
        error = await refused(relay.join("alice"), "more of this relay's time than one user may")
        assert error.code == JoinCode.LIMIT
        assert error.retry_after in (6, 7)
        for sock in (near, bob):
            sock.close()


@pytest.mark.parametrize("others", [False, True])
async def test_many_users_behind_one_address_all_come_back_at_once(
    monkeypatch: pytest.MonkeyPatch, others: bool, relay: Station
) -> None:
    """docs/threats.md#L49: after a restart of the relay. An address makes the loop late all the time and has nearly no
    share of it. Nobody is slowed down while no other address comes; else each connection waits once, a moment. None is
    refused or closed to make room."""
    async with Agent(relay):
        times = relay.admission.loop_times
        times.change(0.001, time.monotonic())
        held: list[float] = []
        wait = Ticket.held_for

        def held_for(ticket: Ticket) -> float:
            address = times.of(ticket.source, time.monotonic())
            # Waits of seconds would be as bounded, and the test would take as long.
            address.held_until = min(address.held_until, time.monotonic() + 0.2)
            held.append(wait(ticket))
            return held[-1]

        monkeypatch.setattr(Ticket, "held_for", held_for)
        monkeypatch.setattr(relay.policy, "allows", lambda identity, cluster: True)

        monkeypatch.setattr(LoopTime, "_is_late", lambda payer, now: True)

        async def keep_waiting() -> None:
            while others:
                times.of("192.0.2.9", 0.0).run(lambda: time.sleep(0.0001))
                await asyncio.sleep(0.001)

        waiting = asyncio.create_task(keep_waiting())
        joined = await asyncio.gather(*(relay.join(f"user{number}") for number in range(40)))
        waiting.cancel()
        assert (times.shares.over > 0.0) is others
        assert any(held) is others
        assert len(held) == 2 * len(joined), "each join's client and agent, once"
        assert not any(count for result, count in relay.counters.joins.items() if result != "ok")
        assert not any(relay.counters.rejected.values())
        assert not any(relay.admission.evicted().values())
        for sock, _ in joined:
            sock.close()


async def test_a_session_counts_for_its_user_until_it_ends(tmp_path: Path) -> None:
    limits = RelayLimitsConfig(sessions_per_user=2)
    async with station(tmp_path, "prod", limits=limits) as relay, Agent(relay) as agent:
        socks = [(await relay.join())[0] for _ in range(2)]
        assert (await refused(relay.join(), "you have 2 sessions")).code == JoinCode.LIMIT
        near, _ = await relay.join("bob")
        near.close()
        socks.pop().close()
        agent.sockets[1].close()
        await until(lambda: relay.clients.slots.sessions_of.get("https://issuer.test#alice") == 1)
        socks.append((await relay.join())[0])
        for sock in socks:
            sock.close()
        for sock in agent.sockets:
            sock.close()
        await until(lambda: not relay.clients.slots.sessions_of)


async def test_an_agents_join_needs_a_certificate_of_an_enrolled_cluster(relay: Station) -> None:
    for cluster, code in (("", JoinCode.UNAUTHENTICATED), ("never-enrolled", JoinCode.FORBIDDEN)):
        sock = await relay.dial()
        request = JoinRequest(role="agent", token="x")
        assert (await refused(client_join(sock, client_context(ALPN_JOIN, cluster), RELAY, request))).code == code
    sock = await relay.dial()
    error = await refused(client_join(sock, client_context(), RELAY, JoinRequest(role="relay")))
    assert error.code == JoinCode.BAD_REQUEST


async def test_of_two_agents_exactly_one_wins(relay: Station) -> None:
    """docs/threats.md#J2, 25 rounds."""

    async def twice(agent: Agent, dial: Dial) -> None:
        agent.session.send(Status(token=dial.token))
        results = await asyncio.gather(agent.join(dial.token), agent.join(dial.token), return_exceptions=True)
        outcomes.append(sorted(type(result).__name__ for result in results))

    outcomes: list[list[str]] = []
    async with Agent(relay, on_dial=twice) as agent:
        for round_ in range(25):
            agent.sockets.clear()
            near, _ = await relay.join()
            with near:
                await send_all(near, b"%8d" % round_)
                assert await exactly(await first_socket(agent), 8) == b"%8d" % round_
            # The loser has heard its answer before the next round begins.
            await until(lambda round_=round_: len(outcomes) > round_)
        assert outcomes == [["JoinRefused", "socket"]] * 25


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_left_voids_its_token_at_once(relay: Station, how: str) -> None:
    """docs/threats.md#J3."""
    async with Agent(relay, on_dial=swallow) as agent:
        near = await relay.dial()
        await asking(near)
        await until(lambda: agent.dials)
        near.close() if how == "close" else reset(near)
        await relay.settled()
        assert (await refused(agent.join(agent.dials[0].token))).code == JoinCode.GONE
        assert relay.counters.joins["gone"] == 1


@pytest.mark.parametrize("sealed", [True, False])
async def test_bytes_before_the_reply_refuse_the_join(relay: Station, sealed: bool) -> None:
    """docs/threats.md#J6. Where they end the TLS, nothing can be said any more."""
    async with Agent(relay, on_dial=swallow) as agent:
        with await relay.dial() as near:
            pipe = await asking(near)
            await until(lambda: agent.dials)
            if sealed:
                await pipe.write(b"GET / HTTP/1.1")
                answer = await pipe.read()
                assert JoinReply.decode(answer[4:]).code == JoinCode.BAD_REQUEST
            else:
                await send_all(near, b"\x16\x03\x01\x00\x05early")
                with pytest.raises(ConnectionResetError):
                    await pipe.read()
        await refused(agent.join(agent.dials[0].token))
        assert len(relay.pumps) == 0


async def test_an_agent_that_does_not_come(tmp_path: Path) -> None:
    """docs/threats.md#J4: it swallows the dial, it consents and stays away, it refuses; the failed step is named."""

    async def promise(agent: Agent, dial: Dial) -> None:
        agent.session.send(Status(token=dial.token))

    for on_dial, deadline, code, words in (
        (swallow, 0.3, JoinCode.AGENT_TIMEOUT, "did not answer the dial request|did not connect"),
        (promise, 0.3, JoinCode.AGENT_TIMEOUT, "did not connect within"),
        (refuse, 10.0, JoinCode.AGENT_REFUSED, "refused: I am full"),
    ):
        async with (
            station(tmp_path / words[:8].replace(" ", "-"), "prod", dial_deadline=deadline) as relay,
            Agent(relay, on_dial=on_dial),
        ):
            assert (await refused(relay.join(), words)).code == code


@pytest.mark.parametrize("who", ["client", "agent"])
async def test_close_notify_withheld_ends_both(monkeypatch: pytest.MonkeyPatch, who: str, relay: Station) -> None:
    """docs/threats.md#J7."""
    # For the end that does as it should, too.
    monkeypatch.setattr(join_module, "CLOSE_DEADLINE", 1.0)

    async def half(sock: socket.socket, cluster: str, request: JoinRequest) -> bytes:
        # ... and no close_notify.
        return await (await asking(sock, request, cluster)).read()

    async def withhold(agent: Agent, dial: Dial) -> None:
        agent.session.send(Status(token=dial.token))
        sock = await agent.relay.dial()
        agent.sockets.append(sock)
        await half(sock, "prod", JoinRequest(role="agent", token=dial.token))

    on_dial = withhold if who == "agent" else consent_and_join
    async with Agent(relay, on_dial=on_dial) as agent:
        if who == "agent":
            assert (await refused(relay.join(), "did not finish the join")).code == JoinCode.AGENT_REFUSED
        else:
            with await relay.dial() as near:
                await half(near, "", JoinRequest(role="client", cluster="prod", token="alice"))
                with pytest.raises(ConnectionResetError):
                    await receive(near, 10)
        far = await first_socket(agent)
        # The client reads what the relay had sent, and then sees the reset.
        with pytest.raises(ConnectionResetError):
            await exactly(far, 1 << 20)
        assert len(relay.pumps) == 0


async def test_the_whole_join_has_a_deadline(tmp_path: Path) -> None:
    limits = RelayLimitsConfig(join_deadline=0.2)
    async with station(tmp_path, "prod", limits=limits) as relay, Agent(relay, on_dial=swallow):
        assert (await refused(relay.join())).code == JoinCode.AGENT_TIMEOUT


async def test_a_stopping_relay_leaves_no_half_paired_socket(tmp_path: Path) -> None:
    relay = Station(tmp_path, RelayLimitsConfig(), 10.0, 5.0)
    await relay.open()
    await relay.enrol("prod")
    async with Agent(relay, on_dial=swallow) as agent:
        joining = asyncio.create_task(relay.join())
        await until(lambda: agent.dials)
        await relay.close()
        with pytest.raises(ConnectionLost):
            await joining
    assert relay.clients.pending == 0


# -- tokens that are bound to a key ------------------------------------------------------------------------------------

KEY = ProofKey.generate()


def proving(token: str = "alice", *, key: ProofKey = KEY, pin: str = "") -> Callable[[bytes], str]:
    return lambda shown: key.sign_proof(token, spki_of(shown), pin, time.time())


async def test_t30_a_bound_token_joins_with_its_proof_alone(relay: Station) -> None:
    async with Agent(relay) as agent:
        relay.bindings["alice"] = binding({"cnf": {"jkt": KEY.thumbprint}})
        recorded = KEY.sign_proof("alice", b"the key of another relay, which has seen it", "", time.time())
        with capture_logs() as logs:
            for prove, reason in (
                (None, "missing"),
                (proving(key=ProofKey.generate()), "key"),
                (lambda shown: recorded, "peer"),
                (proving(pin="sha256:" + "ab" * 32), "peer"),
                (proving("bob"), "ath"),
            ):
                error = await refused(relay.join(prove=prove))
                assert error.code == JoinCode.UNAUTHENTICATED
                assert error.refusal.rule.check == reason
        failed = [one for one in logs if one["event"] == "join failed"]
        assert {(one["user"], one["bound"]) for one in failed} == {("alice", "cnf.jkt")}
        assert agent.dials == [], "no agent is asked for a token that is not proved"
        client, reply = await relay.join(prove=proving())
        with client:
            assert reply.subject == "alice"
        client, _ = await relay.join("bob", prove=None)
        client.close()


async def test_t31_required_takes_no_bearer_tokens(relay: Station) -> None:
    async with Agent(relay):
        relay.checks.proofs = ProofChecker(ProofPolicy.REQUIRED, "the relay")
        error = await refused(relay.join())
        assert error.refusal.rule == "proof.unbound"
        assert "docs/security.md" in error.message


async def test_the_groups_that_came_are_told_to_the_log_and_to_their_user(relay: Station) -> None:
    """docs/threats.md#J22. Of the log those that the policy names, and of the user's no more than they have; of an
    unknown cluster the same."""
    relay.policy.allowed.clear()
    relay.groups["alice"] = ("platform", "secret-1", "secret-2")
    error, failed = await refused_and_logged(relay)
    assert error.refusal == Refusal(RefusalRule.POLICY_RULE, "", ("platform",), 2)
    assert (failed["groups"], failed["more_groups"], failed["rule"]) == (("platform",), 2, "policy.rule")
    assert "secret" not in repr(failed)
    unknown, _ = await refused_and_logged(relay, "munich")
    assert (unknown.refusal, unknown.message) == (error.refusal, error.message)
    relay.groups.clear()
    error, failed = await refused_and_logged(relay)
    assert error.refusal == Refusal(RefusalRule.POLICY_RULE, "groups")
    assert failed["detail"] == "the token has no claim 'groups', from which its groups are taken"
    (seen,) = relay.checks.recent.rows("alice")
    assert (seen["missing_claim"], seen["more"]) == ("groups", 0)


async def test_a_revoked_user_is_told_of_no_groups(relay: Station) -> None:
    relay.access.learn_users({"alice": UserRevocation("alice", 4_000_000_000, 0, "")})
    error, failed = await refused_and_logged(relay)
    assert error.refusal == NO_REFUSAL
    assert "groups" not in failed

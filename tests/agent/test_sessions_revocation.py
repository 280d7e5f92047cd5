"""How sessions end at the agent, or are told to move: revocation, greatest age, drain, what they may hold
(docs/threats.md#S7).
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from arcbridge.agent import agent_session
from arcbridge.agent import sessions as module
from arcbridge.agent.agent_session import AgentSession
from arcbridge.agent.authenticator import Authenticated, UnprovedToken
from arcbridge.agent.kube.caller import token_digest
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.resume import GONE
from arcbridge.errors import SessionEnded, Unreachable
from arcbridge.identity.proof import ProofRefused
from arcbridge.mux import memory
from arcbridge.refusals import RefusalRule
from arcbridge.settings.config import SessionConfig
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.limits import DEFAULT
from arcbridge.wire.records import Auth, AuthOk, Goaway, Revoke
from arcbridge.wire.session import State
from tests.support.eventually import until
from tests.support.stream_io import StreamIO

from .kube.bench import RecordedAudit
from .pair import (
    Clock,
    FakeAuthenticator,
    Held,
    asks_for,
    end_of,
    holding,
    joined,
    knock,
    make_sessions,
    renew,
    resume,
    used,
)

NOW = Revoke("alice", 1005, reason="left the company")
"""Revokes the token `t` of alice, which was issued at 1000, at 1005."""


NEW = {"session_id": b"", "resume_secret": b"", "epoch": 0}
"""What the HELLO of a new session says."""
SAID = (
    'access was revoked: the relay\'s operator says "left the company"; '
    "logins from before 1970-01-01T00:16:45Z count no more: log in again"
)


async def test_v11_a_revoked_user_s_streams_end_at_once_and_no_other_s() -> None:
    audit = RecordedAudit()
    async with holding(audit=audit) as held:
        held.judge.add("b", "bob")
        async with AsyncExitStack() as stack:
            bob, _ = await stack.enter_async_context(joined(held.sessions, "b", "b" * 16))
            other = await used(bob, b"before")
            held.sessions.revocations.hear("relay-2:443", NOW)
            ended = await end_of(held.client)
            assert (ended.code, ended.message) == (GoawayCode.REVOKED, SAID)
            with pytest.raises(SessionEnded):
                await held.io.read()
            await other.write(b"after")
            assert await other.read_exactly(5) == b"after"
            assert (len(held.sessions), held.sessions.counters.revoked, held.sessions.detached) == (1, 1, 0)
    (record,) = audit.lines()
    assert (record["user"], record["verb"], record["outcome"]) == ("alice", "session", "cut")
    assert record["reason"] == SAID


async def test_v11_a_detached_session_ends_too_and_is_not_resumed() -> None:
    audit = RecordedAudit()
    async with holding(audit=audit) as held:
        held.judge.add("newer", "alice", issued=1100.0)
        await held.cut()
        held.sessions.revocations.hear("relay-1:443", NOW)
        await held.until(lambda: len(held.sessions) == 0)
        for token in ("t", "newer"):
            answer = await knock(held.sessions, asks_for(held.client), token)
            assert answer == Goaway(code=GoawayCode.REVOKED, message=SAID, final=True), token
    found = audit.lines()
    assert [(one["verb"], one["outcome"]) for one in found] == [("session", "cut"), ("resume", "refused")]


@pytest.mark.parametrize("given", ["first", "second", "another"])
async def test_one_session_ends_by_either_of_its_join_ids(given: str) -> None:
    """A relay's operator ends a session: the one that began, or runs now, under that join id, and no other."""
    audit = RecordedAudit()
    async with holding(audit=audit) as held:
        await held.cut()
        await resume(held.sessions, held.client)
        await held.echo(b"resumed")
        session = held.old
        assert len(session.join_ids) == 2
        first, second = session._join_id, session.session.label if session.session is not None else ""
        held.sessions.end_one({"first": first, "second": second, "another": "x"}[given], "maintenance")
        if given == "another":
            assert len(held.sessions) == 1
            return
        ended = await end_of(held.client)
        assert (ended.code, ended.message) == (
            GoawayCode.REVOKED,
            "the relay's operator has ended this session: maintenance",
        )
        assert len(held.sessions.revocations) == 0, "nothing is revoked"
    assert [(one["verb"], one["outcome"], one["session"]) for one in audit.lines()] == [("session", "cut", first)]


async def test_sessions_are_gone_through_once_for_all_ids_that_a_relay_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """One read from a hostile relay brings 20 000 ids, and an agent may have 1000 sessions."""
    async with holding() as held:
        looked = 0
        ids = AgentSession.join_ids.fget

        def count(session: AgentSession) -> set[str]:
            nonlocal looked
            looked += 1
            assert ids is not None
            return set(ids(session))

        monkeypatch.setattr(AgentSession, "join_ids", property(count))
        for number in range(20_000):
            held.sessions.end_one(str(number), "")
        await held.echo(b"still here")
        assert looked == 1


async def test_v12_old_tokens_are_refused_and_new_ones_are_not() -> None:
    judge = FakeAuthenticator()
    for token, issued in (("old", 1000.0), ("says-nothing", 0.0), ("within-the-skew", 1014.0), ("new", 1015.0)):
        judge.add(token, "alice", issued=issued)
    sessions, proxy = make_sessions(judge, Clock())
    sessions.revocations.hear("relay-1:443", NOW)
    for token in ("old", "says-nothing", "within-the-skew"):
        async with joined(sessions, token, wait=False) as (client, _):
            client.open("kubernetes", StreamIO())
            ended = await end_of(client)
            assert (ended.code, ended.message) == (GoawayCode.REVOKED, SAID)
    assert proxy.callers == []
    assert (sessions.counters.refused, sessions.counters.revoked) == (3, 3)
    async with joined(sessions, "new") as (client, _):
        assert not client.closed
    sessions.revocations.hear("relay-1:443", Revoke("alice", 0))
    async with joined(sessions, "old") as (client, _):
        assert not client.closed


async def test_v12_a_user_revoked_while_the_token_is_judged_does_not_get_in() -> None:
    judge = FakeAuthenticator(t="alice")
    judge.hold = asyncio.Event()
    sessions, proxy = make_sessions(judge, Clock())
    async with joined(sessions, wait=False) as (client, _):
        client.open("kubernetes", StreamIO())
        await until(lambda: judge.asked)
        sessions.revocations.hear("relay-1:443", NOW)
        await asyncio.sleep(0.02)
        judge.hold.set()
        assert (await end_of(client)).code == GoawayCode.REVOKED
    assert proxy.callers == []


async def test_v12_an_old_token_that_is_sent_again_ends_nothing(held: Held) -> None:
    """After a resumption with a new token, a renewal from before the loss is repeated (docs/threats.md#S10)."""
    held.judge.add("new", "alice", "dev", issued=1100.0)
    await held.renew("new")
    held.sessions.revocations.hear("relay-1:443", NOW)
    held.client.authenticate(Auth(kind="oidc", token="t"))
    await held.until(lambda: len(held.handler.accepted) == 3)
    await held.echo(b"still")
    assert held.sessions.counters.revoked == 0


async def test_v13_a_revocation_taken_back_at_once_ends_what_runs_and_leaves_nothing(held: Held) -> None:
    held.sessions.revocations.hear("relay-1:443", NOW)
    held.sessions.revocations.hear("relay-1:443", Revoke("alice", 0))
    assert (await end_of(held.client)).code == GoawayCode.REVOKED
    async with joined(held.sessions) as (client, _):
        assert not client.closed


async def test_a_long_list_is_acted_on_once(monkeypatch: pytest.MonkeyPatch, held: Held) -> None:
    swept = []
    monkeypatch.setattr(held.old, "end_if_revoked", swept.append)
    for number in range(1000):
        held.sessions.revocations.hear("relay-1:443", Revoke(f"user-{number}", 1005))
    await held.until(lambda: swept)
    assert [len(news) for news in swept] == [1000]


async def test_v16_a_session_ends_at_its_greatest_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewals and resumptions add nothing to it, and a session that is away ends as well."""
    monkeypatch.setattr(agent_session, "CLOCK_CHECK", 0.01)
    for away in (False, True):
        async with holding(settings=SessionConfig(max_age=7200.0)) as held:
            held.judge.add("long", "alice", expires=100_000.0, issued=1001.0)
            await held.renew("long")
            await held.cut()
            await resume(held.sessions, held.client, "long")
            held.clock.now = 1000.0 + 7199.0
            await asyncio.sleep(0.05)
            await held.echo(b"still")
            if away:
                await held.cut()
            held.clock.now = 1000.0 + 7200.0
            await held.until(lambda held=held: len(held.sessions) == 0)
            if away:
                with pytest.raises(SessionEnded):
                    await resume(held.sessions, held.client, "long")
            ended = await end_of(held.client)
            assert ended.code == GoawayCode.EXPIRED
            assert ended.message.startswith("a session lasts 2 h here at most")
            assert "log in again" in ended.message
            assert held.sessions.counters.expired == 1


async def test_v16_a_clock_that_is_set_back_makes_no_session_younger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_session, "CLOCK_CHECK", 0.01)
    ticking = Clock(0.0)
    async with holding(settings=SessionConfig(max_age=60.0), monotonic=ticking) as held:
        held.clock.now = 500.0
        ticking.now = 59.0
        await asyncio.sleep(0.05)
        await held.echo(b"still")
        ticking.now = 60.0
        assert (await end_of(held.client)).message.startswith("a session lasts 1 min here at most")


async def test_revoked_while_it_is_away(held: Held) -> None:
    await held.cut()
    held.sessions.revoke("relay-2:443", "revoked")
    assert len(held.sessions) == 1, "it came through another relay"
    held.sessions.revoke("relay-1:443", "this cluster is revoked")
    await held.until(lambda: len(held.sessions) == 0)
    with pytest.raises(SessionEnded, match="this cluster is revoked") as caught:
        await resume(held.sessions, held.client)
    assert caught.value.code == GoawayCode.REVOKED


async def test_detached_for_too_long() -> None:
    async with holding(limits=replace(DEFAULT, detached_timeout=0.1)) as held:
        held.client.transport.abort()  # it may be over before anybody looks whether it was detached
        await held.until(lambda: held.client.state is State.DETACHED and len(held.sessions) == 0)
        with pytest.raises(SessionEnded) as caught:
            await resume(held.sessions, held.client)
        assert caught.value.code == GoawayCode.GONE
        assert caught.value.message != GONE, "the owner hears the reason"


async def test_without_resumption_a_session_ends_with_its_connection() -> None:
    async with holding(limits=replace(DEFAULT, replay=0)) as held:
        assert not held.client.resumption.possible
        assert len(held.sessions.resumes) == 0
        held.client.transport.abort()
        await held.until(lambda: len(held.sessions) == 0 and held.client.closed)


async def test_at_the_limit_sessions_come_back_and_no_new_ones_come(
    monkeypatch: pytest.MonkeyPatch, held: Held
) -> None:
    monkeypatch.setattr(module, "MAX_SESSIONS", 1)
    assert not held.sessions.accepts_connection()
    assert held.sessions.accepts_connection(may_come_back=True)
    await held.cut()
    assert (await knock(held.sessions, asks_for(held.client, **NEW))).code == GoawayCode.UNAVAILABLE
    await resume(held.sessions, held.client)
    await held.echo(b"after")
    assert (held.sessions.counters.opened, held.sessions.counters.refused, len(held.sessions)) == (1, 1, 1)


async def test_at_the_limit_a_detached_session_without_streams_makes_room(
    monkeypatch: pytest.MonkeyPatch, held: Held
) -> None:
    monkeypatch.setattr(module, "MAX_SESSIONS", 1)
    await held.finish()
    await held.cut()
    answer = await knock(held.sessions, asks_for(held.client, **NEW))
    assert isinstance(answer, AuthOk)
    with pytest.raises(SessionEnded, match="needed its place"):
        await resume(held.sessions, held.client)


async def test_s7_new_sessions_are_refused_when_memory_is_spent(monkeypatch: pytest.MonkeyPatch, held: Held) -> None:
    monkeypatch.setattr(memory.budget, "most", 0)
    assert not held.sessions.accepts_connection()
    await held.cut()
    await resume(held.sessions, held.client)
    await held.echo(b"after")


async def test_an_agent_that_stops_lets_a_detached_session_come_back_and_finish(held: Held) -> None:
    await held.cut()
    held.sessions.drain()
    assert len(held.sessions) == 1
    await resume(held.sessions, held.client)
    await held.echo(b"after")
    held.io.finish()
    assert await held.io.read() == b""
    await asyncio.wait_for(held.sessions.wait_empty(), 5)


async def test_an_agent_that_stops_does_not_wait_for_a_detached_session_without_streams(held: Held) -> None:
    await held.finish()
    await held.cut()
    held.sessions.drain()
    await asyncio.wait_for(held.sessions.wait_empty(), 5)


async def test_close_ends_detached_sessions(held: Held) -> None:
    await held.cut()
    await asyncio.wait_for(held.sessions.close(), 5)
    assert len(held.sessions) == 0
    with pytest.raises(SessionEnded, match="the agent has stopped") as caught:
        await resume(held.sessions, held.client)
    assert caught.value.code == GoawayCode.GONE


async def test_asked_to_move_are_those_that_came_through_that_relay_before(held: Held) -> None:
    now = time.monotonic()
    assert held.sessions.ask_to_move("relay-2:443", now) == 0
    assert held.sessions.ask_to_move("relay-1:443", now - 60) == 0
    assert held.sessions.ask_to_move("relay-1:443", now) == 1
    await asyncio.wait_for(held.handler.move.wait(), 5)
    await resume(held.sessions, held.client, via="relay-2:443")
    assert held.sessions.ask_to_move("relay-1:443", time.monotonic()) == 0
    await held.cut()
    assert held.sessions.ask_to_move("relay-2:443", time.monotonic()) == 0, "it has no connection"
    assert held.sessions.counters.moves_asked == 1


async def test_a_newcomer_that_leaves_while_it_is_judged_changes_nothing(held: Held) -> None:
    await held.cut()
    held.judge.hold = asyncio.Event()
    knocking = asyncio.ensure_future(knock(held.sessions, asks_for(held.client)))
    await held.until(lambda: len(held.judge.asked) == 2)
    knocking.cancel()
    await asyncio.gather(knocking, return_exceptions=True)
    await held.until(lambda: not held.sessions._unauthenticated)
    held.judge.hold.set()
    await resume(held.sessions, held.client)
    await held.echo(b"after")


async def test_the_callers_absence_is_known_to_what_has_deadlines_for_him(held: Held) -> None:
    caller = held.proxy.callers[0]
    assert caller.connected_since == 0
    await held.cut()
    assert caller.connected_since == math.inf
    await resume(held.sessions, held.client)
    assert 0 < caller.connected_since <= time.monotonic()


async def test_a18_only_a_token_of_the_same_user_is_taken() -> None:
    judge = FakeAuthenticator()
    judge.add("t", "robot", token_mode=True)
    judge.add("rotated", "robot", token_mode=True)
    judge.add("stranger", "other", token_mode=True)
    judge.add("renewed", "robot", token_mode=True)
    judge.known["away"] = Unreachable("the API server does not answer")
    sessions, proxy = make_sessions(judge, Clock())
    async with joined(sessions) as (client, handler):
        client.open("kubernetes", StreamIO())
        await until(lambda: proxy.callers)
        caller = proxy.callers[0]
        assert token_digest(b"t") in caller.tokens
        assert await caller.review_token("rotated")
        assert not await caller.review_token("stranger")
        assert not await caller.review_token("unknown")
        with pytest.raises(RequestRefusal) as caught:
            await caller.review_token("away")
        assert caught.value.status_code == 503
        await renew(client, handler, "renewed", "bearer")
        assert token_digest(b"renewed") in caller.tokens
        assert token_digest(b"t") in caller.tokens, "requests that are on their way may still carry it"
        assert token_digest(b"stranger") not in caller.tokens


async def test_t30_a_request_s_token_without_proof_is_recorded_with_its_owner() -> None:
    audit, judge = RecordedAudit(), FakeAuthenticator()
    judge.add("t", "robot", token_mode=True)
    judge.add("stolen", "other", token_mode=True)
    owner = judge.known["stolen"]
    assert isinstance(owner, Authenticated)
    judge.known["stolen"] = UnprovedToken(owner.identity, ProofRefused(RefusalRule.PROOF_KEY, "the agent"))
    sessions, proxy = make_sessions(judge, Clock(), audit=audit)
    async with joined(sessions) as (client, _):
        client.open("kubernetes", StreamIO())
        await until(lambda: proxy.callers)
        review = proxy.callers[0].review_token
        with pytest.raises(RequestRefusal) as caught:
            await review("stolen")
        assert (caught.value.status_code, caught.value.refusal.rule) == (401, "proof.key")
    (record,) = [one for one in audit.lines() if one.get("outcome") == "refused"]
    assert (record["user"], record["verb"]) == ("other", "authenticate")
    assert "bound to another key" in record["reason"]

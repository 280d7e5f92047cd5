"""A session in which a program acts for the user: whose it stays, what is recorded, and how many there may be
(docs/threats.md#S22)."""

from __future__ import annotations

import dataclasses

import pytest
from structlog.testing import capture_logs

from arcbridge.agent.accounts import Accounts, Limit
from arcbridge.agent.audit import AuditLog
from arcbridge.agent.authenticator import Authenticated
from arcbridge.agent.targets import TcpTargets, read_targets
from arcbridge.errors import SessionEnded
from arcbridge.settings.config import ActorLimitsConfig, AgentLimitsConfig, TargetConfig
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.records import Auth

from .kube.bench import RecordedAudit
from .pair import Clock, FakeAuthenticator, end_of, joined, make_sessions, opened, renew, reset_of, resume, used


def judge() -> FakeAuthenticator:
    """Tokens of alice: `t` and `t2` without an actor, `bot`, `bot2` and `other` with; `bob` is another user's."""
    made = FakeAuthenticator(t="alice", bot="alice", other="alice", bob="bob")
    made.add("t2", "alice", expires=3000.0)
    made.add("bot2", "alice", expires=3000.0)
    for token, actor in (("bot", "bot"), ("bot2", "bot"), ("other", "other"), ("bob", "bot")):
        found = made.known[token]
        assert isinstance(found, Authenticated)
        made.known[token] = dataclasses.replace(found, identity=dataclasses.replace(found.identity, actor=actor))
    return made


async def test_an_actor_stays_over_another_connection_and_a_newer_token() -> None:
    sessions, proxy = make_sessions(judge(), Clock())
    with capture_logs() as logs:
        async with joined(sessions, "bot") as (client, handler):
            await used(client)
            (caller,) = proxy.callers
            assert (caller.identity.actor, caller.actor and caller.actor.name) == ("bot", "bot")
            assert ',"actor":"bot"' in caller.subject.text
            client.transport.abort()
            await resume(sessions, client, "bot")
            await renew(client, handler, "bot2")
            await used(client)
            assert proxy.callers[-1] is caller
            assert caller.identity.actor == "bot"
    (line,) = [entry for entry in logs if entry["event"] == "session opened"]
    assert line["actor"] == "bot"


@pytest.mark.parametrize(("first", "then"), [("t", "bot2"), ("bot", "t2"), ("bot", "other")])
@pytest.mark.parametrize("way", ["resume", "renew"])
async def test_s22_no_session_goes_over_from_a_user_to_a_program_or_back(first: str, then: str, way: str) -> None:
    audit = RecordedAudit()
    sessions, _ = make_sessions(judge(), Clock(), audit=audit)
    async with joined(sessions, first) as (client, _):
        await used(client)
        if way == "resume":
            client.transport.abort()
            with pytest.raises(SessionEnded) as caught:
                await resume(sessions, client, then)
            ended = caught.value
            assert sessions.resumes.refused["actor"] == 1
            (record,) = await audit.wait(1)
            assert (record.verb, record.reason) == ("resume", "wrong actor")
        else:
            client.authenticate(Auth(kind="oidc", token=then))
            ended = await end_of(client)
        assert ended.code == GoawayCode.FORBIDDEN
        assert "through another actor" in ended.message


async def test_sessions_of_one_actor_are_counted_over_all_users() -> None:
    audit = RecordedAudit()
    accounts = Accounts(AgentLimitsConfig(actors={"bot": ActorLimitsConfig(sessions=1)}))
    sessions, _ = make_sessions(judge(), Clock(), audit=audit, accounts=accounts)
    async with joined(sessions, "bot") as (first, _):
        await used(first)
        async with joined(sessions, "bob", "k" * 16, alone=False) as (second, _):
            ended = await end_of(second)
        assert ended.code == GoawayCode.LIMIT
        assert ended.message.startswith("the program that acts for you has as many sessions at this agent")
        async with (
            joined(sessions, "other", "l" * 16, alone=False) as (third, _),
            joined(sessions, "t", "m" * 16, alone=False) as (own, _),
        ):
            await used(third)
            await used(own)
        assert accounts.refusals[Limit.ACTOR_SESSIONS] == 1
    assert not accounts.actors._present, "each session has left its account, also the one that was refused"
    async with joined(sessions, "bob") as (again, _):
        await used(again)


async def test_a_target_that_names_no_actor_is_for_users_alone() -> None:
    configs = {
        "db": TargetConfig("127.0.0.1:1", users=("alice",)),
        "cache": TargetConfig("127.0.0.1:1", users=("alice",), actors=("bot",)),
    }
    targets = TcpTargets(read_targets(configs), AuditLog(""))
    sessions, _ = make_sessions(judge(), Clock(), targets=targets)
    for token, listed in (("t", "kubernetes tcp:db"), ("bot", "kubernetes tcp:cache"), ("other", "kubernetes")):
        async with joined(sessions, token) as (client, handler):
            assert handler.accepted[0].targets == listed
            refused = opened(client, "tcp:cache" if token == "t" else "tcp:db")
            assert await reset_of(refused) == ResetCode.FORBIDDEN

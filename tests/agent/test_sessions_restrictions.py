"""A session that gave up rights: it has them neither after a resumption nor after a renewal (docs/threats.md#S21)."""

from __future__ import annotations

import asyncio
import json

import pytest
from structlog.testing import capture_logs

from arcbridge.agent.targets import TcpTargets, read_targets
from arcbridge.errors import SessionEnded
from arcbridge.refusals import RefusalRule
from arcbridge.settings.config import TargetConfig
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.records import RESTRICTIONS_FEATURE, Auth, Restrictions

from .kube.bench import RecordedAudit
from .pair import Clock, FakeAuthenticator, end_of, joined, make_sessions, opened, reset_of, resume, used

READ_ONLY = Restrictions(read_only=True)


def auth(restrictions: Restrictions = READ_ONLY, token: str = "t") -> Auth:
    return Auth(kind="restricted-oidc", token=token, restrictions=restrictions.encode())


def judge() -> FakeAuthenticator:
    made = FakeAuthenticator(t="alice", m="mallory")
    made.add("t2", "alice", expires=3000.0)
    return made


async def test_restrictions_hold_over_another_connection_and_a_newer_token() -> None:
    sessions, proxy = make_sessions(judge(), Clock())
    with capture_logs() as logs:
        async with joined(sessions, lambda _: auth()) as (client, handler):
            await used(client)
            (caller,) = proxy.callers
            assert (caller.restrictions.record, sessions.restricted) == (READ_ONLY, 1)
            assert RESTRICTIONS_FEATURE in client.peer_hello.features.split()
            client.transport.abort()
            await resume(sessions, client, lambda _: auth(token="t2"))
            client.authenticate(auth(token="t2"))
            async with asyncio.timeout(30):
                await handler.accepted_again.wait()
            await used(client)
            assert proxy.callers[-1] is caller
            assert caller.restrictions.record == READ_ONLY
    (line,) = [entry for entry in logs if entry["event"] == "session opened"]
    assert line["restricted"] == "read-only"


@pytest.mark.parametrize("other", [None, Restrictions(no_secrets=True), Restrictions(read_only=True, until=1500)])
@pytest.mark.parametrize("way", ["resume", "renew"])
async def test_s21_no_session_comes_back_with_other_restrictions(other: Restrictions | None, way: str) -> None:
    """With none, which is what an attacker who has the client's memory would send, or with fewer ones."""
    audit = RecordedAudit()
    sessions, _ = make_sessions(judge(), Clock(), audit=audit)
    asked = Auth(token="t") if other is None else auth(other)
    async with joined(sessions, lambda _: auth()) as (client, _):
        await used(client)
        if way == "resume":
            client.transport.abort()
            with pytest.raises(SessionEnded) as caught:
                await resume(sessions, client, lambda _: asked)
            ended = caught.value
            assert sessions.resumes.refused["restrictions"] == 1
            (record,) = await audit.wait(1)
            assert (record.verb, record.reason) == ("resume", "wrong restrictions")
        else:
            client.authenticate(asked)
            ended = await end_of(client)
            assert ended.refusal.rule is RefusalRule.RESTRICTED_UNKNOWN
        assert ended.code == GoawayCode.FORBIDDEN
        assert "other restrictions" in ended.message


async def test_an_unrestricted_session_takes_on_no_restrictions() -> None:
    sessions, _ = make_sessions(judge(), Clock())
    async with joined(sessions) as (client, _):
        client.authenticate(auth())
        assert (await end_of(client)).code == GoawayCode.FORBIDDEN


async def test_a_session_ends_at_its_time() -> None:
    clock = Clock()
    sessions, _ = make_sessions(judge(), clock)
    until = int(clock()) + 60
    async with joined(sessions, lambda _: auth(Restrictions(until=until))) as (client, handler):
        assert handler.accepted[-1].expires_in == 60
        stream = await used(client)
        clock.now += 61
        (session,) = sessions._open
        session._check_expiry()
        ended = await end_of(client)
        assert (ended.code, ended.refusal.rule) == (GoawayCode.EXPIRED, RefusalRule.RESTRICTED_UNTIL)
        with pytest.raises(SessionEnded):
            await stream.read()
    assert sessions.counters.expired == 1
    async with joined(sessions, lambda _: auth(Restrictions(until=until)), wait=False) as (client, _):
        assert (await end_of(client)).refusal.rule is RefusalRule.RESTRICTED_UNTIL, "nor does a new one begin"


@pytest.mark.parametrize(
    ("restrictions", "opens"),
    [(READ_ONLY, False), (Restrictions(namespaces="shop"), False), (Restrictions(until=1900), True)],
)
async def test_h44_a_restricted_session_opens_no_tcp_target(restrictions: Restrictions, opens: bool) -> None:
    """What goes through one cannot be told apart."""
    audit = RecordedAudit()
    targets = TcpTargets(read_targets({"db": TargetConfig("127.0.0.1:1", users=("alice",))}), audit)
    sessions, _ = make_sessions(judge(), Clock(), targets)
    async with joined(sessions, lambda _: auth(restrictions)) as (client, handler):
        assert ("tcp:db" in handler.accepted[-1].targets.split()) is opens
        code = await reset_of(opened(client, "tcp:db"))
        assert code == (ResetCode.CONNECT_FAILED if opens else ResetCode.FORBIDDEN)
        (record,) = await audit.wait(1)
        assert json.loads(record.line(record.started))["restricted"] == list(restrictions.words())
    await targets.close()

"""A session that goes on over another connection, and whose it is
(docs/threats.md#S3, docs/threats.md#S4, docs/threats.md#S5, docs/threats.md#S6, docs/threats.md#S8,
docs/threats.md#S10).
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest
from structlog.testing import capture_logs

from arcbridge.agent import agent_session
from arcbridge.agent.resume import GONE
from arcbridge.errors import SessionEnded
from arcbridge.wire.frames import VERSION, GoawayCode
from arcbridge.wire.limits import DEFAULT
from arcbridge.wire.records import Auth, AuthOk, Goaway, Hello

from .kube.bench import RecordedAudit
from .pair import Clock, FakeAuthenticator, Held, asks_for, holding, joined, knock, make_sessions, renew, resume, used


async def test_a_session_goes_on_over_another_connection() -> None:
    async with holding() as held:
        with capture_logs() as logs:
            assert not held.sessions.streams_wait
            await held.cut()
            assert held.sessions.streams_wait
            await resume(held.sessions, held.client, via="relay-2:443")
            assert not held.sessions.streams_wait
            await held.echo(b"after")
        assert (held.sessions.counters.opened, held.sessions.counters.resumed, len(held.sessions)) == (1, 1, 1)
        assert (held.sessions.detached, held.sessions._unauthenticated) == (0, set())
        assert len(held.proxy.callers) == 1, "the stream is the same"
        assert held.old.via == "relay-2:443"
        assert held.sessions.counters.detached_seconds > 0
        ids = {(ok.session_id, ok.resume_secret) for ok in held.handler.accepted}
        assert len(held.handler.accepted) == 2
        assert len(ids) == 1
        lines = [entry for entry in logs if entry["log_level"] == "info"]
        assert [entry["event"] for entry in lines] == ["session detached", "session resumed"]
        assert lines[0]["streams"] == 1
        assert lines[1]["epoch"] == 1
        assert held.client.resumption.secret.hex() not in str(logs)
    assert len(held.sessions) == 0
    assert len(held.sessions.resumes) == 0


async def test_nothing_is_lost_or_doubled_across_cuts(held: Held) -> None:
    payload = bytes(range(256)) * 4096 * 4
    got = bytearray()

    async def read() -> None:
        while len(got) < len(payload):
            got.extend(await held.io.read())

    reading = asyncio.ensure_future(read())
    writing = asyncio.ensure_future(held.io.write(payload))
    for _ in range(5):
        have = len(got)
        await held.until(lambda have=have: len(got) > have or len(got) == len(payload))
        await held.cut()
        await resume(held.sessions, held.client)
    async with asyncio.timeout(20):
        await asyncio.gather(reading, writing)
    assert hashlib.sha256(got).digest() == hashlib.sha256(payload).digest()
    assert held.sessions.counters.resumed == 5
    assert held.sessions.replayed_bytes > 0


async def test_s4_a_newer_connection_replaces_one_that_is_still_there(held: Held) -> None:
    before = held.client.transport
    await resume(held.sessions, held.client)
    assert held.client.transport is not before
    await held.echo(b"after")
    assert (held.sessions.counters.resumed, held.sessions.detached) == (1, 0)


STRANGERS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"resume_secret": b"x" * 16}, "t", "oidc", "secret"),
    ({"resume_secret": b""}, "t", "oidc", "secret"),
    ({"session_id": b"x" * 16}, "t", "oidc", "unknown"),
    ({"session_id": b"x"}, "t", "oidc", "unknown"),
    ({}, "m", "oidc", "subject"),
    ({}, "sa", "bearer", "subject"),
    ({"session_id": b"x" * 16}, "m", "oidc", "unknown"),
]


@pytest.mark.parametrize(("changes", "token", "kind", "reason"), STRANGERS, ids=range(len(STRANGERS)))
async def test_s5_s6_strangers_hear_one_answer_and_the_owner_goes_on(
    held: Held, changes: dict[str, Any], token: str, kind: str, reason: str
) -> None:
    held.judge.add("sa", "alice", token_mode=True)
    await held.cut()
    answer = await knock(held.sessions, asks_for(held.client, **changes), token, kind)
    assert answer == Goaway(code=GoawayCode.GONE, message=GONE, final=True)
    assert held.sessions.resumes.refused[reason] == 1
    await held.until(lambda: not held.sessions._unauthenticated)
    assert held.sessions.counters.opened == 1
    await resume(held.sessions, held.client)
    await held.echo(b"after")


async def test_s5_the_attached_session_notices_nothing_of_wrong_tries(held: Held) -> None:
    for token in ["m", "t"] * 15:
        answer = await knock(held.sessions, asks_for(held.client, resume_secret=b"x" * 16), token)
        assert isinstance(answer, Goaway)
        assert (answer.code, answer.message) == (GoawayCode.GONE, GONE)
    await held.echo(b"still")
    assert held.client.stats.detached == 0
    await held.cut()
    await resume(held.sessions, held.client)


async def test_s5_without_a_good_token_a_caller_is_told_nothing(held: Held) -> None:
    held.judge.add("old", "alice", expires=900.0)
    await held.cut()
    for token in ("none", "old"):
        assert (await knock(held.sessions, asks_for(held.client), token)).code == GoawayCode.UNAUTHENTICATED
    assert sum(held.sessions.resumes.refused.values()) == 0
    await resume(held.sessions, held.client)


async def test_s6_a_stolen_secret_is_in_the_audit_log() -> None:
    audit = RecordedAudit()
    async with holding(audit=audit) as held:
        await knock(held.sessions, asks_for(held.client), "m")
    (record,) = audit.lines()
    assert (record["user"], record["verb"], record["outcome"]) == ("mallory", "resume", "refused")


@pytest.mark.parametrize("epoch", [0, 3])
async def test_s3_an_epoch_that_is_not_higher(held: Held, epoch: int) -> None:
    for _ in range(3):
        await resume(held.sessions, held.client)
    assert (await knock(held.sessions, asks_for(held.client, epoch=epoch))).code == GoawayCode.REPLACED
    await held.echo(b"undisturbed")
    assert held.client.stats.resumed == 3


async def test_s3_an_epoch_far_ahead_attaches(held: Held) -> None:
    answer = await knock(held.sessions, asks_for(held.client, epoch=2**32 + 5))
    assert isinstance(answer, AuthOk)
    assert answer.session_id == held.client.resumption.session_id
    assert held.old.epoch == 2**32 + 5


async def test_s3_two_at_once(held: Held) -> None:
    """The agent judges both connections before either attaches: the higher epoch wins in either order."""
    await held.cut()
    held.judge.hold = asyncio.Event()
    low = asyncio.ensure_future(knock(held.sessions, asks_for(held.client, epoch=1)))
    high = asyncio.ensure_future(knock(held.sessions, asks_for(held.client, epoch=2)))
    await held.until(lambda: len(held.judge.asked) == 3)
    held.judge.hold.set()
    first, second = await asyncio.gather(low, high)
    assert isinstance(second, AuthOk)
    assert held.old.epoch == 2
    # Attached and replaced at once, with or without a word, or too late.
    assert not isinstance(first, Goaway) or first.code == GoawayCode.REPLACED


@pytest.mark.parametrize("join_id", ["knock", "", "of another user"])
async def test_b2_a_client_of_another_join_is_refused_before_its_token_is_looked_at(join_id: str) -> None:
    judge = FakeAuthenticator(t="alice")
    sessions, _ = make_sessions(judge, Clock())
    hello = Hello(VERSION, VERSION, "resume", DEFAULT.stream_window, DEFAULT.max_streams, join_id=join_id)
    answer = await knock(sessions, hello)
    if join_id != "of another user":  # an older client says none
        assert isinstance(answer, AuthOk)
    else:
        assert isinstance(answer, Goaway)
        assert (answer.code, judge.asked) == (GoawayCode.CROSSED, [])
        assert "crossed two joins" in answer.message
    await sessions.close()


async def test_b2_a_resumption_over_another_join_leaves_the_session_to_its_owner(held: Held) -> None:
    await held.cut()
    assert (await knock(held.sessions, asks_for(held.client, join_id="of another user"))).code == GoawayCode.CROSSED
    await resume(held.sessions, held.client)
    await held.echo(b"still there")


async def test_s1_counts_that_cannot_be_true_end_the_session() -> None:
    for changes in ({"received": 2**63}, {"received": 0}, {"sent": 0}):
        async with holding() as held:
            for _ in range(3):
                await resume(held.sessions, held.client)
                await held.echo(b"x" * 1000)
            await held.cut()
            assert (await knock(held.sessions, asks_for(held.client, **changes))).code == GoawayCode.PROTOCOL
            await held.until(lambda held=held: len(held.sessions) == 0)
            assert held.sessions.resumes.refused["counts"] == 1
            assert (await held.refusal()).code == GoawayCode.GONE


async def test_s8_the_token_lapses_while_the_session_is_away(monkeypatch: pytest.MonkeyPatch, held: Held) -> None:
    monkeypatch.setattr(agent_session, "CLOCK_CHECK", 0.01)
    held.judge.add("new", "alice", expires=9000.0)
    await held.cut()
    held.clock.now = 2000.0
    await held.until(lambda: len(held.sessions) == 0)
    answer = await knock(held.sessions, asks_for(held.client), "m")
    assert isinstance(answer, Goaway)
    held.judge.add("m", "mallory", expires=9000.0)
    answer = await knock(held.sessions, asks_for(held.client), "m")
    assert answer == Goaway(code=GoawayCode.GONE, message=GONE, final=True), "others learn nothing"
    with pytest.raises(SessionEnded, match="the token has expired") as caught:
        await resume(held.sessions, held.client, "new")
    assert caught.value.code == GoawayCode.EXPIRED
    assert held.client.closed
    with pytest.raises(SessionEnded):
        await held.io.read()


async def test_a_newer_token_at_the_resumption_counts(monkeypatch: pytest.MonkeyPatch, held: Held) -> None:
    monkeypatch.setattr(agent_session, "CLOCK_CHECK", 0.01)
    held.judge.add("new", "alice", "ops", expires=9000.0)
    await held.cut()
    await resume(held.sessions, held.client, "new")
    held.clock.now = 3000.0
    await asyncio.sleep(0.05)
    await held.echo(b"after")
    assert held.proxy.callers[0].identity.groups == ("ops",)
    assert held.handler.accepted[-1].expires_in == 8000


async def test_s10_an_older_token_shortens_and_raises_nothing(monkeypatch: pytest.MonkeyPatch, held: Held) -> None:
    monkeypatch.setattr(agent_session, "CLOCK_CHECK", 0.01)
    held.judge.add("older", "alice", "dev", "admins", expires=1500.0)
    await held.cut()
    held.client.authenticate(Auth(kind="oidc", token="older"))  # sent again behind the resumption
    await resume(held.sessions, held.client)
    await held.until(lambda: len(held.handler.accepted) == 3)
    assert held.proxy.callers[0].identity.groups == ("dev",)
    await resume(held.sessions, held.client, "older")
    assert held.proxy.callers[0].identity.groups == ("dev",)
    held.clock.now = 1600.0
    await asyncio.sleep(0.05)
    await held.echo(b"still")


async def test_s10_a_renewal_that_lapsed_while_it_was_away_ends_nothing(held: Held) -> None:
    held.judge.add("older", "alice", expires=1500.0)
    held.judge.add("new", "alice", expires=9000.0)
    await held.cut()
    held.client.authenticate(Auth(kind="oidc", token="older"))
    held.clock.now = 1600.0
    await resume(held.sessions, held.client, "new")
    await held.until(lambda: len(held.judge.asked) == 3)
    await held.echo(b"still")


# Groups, time of issue and expiry of the session's token and of the renewal, and whose groups count afterwards.
RENEWALS: list[tuple[str, tuple[str, float, float], tuple[str, float, float], str]] = [
    ("later, with an earlier end", ("dev admins", 500, 9000), ("dev", 600, 2000), "dev"),
    ("later, with more groups", ("dev", 500, 2000), ("dev admins", 600, 1900), "dev admins"),
    ("earlier, with a later end", ("dev", 600, 2000), ("dev admins", 500, 9000), "dev"),
    ("one second, fewer groups, an earlier end", ("dev admins", 500, 9000), ("dev", 500, 2000), "dev"),
    ("one second, more groups, a later end", ("dev", 500, 2000), ("dev admins", 500, 9000), "dev"),
    ("one second, as many groups", ("dev", 500, 2000), ("admins", 500, 9000), "dev"),
    ("no time of issue, fewer groups", ("dev admins", 0, 9000), ("dev", 0, 2000), "dev"),
    ("no time of issue behind one", ("dev", 500, 2000), ("admins", 0, 9000), "dev"),
    ("a time of issue behind none", ("dev", 0, 9000), ("dev admins", 500, 2000), "dev admins"),
]


@pytest.mark.parametrize(("first", "second", "groups"), [row[1:] for row in RENEWALS], ids=[row[0] for row in RENEWALS])
async def test_v17_of_two_tokens_the_later_issued_counts(
    first: tuple[str, float, float], second: tuple[str, float, float], groups: str
) -> None:
    judge = FakeAuthenticator()
    for token, (names, issued, expires) in (("t", first), ("t2", second)):
        judge.add(token, "alice", *names.split(), issued=issued, expires=expires)
    sessions, proxy = make_sessions(judge, Clock())
    async with joined(sessions) as (client, handler):
        await used(client)
        await renew(client, handler, "t2")
        identity = proxy.callers[0].identity
        assert identity.groups == tuple(groups.split())
        chosen = first if groups == first[0] else second
        assert identity.expires_at == chosen[2], "the session ends with the token that counts"


async def test_a_token_without_a_time_of_issue_renews_itself() -> None:
    """The API server is asked again about such a token, and the session goes on (docs/threats.md#V17)."""
    judge, clock = FakeAuthenticator(), Clock()
    judge.add("t", "alice", "dev", issued=0.0, expires=2000.0, token_mode=True)
    sessions, _ = make_sessions(judge, clock)
    async with joined(sessions) as (client, handler):
        judge.add("t", "alice", "dev", issued=0.0, expires=5000.0, token_mode=True)
        await renew(client, handler, "t", "bearer")
        assert handler.accepted[-1].expires_in == 4000

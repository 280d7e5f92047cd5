"""A session belongs to one subject, from AUTH to its token's expiry, over one connection or several
(docs/threats.md#T5, docs/threats.md#M13, docs/threats.md#S3, docs/threats.md#S4, docs/threats.md#S5,
docs/threats.md#S6, docs/threats.md#S7, docs/threats.md#S8, docs/threats.md#S10).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from arcbridge.agent import agent_session
from arcbridge.agent import sessions as module
from arcbridge.agent.accounts import Accounts, Limit
from arcbridge.agent.audit import AuditLog
from arcbridge.agent.authenticator import Authenticated, Authenticator, UnprovedToken
from arcbridge.agent.kube.authorize import token_digest
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.resume import GONE
from arcbridge.agent.sessions import Sessions
from arcbridge.agent.targets import TcpTargets, read_targets
from arcbridge.config import AgentLimitsConfig, LimitsOverrideConfig, TargetConfig
from arcbridge.errors import ArcbridgeError, ConnectionLost, PermissionRefused, SessionEnded, StreamReset, Unreachable
from arcbridge.identity.authentication import parse
from arcbridge.identity.proof import (
    IAT_WINDOW,
    Peer,
    ProofChecker,
    ProofKey,
    ProofPolicy,
    ProofRefused,
    refusal_in,
    spki_of,
)
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.mux import memory
from arcbridge.mux.connection import AuthMaker, peer_certificate
from arcbridge.mux.session import MuxSession
from arcbridge.net.tls import inner_server_context
from arcbridge.wire.frames import VERSION, GoawayCode, ResetCode
from arcbridge.wire.limits import DEFAULT
from arcbridge.wire.records import Auth, AuthOk, Goaway, Hello, Revoke
from arcbridge.wire.session import Kind, Side, State
from tests.identity import issuer as issuing
from tests.support.stream_io import StreamIO

from .pair import (
    CA,
    LEAF,
    PEER,
    SERVER,
    ClientSide,
    Clock,
    FakeAuthenticator,
    FakeProxy,
    _join,
    asks_for,
    joined,
    knock,
    make_sessions,
    resume,
)


async def end_of(session: MuxSession) -> ArcbridgeError:
    async with asyncio.timeout(5):
        return await session.wait_ended()


async def test_accepted_and_served_as_the_caller() -> None:
    judge = FakeAuthenticator()
    judge.add("t", "alice", "dev")
    sessions, proxy = make_sessions(judge, Clock())
    async with joined(sessions) as (client, handler):
        io = StreamIO()
        client.open("kubernetes", io)
        await io.write(b"hello")
        assert await io.read() == b"hello"
        assert handler.accepted[0].subject == "alice"
        assert handler.accepted[0].expires_in == 1000
        assert proxy.callers[0].identity.groups == ("dev",)
        assert proxy.callers[0].session == "j" * 16
        assert len(sessions) == 1
    assert len(sessions) == 0


async def test_nothing_is_served_before_auth_is_accepted() -> None:
    judge = FakeAuthenticator()
    judge.add("t", "alice")
    judge.hold = asyncio.Event()
    sessions, proxy = make_sessions(judge, Clock())
    async with joined(sessions) as (client, _):
        io = StreamIO()
        client.open("kubernetes", io)
        await io.write(b"hello")
        while not judge.asked:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert proxy.callers == []
        judge.hold.set()
        assert await io.read() == b"hello"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, GoawayCode.UNAUTHENTICATED),
        (PermissionRefused("service-account tokens only"), GoawayCode.FORBIDDEN),
        (Unreachable("issuer down"), GoawayCode.UNAVAILABLE),
    ],
)
async def test_refused_with_a_reason(error: ArcbridgeError | None, code: GoawayCode) -> None:
    judge = FakeAuthenticator()
    if error is not None:
        judge.known["t"] = error
    sessions, proxy = make_sessions(judge, Clock())
    async with joined(sessions) as (client, _):
        client.open("kubernetes", StreamIO())
        ended = await end_of(client)
        assert isinstance(ended, SessionEnded)
        assert ended.code == code
        assert ended.message == (error.message if error else "not known")
    assert proxy.callers == []
    assert sessions.refused == 1


async def test_a_token_that_has_lapsed_is_refused() -> None:
    judge = FakeAuthenticator()
    judge.add("t", "alice", expires=999.0)
    sessions, _ = make_sessions(judge, Clock())
    async with joined(sessions) as (client, _):
        ended = await end_of(client)
        assert "expired" in ended.message


async def test_the_session_ends_with_its_token_by_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_session, "CLOCK_CHECK", 0.01)
    judge, clock = FakeAuthenticator(), Clock()
    judge.add("t", "alice", expires=1100.0)
    sessions, _ = make_sessions(judge, clock)
    async with joined(sessions) as (client, _):
        await client.wait_established()
        io = StreamIO()
        client.open("kubernetes", io)
        await asyncio.sleep(0.05)
        assert not client.closed
        clock.now = 1100.0
        ended = await end_of(client)
        assert isinstance(ended, SessionEnded)
        assert ended.code == GoawayCode.EXPIRED
        with pytest.raises(SessionEnded):
            await io.read()
    assert sessions.expired == 1


async def test_a_renewal_leaves_no_gap_and_its_groups_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_session, "CLOCK_CHECK", 0.01)
    judge, clock = FakeAuthenticator(), Clock()
    judge.add("t", "alice", "dev", "ops", expires=1100.0)
    judge.add("t2", "alice", "dev", expires=1500.0)
    sessions, proxy = make_sessions(judge, clock)
    async with joined(sessions) as (client, handler):
        await client.wait_established()
        io = StreamIO()
        client.open("kubernetes", io)
        await io.write(b"x")
        await io.read()
        client.authenticate(Auth(kind="oidc", token="t2"))
        await asyncio.wait_for(handler.accepted_again.wait(), 5)
        clock.now = 1200.0
        await asyncio.sleep(0.05)
        await io.write(b"y")
        assert await io.read() == b"y"
        assert proxy.callers[0].identity.groups == ("dev",)


async def test_a_renewal_by_another_subject_ends_the_session() -> None:
    judge = FakeAuthenticator()
    judge.add("t", "alice")
    judge.add("t2", "mallory")
    sessions, _ = make_sessions(judge, Clock())
    async with joined(sessions) as (client, _):
        await client.wait_established()
        client.authenticate(Auth(kind="oidc", token="t2"))
        ended = await end_of(client)
        assert isinstance(ended, SessionEnded)
        assert ended.code == GoawayCode.FORBIDDEN


async def test_a_renewal_in_another_mode_ends_the_session() -> None:
    judge = FakeAuthenticator()
    judge.add("t", "alice")
    judge.add("t2", "alice", token_mode=True)
    sessions, _ = make_sessions(judge, Clock())
    async with joined(sessions) as (client, _):
        await client.wait_established()
        client.authenticate(Auth(kind="bearer", token="t2"))
        assert isinstance(await end_of(client), SessionEnded)


async def test_a_renewal_that_cannot_be_judged_now_changes_nothing() -> None:
    judge = FakeAuthenticator()
    judge.add("t", "alice")
    judge.known["t2"] = Unreachable("issuer down")
    sessions, _ = make_sessions(judge, Clock())
    async with joined(sessions) as (client, _):
        await client.wait_established()
        client.authenticate(Auth(kind="oidc", token="t2"))
        while len(judge.asked) < 2:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        assert not client.closed


async def test_unknown_targets() -> None:
    judge = FakeAuthenticator()
    judge.add("t", "alice")
    sessions, _ = make_sessions(judge, Clock())
    async with joined(sessions) as (client, _):
        await client.wait_established()
        for target in ("node", "tcp:none", "tcp:", "10.0.0.1:22"):
            io = StreamIO()
            client.open(target, io)
            with pytest.raises(StreamReset) as caught:
                await io.read()
            assert caught.value.code == ResetCode.UNKNOWN_TARGET


async def test_drain_lets_streams_finish() -> None:
    judge = FakeAuthenticator()
    judge.add("t", "alice")
    sessions, _ = make_sessions(judge, Clock())
    async with joined(sessions) as (client, _):
        await client.wait_established()
        io = StreamIO()
        client.open("kubernetes", io)
        await io.write(b"x")
        await io.read()
        sessions.drain()
        await asyncio.sleep(0.02)
        await io.write(b"still")
        assert await io.read() == b"still"
        with pytest.raises(SessionEnded):
            client.open("kubernetes", StreamIO())
        io.finish()
        await asyncio.wait_for(sessions.wait_empty(), 5)


async def test_a_handshake_that_fails_leaves_nothing() -> None:
    sessions, _ = make_sessions(FakeAuthenticator(), Clock())
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ours.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ConnectionLost):
        await sessions.serve(theirs, SERVER, "j")
    await asyncio.wait_for(sessions.wait_empty(), 5)
    ours.close()


async def test_connections_without_a_login_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#L4: all places are taken by connections that never authenticate, one of them without even TLS.
    The next one, which has a token, is let in, and the longest there goes with a reason that lets it try again."""
    monkeypatch.setattr(module, "MAX_UNAUTHENTICATED", 2)
    judge, monotonic = FakeAuthenticator(), Clock()
    judge.add("t", "alice")
    sessions, _ = make_sessions(judge, Clock(), monotonic=monotonic)
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    silent = asyncio.ensure_future(sessions.serve(theirs, SERVER, "silent"))
    await asyncio.sleep(0)
    monotonic.now += 0.1
    async with joined(sessions, None) as (stalled, _):
        assert not sessions.accepts_connection(may_come_back=True)
        monotonic.now += module.STALLED
        assert sessions.accepts_connection()
        async with joined(sessions, "t") as (client, handler):
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(silent, 5)
            async with asyncio.timeout(5):
                while not handler.accepted:
                    await asyncio.sleep(0.005)
            assert not stalled.closed
            assert not client.closed
            monotonic.now += module.STALLED
            monkeypatch.setattr(module, "MAX_UNAUTHENTICATED", 1)
            async with joined(sessions, "t"):
                error = await end_of(stalled)
                assert isinstance(error, SessionEnded)
                assert error.code == GoawayCode.LIMIT
    ours.close()


# -- resumption -----------------------------------------------------------------------------------------------


class Held:
    """Alice's session with one stream that has been used, at an agent that also knows mallory."""

    def __init__(self, sessions: Sessions, proxy: FakeProxy, judge: FakeAuthenticator, clock: Clock) -> None:
        self.sessions, self.proxy, self.judge, self.clock = sessions, proxy, judge, clock
        self.client: MuxSession
        self.handler: ClientSide
        self.io = StreamIO()

    @property
    def old(self) -> agent_session.AgentSession:
        (found,) = self.sessions._open
        return found

    def old_of(self, letter: str) -> agent_session.AgentSession:
        (found,) = [one for one in self.sessions._open if one._join_id == letter * 16]
        return found

    async def cut(self) -> None:
        """Lose the connection and wait until both ends have noticed."""
        assert self.client.transport is not None
        self.client.transport.abort()
        await self.until(lambda: self.client.state is State.DETACHED and self.sessions.detached == 1)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)

    async def echo(self, data: bytes) -> None:
        await self.io.write(data)
        got = b""
        async with asyncio.timeout(10):
            while len(got) < len(data):
                got += await self.io.read(len(data) - len(got))
        assert got == data


@asynccontextmanager
async def holding(**settings: Any) -> AsyncIterator[Held]:
    judge, clock = FakeAuthenticator(), Clock()
    judge.add("t", "alice", "dev")
    judge.add("m", "mallory")
    sessions, proxy = make_sessions(judge, clock, **settings)
    held = Held(sessions, proxy, judge, clock)
    async with joined(sessions, via="relay-1:443") as (held.client, held.handler):
        held.client.open("kubernetes", held.io)
        await held.echo(b"before")
        yield held


async def test_a_session_goes_on_over_another_connection() -> None:
    async with holding() as held:
        with capture_logs() as logs:
            await held.cut()
            await resume(held.sessions, held.client, via="relay-2:443")
            await held.echo(b"after")
        assert (held.sessions.opened, held.sessions.resumed, len(held.sessions)) == (1, 1, 1)
        assert (held.sessions.detached, held.sessions._unauthenticated) == (0, set())
        assert len(held.proxy.callers) == 1, "the stream is the same"
        assert held.old.via == "relay-2:443"
        assert held.sessions.detached_seconds > 0
        ids = {(ok.session_id, ok.resume_secret) for ok in held.handler.accepted}
        assert len(held.handler.accepted) == 2
        assert len(ids) == 1
        lines = [entry for entry in logs if entry["log_level"] == "info"]
        assert [entry["event"] for entry in lines] == ["session detached", "session resumed"]
        assert lines[0]["streams"] == 1
        assert lines[1]["epoch"] == 1
        assert held.client.resume_secret.hex() not in str(logs)
    assert len(held.sessions) == 0
    assert len(held.sessions.resumes) == 0


async def test_nothing_is_lost_or_doubled_across_cuts() -> None:
    payload = bytes(range(256)) * 4096 * 4
    async with holding() as held:
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
        assert held.sessions.resumed == 5
        assert held.sessions.replayed_bytes > 0


async def test_s4_a_newer_connection_replaces_one_that_is_still_there() -> None:
    async with holding() as held:
        before = held.client.transport
        await resume(held.sessions, held.client)
        assert held.client.transport is not before
        await held.echo(b"after")
        assert (held.sessions.resumed, held.sessions.detached) == (1, 0)


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
    changes: dict[str, Any], token: str, kind: str, reason: str
) -> None:
    async with holding() as held:
        held.judge.add("sa", "alice", token_mode=True)
        await held.cut()
        answer = await knock(held.sessions, asks_for(held.client, **changes), token, kind)
        assert answer == Goaway(code=GoawayCode.GONE, message=GONE, final=True)
        assert held.sessions.resumes.refused[reason] == 1
        await held.until(lambda: not held.sessions._unauthenticated)
        assert held.sessions.opened == 1
        await resume(held.sessions, held.client)
        await held.echo(b"after")


async def test_s5_the_attached_session_notices_nothing_of_wrong_tries() -> None:
    async with holding() as held:
        for token in ["m", "t"] * 15:
            answer = await knock(held.sessions, asks_for(held.client, resume_secret=b"x" * 16), token)
            assert isinstance(answer, Goaway)
            assert (answer.code, answer.message) == (GoawayCode.GONE, GONE)
        await held.echo(b"still")
        assert held.client.stats.detached == 0
        await held.cut()
        await resume(held.sessions, held.client)


async def test_s5_without_a_good_token_a_caller_is_told_nothing() -> None:
    async with holding() as held:
        held.judge.add("old", "alice", expires=900.0)
        await held.cut()
        for token in ("none", "old"):
            answer = await knock(held.sessions, asks_for(held.client), token)
            assert isinstance(answer, Goaway)
            assert answer.code == GoawayCode.UNAUTHENTICATED
        assert sum(held.sessions.resumes.refused.values()) == 0
        await resume(held.sessions, held.client)


def written(audit: Path) -> list[dict[str, Any]]:
    """The records of a file, without the two of the chain itself: where it begins and where it ends."""
    return [json.loads(line) for line in audit.read_text().splitlines()][1:-1]


async def test_s6_a_stolen_secret_is_in_the_audit_log(tmp_path: Path) -> None:
    audit = AuditLog(str(tmp_path / "audit"))
    async with holding(audit=audit) as held:
        await knock(held.sessions, asks_for(held.client), "m")
    await asyncio.to_thread(audit.close)
    (record,) = written(tmp_path / "audit")
    assert (record["user"], record["verb"], record["outcome"]) == ("mallory", "resume", "refused")


@pytest.mark.parametrize("epoch", [0, 3])
async def test_s3_an_epoch_that_is_not_higher(epoch: int) -> None:
    async with holding() as held:
        for _ in range(3):
            await resume(held.sessions, held.client)
        answer = await knock(held.sessions, asks_for(held.client, epoch=epoch))
        assert isinstance(answer, Goaway)
        assert answer.code == GoawayCode.REPLACED
        await held.echo(b"undisturbed")
        assert held.client.stats.resumed == 3


async def test_s3_an_epoch_far_ahead_attaches() -> None:
    async with holding() as held:
        answer = await knock(held.sessions, asks_for(held.client, epoch=2**32 + 5))
        assert isinstance(answer, AuthOk)
        assert answer.session_id == held.client.session_id
        assert held.old.epoch == 2**32 + 5


async def test_s3_two_at_once() -> None:
    """The agent judges both connections before either attaches: the higher epoch wins in either order."""
    async with holding() as held:
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
    judge = FakeAuthenticator()
    judge.add("t", "alice")
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


async def test_b2_a_resumption_over_another_join_leaves_the_session_to_its_owner() -> None:
    async with holding() as held:
        await held.cut()
        answer = await knock(held.sessions, asks_for(held.client, join_id="of another user"))
        assert isinstance(answer, Goaway)
        assert answer.code == GoawayCode.CROSSED
        await resume(held.sessions, held.client)
        await held.echo(b"still there")


async def test_s1_counts_that_cannot_be_true_end_the_session() -> None:
    for changes in ({"received": 2**63}, {"received": 0}, {"sent": 0}):
        async with holding() as held:
            for _ in range(3):
                await resume(held.sessions, held.client)
                await held.echo(b"x" * 1000)
            await held.cut()
            answer = await knock(held.sessions, asks_for(held.client, **changes))
            assert isinstance(answer, Goaway)
            assert answer.code == GoawayCode.PROTOCOL
            await held.until(lambda held=held: len(held.sessions) == 0)
            assert held.sessions.resumes.refused["counts"] == 1
            with pytest.raises(SessionEnded) as caught:
                await resume(held.sessions, held.client)
            assert caught.value.code == GoawayCode.GONE


async def test_s8_the_token_lapses_while_the_session_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_session, "CLOCK_CHECK", 0.01)
    async with holding() as held:
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


async def test_a_newer_token_at_the_resumption_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_session, "CLOCK_CHECK", 0.01)
    async with holding() as held:
        held.judge.add("new", "alice", "ops", expires=9000.0)
        await held.cut()
        await resume(held.sessions, held.client, "new")
        held.clock.now = 3000.0
        await asyncio.sleep(0.05)
        await held.echo(b"after")
        assert held.proxy.callers[0].identity.groups == ("ops",)
        assert held.handler.accepted[-1].expires_in == 8000


async def test_s10_an_older_token_shortens_and_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_session, "CLOCK_CHECK", 0.01)
    async with holding() as held:
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


async def test_s10_a_renewal_that_lapsed_while_it_was_away_ends_nothing() -> None:
    async with holding() as held:
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
        await client.wait_established()
        io = StreamIO()
        client.open("kubernetes", io)
        await io.write(b"x")
        await io.read()
        client.authenticate(Auth(kind="oidc", token="t2"))
        await asyncio.wait_for(handler.accepted_again.wait(), 5)
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
        await client.wait_established()
        judge.add("t", "alice", "dev", issued=0.0, expires=5000.0, token_mode=True)
        client.authenticate(Auth(kind="bearer", token="t"))
        await asyncio.wait_for(handler.accepted_again.wait(), 5)
        assert handler.accepted[-1].expires_in == 4000


# -- revocations, and the greatest age -----------------------------------------------------------------------------

NOW = Revoke("alice", 1005, reason="left the company")
"""Revokes the token `t` of alice, which was issued at 1000, at 1005."""
SAID = (
    'access was revoked: the relay\'s operator says "left the company"; '
    "logins from before 1970-01-01T00:16:45Z count no more: log in again"
)


async def test_v11_a_revoked_user_s_streams_end_at_once_and_no_other_s(tmp_path: Path) -> None:
    audit = AuditLog(str(tmp_path / "audit"))
    async with holding(audit=audit) as held:
        held.judge.add("b", "bob")
        async with AsyncExitStack() as stack:
            bob, _ = await stack.enter_async_context(joined(held.sessions, "b", "b" * 16))
            other = StreamIO()
            bob.open("kubernetes", other)
            await other.write(b"before")
            assert await other.read_exactly(6) == b"before"
            held.sessions.revocations.hear("relay-2:443", NOW)
            ended = await end_of(held.client)
            assert isinstance(ended, SessionEnded)
            assert (ended.code, ended.message) == (GoawayCode.REVOKED, SAID)
            with pytest.raises(SessionEnded):
                await held.io.read()
            await other.write(b"after")
            assert await other.read_exactly(5) == b"after"
            assert (len(held.sessions), held.sessions.revoked, held.sessions.detached) == (1, 1, 0)
    await asyncio.to_thread(audit.close)
    (record,) = written(tmp_path / "audit")
    assert (record["user"], record["verb"], record["outcome"]) == ("alice", "session", "cut")
    assert record["reason"] == SAID


async def test_v11_a_detached_session_ends_too_and_is_not_resumed(tmp_path: Path) -> None:
    audit = AuditLog(str(tmp_path / "audit"))
    async with holding(audit=audit) as held:
        held.judge.add("newer", "alice", issued=1100.0)
        await held.cut()
        held.sessions.revocations.hear("relay-1:443", NOW)
        await held.until(lambda: len(held.sessions) == 0)
        for token in ("t", "newer"):
            answer = await knock(held.sessions, asks_for(held.client), token)
            assert answer == Goaway(code=GoawayCode.REVOKED, message=SAID, final=True), token
    await asyncio.to_thread(audit.close)
    found = written(tmp_path / "audit")
    assert [(one["verb"], one["outcome"]) for one in found] == [("session", "cut"), ("resume", "refused")]


@pytest.mark.parametrize("given", ["first", "second", "another"])
async def test_one_session_ends_by_either_of_its_join_ids(tmp_path: Path, given: str) -> None:
    """A relay's operator ends a session: the one that began, or runs now, under that join id, and no other."""
    audit = AuditLog(str(tmp_path / "audit"))
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
        assert isinstance(ended, SessionEnded)
        assert (ended.code, ended.message) == (GoawayCode.REVOKED, "access was revoked: maintenance")
        assert len(held.sessions.revocations) == 0, "nothing is revoked"
    await asyncio.to_thread(audit.close)
    assert [(one["verb"], one["outcome"], one["session"]) for one in written(tmp_path / "audit")] == [
        ("session", "cut", first)
    ]


async def test_v12_old_tokens_are_refused_and_new_ones_are_not() -> None:
    judge = FakeAuthenticator()
    for token, issued in (("old", 1000.0), ("says-nothing", 0.0), ("within-the-skew", 1014.0), ("new", 1015.0)):
        judge.add(token, "alice", issued=issued)
    sessions, proxy = make_sessions(judge, Clock())
    sessions.revocations.hear("relay-1:443", NOW)
    for token in ("old", "says-nothing", "within-the-skew"):
        async with joined(sessions, token) as (client, _):
            client.open("kubernetes", StreamIO())
            ended = await end_of(client)
            assert isinstance(ended, SessionEnded)
            assert (ended.code, ended.message) == (GoawayCode.REVOKED, SAID)
    assert proxy.callers == []
    assert (sessions.refused, sessions.revoked) == (3, 3)
    async with joined(sessions, "new") as (client, _):
        await client.wait_established()
    sessions.revocations.hear("relay-1:443", Revoke("alice", 0))
    async with joined(sessions, "old") as (client, _):
        await client.wait_established()


async def test_v12_a_user_revoked_while_the_token_is_judged_does_not_get_in() -> None:
    judge = FakeAuthenticator()
    judge.add("t", "alice")
    judge.hold = asyncio.Event()
    sessions, proxy = make_sessions(judge, Clock())
    async with joined(sessions) as (client, _):
        client.open("kubernetes", StreamIO())
        while not judge.asked:
            await asyncio.sleep(0.005)
        sessions.revocations.hear("relay-1:443", NOW)
        await asyncio.sleep(0.02)
        judge.hold.set()
        ended = await end_of(client)
        assert isinstance(ended, SessionEnded)
        assert ended.code == GoawayCode.REVOKED
    assert proxy.callers == []


async def test_v12_an_old_token_that_is_sent_again_ends_nothing() -> None:
    """After a resumption with a new token, a renewal from before the loss is repeated (docs/threats.md#S10)."""
    async with holding() as held:
        held.judge.add("new", "alice", "dev", issued=1100.0)
        held.client.authenticate(Auth(kind="oidc", token="new"))
        await asyncio.wait_for(held.handler.accepted_again.wait(), 5)
        held.sessions.revocations.hear("relay-1:443", NOW)
        held.client.authenticate(Auth(kind="oidc", token="t"))
        await held.until(lambda: len(held.handler.accepted) == 3)
        await held.echo(b"still")
        assert held.sessions.revoked == 0


async def test_v13_a_revocation_taken_back_at_once_ends_what_runs_and_leaves_nothing() -> None:
    async with holding() as held:
        held.sessions.revocations.hear("relay-1:443", NOW)
        held.sessions.revocations.hear("relay-1:443", Revoke("alice", 0))
        ended = await end_of(held.client)
        assert isinstance(ended, SessionEnded)
        assert ended.code == GoawayCode.REVOKED
        async with joined(held.sessions) as (client, _):
            await client.wait_established()


async def test_a_long_list_is_acted_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with holding() as held:
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
        async with holding(max_age=7200.0) as held:
            held.judge.add("long", "alice", expires=100_000.0, issued=1001.0)
            held.client.authenticate(Auth(kind="oidc", token="long"))
            await asyncio.wait_for(held.handler.accepted_again.wait(), 5)
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
            assert isinstance(ended, SessionEnded)
            assert ended.code == GoawayCode.EXPIRED
            assert ended.message.startswith("a session lasts 2 h here at most")
            assert "log in again" in ended.message
            assert held.sessions.expired == 1


async def test_v16_a_clock_that_is_set_back_makes_no_session_younger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_session, "CLOCK_CHECK", 0.01)
    ticking = Clock(0.0)
    async with holding(max_age=60.0, monotonic=ticking) as held:
        held.clock.now = 500.0
        ticking.now = 59.0
        await asyncio.sleep(0.05)
        await held.echo(b"still")
        ticking.now = 60.0
        ended = await end_of(held.client)
        assert ended.message.startswith("a session lasts 1 min here at most")


async def test_revoked_while_it_is_away() -> None:
    async with holding() as held:
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
        await held.cut()
        await held.until(lambda: len(held.sessions) == 0)
        with pytest.raises(SessionEnded) as caught:
            await resume(held.sessions, held.client)
        assert caught.value.code == GoawayCode.GONE
        assert caught.value.message != GONE, "the owner hears the reason"


async def test_without_resumption_a_session_ends_with_its_connection() -> None:
    async with holding(limits=replace(DEFAULT, replay=0)) as held:
        assert not held.client.resumable
        assert len(held.sessions.resumes) == 0
        assert held.client.transport is not None
        held.client.transport.abort()
        await held.until(lambda: len(held.sessions) == 0 and held.client.closed)


async def test_at_the_limit_sessions_come_back_and_no_new_ones_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SESSIONS", 1)
    async with holding() as held:
        assert not held.sessions.accepts_connection()
        assert held.sessions.accepts_connection(may_come_back=True)
        await held.cut()
        answer = await knock(held.sessions, asks_for(held.client, session_id=b"", resume_secret=b"", epoch=0))
        assert isinstance(answer, Goaway)
        assert answer.code == GoawayCode.UNAVAILABLE
        await resume(held.sessions, held.client)
        await held.echo(b"after")
        assert (held.sessions.opened, held.sessions.refused, len(held.sessions)) == (1, 1, 1)


async def test_at_the_limit_a_detached_session_without_streams_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SESSIONS", 1)
    async with holding() as held:
        held.io.finish()
        assert await held.io.read() == b""
        await held.until(lambda: held.old.streams == 0)
        await held.cut()
        answer = await knock(held.sessions, asks_for(held.client, session_id=b"", resume_secret=b"", epoch=0))
        assert isinstance(answer, AuthOk)
        with pytest.raises(SessionEnded, match="needed its place"):
            await resume(held.sessions, held.client)


async def test_s7_new_sessions_are_refused_when_memory_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with holding() as held:
        monkeypatch.setattr(memory.budget, "most", 0)
        assert not held.sessions.accepts_connection()
        await held.cut()
        await resume(held.sessions, held.client)
        await held.echo(b"after")


async def test_an_agent_that_stops_lets_a_detached_session_come_back_and_finish() -> None:
    async with holding() as held:
        await held.cut()
        held.sessions.drain()
        assert len(held.sessions) == 1
        await resume(held.sessions, held.client)
        await held.echo(b"after")
        held.io.finish()
        assert await held.io.read() == b""
        await asyncio.wait_for(held.sessions.wait_empty(), 5)


async def test_an_agent_that_stops_does_not_wait_for_a_detached_session_without_streams() -> None:
    async with holding() as held:
        held.io.finish()
        assert await held.io.read() == b""
        await held.until(lambda: held.old.streams == 0)
        await held.cut()
        held.sessions.drain()
        await asyncio.wait_for(held.sessions.wait_empty(), 5)


async def test_close_ends_detached_sessions() -> None:
    async with holding() as held:
        await held.cut()
        await asyncio.wait_for(held.sessions.close(), 5)
        assert len(held.sessions) == 0
        with pytest.raises(SessionEnded, match="the agent has stopped") as caught:
            await resume(held.sessions, held.client)
        assert caught.value.code == GoawayCode.GONE


async def test_asked_to_move_are_those_that_came_through_that_relay_before() -> None:
    async with holding() as held:
        now = time.monotonic()
        assert held.sessions.ask_to_move("relay-2:443", now) == 0
        assert held.sessions.ask_to_move("relay-1:443", now - 60) == 0
        assert held.sessions.ask_to_move("relay-1:443", now) == 1
        await asyncio.wait_for(held.handler.move.wait(), 5)
        await resume(held.sessions, held.client, via="relay-2:443")
        assert held.sessions.ask_to_move("relay-1:443", time.monotonic()) == 0
        await held.cut()
        assert held.sessions.ask_to_move("relay-2:443", time.monotonic()) == 0, "it has no connection"
        assert held.sessions.moves_asked == 1


async def test_a_newcomer_that_leaves_while_it_is_judged_changes_nothing() -> None:
    async with holding() as held:
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


async def test_the_callers_absence_is_known_to_whoever_has_deadlines_for_him() -> None:
    async with holding() as held:
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
        while not proxy.callers:
            await asyncio.sleep(0.005)
        caller = proxy.callers[0]
        assert token_digest(b"t") in caller.tokens
        assert caller.review_token is not None
        assert await caller.review_token("rotated")
        assert not await caller.review_token("stranger")
        assert not await caller.review_token("unknown")
        with pytest.raises(RequestRefusal) as caught:
            await caller.review_token("away")
        assert caught.value.status_code == 503
        client.authenticate(Auth(kind="bearer", token="renewed"))
        await handler.accepted_again.wait()
        assert token_digest(b"renewed") in caller.tokens
        assert token_digest(b"t") in caller.tokens, "requests that are on their way may still carry it"
        assert token_digest(b"stranger") not in caller.tokens


async def test_t30_a_request_s_token_without_proof_is_recorded_with_its_owner(tmp_path: Path) -> None:
    audit, judge = AuditLog(str(tmp_path / "audit")), FakeAuthenticator()
    judge.add("t", "robot", token_mode=True)
    judge.add("stolen", "other", token_mode=True)
    owner = judge.known["stolen"]
    assert isinstance(owner, Authenticated)
    judge.known["stolen"] = UnprovedToken(owner.identity, ProofRefused("key", "the agent"))
    sessions, proxy = make_sessions(judge, Clock(), audit=audit)
    async with joined(sessions) as (client, _):
        client.open("kubernetes", StreamIO())
        while not proxy.callers:
            await asyncio.sleep(0.005)
        review = proxy.callers[0].review_token
        assert review is not None
        with pytest.raises(RequestRefusal) as caught:
            await review("stolen")
        assert (caught.value.status_code, refusal_in(caught.value.message)) == (401, "key")
    audit.close()
    (record,) = [one for one in written(tmp_path / "audit") if one.get("outcome") == "refused"]
    assert (record["user"], record["verb"]) == ("other", "authenticate")
    assert refusal_in(record["reason"]) == "key"


# -- limits of one user -----------------------------------------------------------------------------------------


def limited(**limits: Any) -> Accounts:
    return Accounts(AgentLimitsConfig(**limits), clock=lambda: 1000.0)


async def refusal_of(io: StreamIO) -> int:
    with pytest.raises(StreamReset) as caught:
        async with asyncio.timeout(10):
            await io.read()
    return caught.value.code


async def test_l23_streams_of_all_sessions_count_and_one_over_the_limit_is_reset(tmp_path: Path) -> None:
    audit = AuditLog(str(tmp_path / "audit"))
    async with holding(accounts=limited(streams=3), audit=audit) as held:  # noqa: SIM117  the one is made by the other
        async with joined(held.sessions, join_id="k" * 16, alone=False) as (second, _):
            await second.wait_established()
            inside = [StreamIO() for _ in range(2)]
            for io in inside:
                second.open("kubernetes", io)
                await io.write(b"x")
                assert await io.read() == b"x"
            for client in (held.client, second, second):
                over = StreamIO()
                client.open("kubernetes", over)
                assert await refusal_of(over) == ResetCode.LIMIT
            await held.echo(b"those that are there go on")
            inside[0].finish()
            await held.until(lambda: held.old_of("k").streams == 1)
            io = StreamIO()
            second.open("kubernetes", io)
            await io.write(b"x")
            assert await io.read() == b"x"
            assert len(held.proxy.callers) == 4
    assert held.sessions.accounts.refusals[Limit.STREAMS] == 3
    await asyncio.to_thread(audit.close)
    first, rest = written(tmp_path / "audit")
    assert (first["limit"], first["verb"], first["target"]) == ("streams", "open", "kubernetes")
    assert first["reason"].startswith("3 connections of yours are open")
    assert (rest["limit"], rest["verb"], rest["omitted"]) == ("streams", "limit", 2), "none is missing at the end"


async def test_m7_streams_that_end_before_their_answers_count_per_user() -> None:
    """The user's next session has no burst of its own; another user has a whole one."""
    async with holding() as held:
        opened = 0
        for join_id in ("k" * 16, "l" * 16):
            async with joined(held.sessions, join_id=join_id, alone=False) as (client, _):
                await client.wait_established()
                while not client.closed and opened < 2 * DEFAULT.churn_burst:
                    io = StreamIO()
                    client.open("nothing", io)
                    opened += 1
                    with contextlib.suppress(StreamReset, ConnectionLost, SessionEnded):
                        await io.read()
                assert "before their answers" in (await asyncio.wait_for(client.wait_ended(), 10)).message
        assert DEFAULT.churn_burst < opened < 1.5 * DEFAULT.churn_burst
        async with joined(held.sessions, "m", join_id="m" * 16, alone=False) as (mallory, _):
            await mallory.wait_established()
            io = StreamIO()
            mallory.open("nothing", io)
            assert await refusal_of(io) == ResetCode.UNKNOWN_TARGET
        await held.echo(b"what runs in a session without such streams goes on")


async def test_l23_another_user_is_not_touched() -> None:
    async with holding(accounts=limited(streams=1)) as held:  # noqa: SIM117  the one is made by the other
        async with joined(held.sessions, "m", join_id="k" * 16, alone=False) as (mallory, _):
            await mallory.wait_established()
            first, second = StreamIO(), StreamIO()
            mallory.open("kubernetes", first)
            await first.write(b"x")
            assert await first.read() == b"x"
            mallory.open("kubernetes", second)
            assert await refusal_of(second) == ResetCode.LIMIT
            await held.echo(b"alice's own")


async def test_l24_one_session_too_many_is_refused_in_words(tmp_path: Path) -> None:
    audit = AuditLog(str(tmp_path / "audit"))
    async with holding(accounts=limited(sessions=1), audit=audit) as held:
        for _ in range(2):
            async with joined(held.sessions, join_id="k" * 16, alone=False) as (second, _):
                ended = await end_of(second)
            assert isinstance(ended, SessionEnded)
            assert ended.code == GoawayCode.LIMIT
            assert ended.message.startswith("1 sessions of yours are open at this agent")
        await held.echo(b"the first one goes on")
        assert (held.sessions.opened, held.sessions.refused) == (1, 2)
        async with joined(held.sessions, "m", join_id="m" * 16, alone=False) as (mallory, _):
            await mallory.wait_established()
    assert (len(held.sessions.accounts), len(held.sessions.accounts._retired)) == (0, 2)
    await asyncio.to_thread(audit.close)
    first, rest = written(tmp_path / "audit")
    assert (first["limit"], first["verb"], first["user"]) == ("sessions", "limit", "alice")
    assert rest["omitted"] == 1


async def test_l24_a_lost_session_without_streams_makes_room_for_its_own_user() -> None:
    async with holding(accounts=limited(sessions=1)) as held:
        held.io.finish()
        await held.until(lambda: held.old.streams == 0)
        await held.cut()
        async with joined(held.sessions, join_id="k" * 16, alone=False) as (second, _):
            await second.wait_established()
            await held.until(lambda: len(held.sessions) == 1 and held.sessions.detached == 0)
            await resume_fails(held)


async def resume_fails(held: Held) -> None:
    with pytest.raises(SessionEnded) as caught:
        await resume(held.sessions, held.client, join_id="n" * 16)
    assert caught.value.code == GoawayCode.GONE


async def test_l25_when_the_days_bytes_are_used_up_what_runs_ends_and_nothing_new_begins() -> None:
    targets = TcpTargets(read_targets({"db": TargetConfig("127.0.0.1:1", groups=("dev",))}), AuditLog(""))
    async with holding(accounts=limited(bytes_per_day=100_000), targets=targets) as held:
        await held.echo(b"x" * 10_000)
        await held.io.write(b"x" * 60_000)  # and as much comes back
        assert await _read_until_reset(held.io) == ResetCode.LIMIT
        tcp = StreamIO()
        held.client.open("tcp:db", tcp)
        assert await refusal_of(tcp) == ResetCode.LIMIT
        assert held.sessions.accounts.refusals[Limit.BYTES_PER_DAY] == 1
        assert not held.client.closed, "the session itself goes on: its next request is refused in words"


async def _read_until_reset(io: StreamIO) -> int:
    async with asyncio.timeout(10):
        while True:
            try:
                await io.read()
            except StreamReset as reset:
                return reset.code


async def test_l25_bytes_are_paced_over_all_sessions_of_a_user() -> None:
    accounts = limited(bytes_per_second_to_cluster=100_000, bytes_per_second_to_user=100_000)
    async with holding(accounts=accounts) as held:  # noqa: SIM117  the one is made by the other
        async with joined(held.sessions, join_id="k" * 16, alone=False) as (second, _):
            await second.wait_established()
            io = StreamIO()
            second.open("kubernetes", io)
            for wire in (held.io, io):
                data = os.urandom(80_000)
                await wire.write(data)
                got = b""
                while len(got) < len(data):
                    got += await wire.read()
                assert got == data, "later, and whole"
    assert accounts.paced_seconds["to_cluster"] > 0
    assert accounts.paced_seconds["to_user"] > 0
    assert sum(accounts.refusals.values()) == 0


async def test_a_renewal_changes_the_limits_of_the_session() -> None:
    accounts = limited(streams=1, groups={"ops": LimitsOverrideConfig(streams=2)})
    async with holding(accounts=accounts) as held:
        over = StreamIO()
        held.client.open("kubernetes", over)
        assert await refusal_of(over) == ResetCode.LIMIT
        held.judge.add("ops", "alice", "ops", issued=1500.0)
        held.client.authenticate(Auth(kind="oidc", token="ops"))
        await asyncio.wait_for(held.handler.accepted_again.wait(), 10)
        second = StreamIO()
        held.client.open("kubernetes", second)
        await second.write(b"x")
        assert await second.read() == b"x"


# -- tokens that are bound to a key (docs/threats.md#T30, docs/threats.md#T32) -----------------------------------------

KEY = ProofKey.generate()


def bound_token(key: ProofKey = KEY, **changes: Any) -> str:
    return issuing.token(issuing.claims(**{"nonce": key.nonce(), **changes}))


def proving(text: str, *, key: ProofKey = KEY, now: float = 1000.0) -> AuthMaker:
    """AUTH as an honest client makes it: about the certificate that the agent shows."""
    return lambda shown: Auth(token=text, proof=key.sign_proof(text, spki_of(shown), CA.pin, now))


def real_sessions(clock: Clock, audit: AuditLog | None = None, policy: ProofPolicy = ProofPolicy.IF_BOUND) -> Sessions:
    verifier = TokenVerifier(parse(issuing.CONFIG), issuing.Issuer().fetch, clock, monotonic=clock)
    judge = Authenticator(
        None,  # type: ignore[arg-type]
        verifier,
        token_mode=False,
        proofs=ProofChecker(policy, "the agent", clock=clock),
        clock=clock,
    )
    return make_sessions(judge, clock, audit=audit)[0]  # type: ignore[arg-type]


def lose(client: MuxSession) -> None:
    assert client.transport is not None
    client.transport.abort()


async def reason_of(client: MuxSession) -> str:
    ended = await end_of(client)
    assert isinstance(ended, SessionEnded)
    assert ended.code == GoawayCode.UNAUTHENTICATED
    return refusal_in(ended.message)


async def test_t30_the_holder_of_the_key_is_served(tmp_path: Path) -> None:
    audit = AuditLog(str(tmp_path / "audit"))
    sessions = real_sessions(Clock(), audit)
    async with joined(sessions, proving(bound_token())) as (client, handler):
        await client.wait_established()
        assert handler.accepted[0].subject == "oidc:alice"
        assert sessions.authenticator.proofs.taken["nonce"] == 1
    audit.close()


async def test_t30_a_stolen_token_is_refused_and_recorded(tmp_path: Path) -> None:
    audit = AuditLog(str(tmp_path / "audit"))
    sessions = real_sessions(Clock(), audit)
    text = bound_token()
    for stolen, reason in (
        (lambda shown: Auth(token=text), "missing"),
        (proving(text, key=ProofKey.generate()), "key"),
        (proving(text, now=1000.0 - IAT_WINDOW - 1), "iat"),
        (proving(text, now=1000.0 + IAT_WINDOW + 1), "iat"),
    ):
        async with joined(sessions, stolen) as (client, _):
            assert await reason_of(client) == reason
    audit.close()
    records = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    refused = [one for one in records if one.get("outcome") == "refused"]
    assert len(refused) == 4
    assert {(one["user"], one["verb"], one["bound"]) for one in refused} == {("oidc:alice", "authenticate", "nonce")}
    assert not any(text in line for line in (tmp_path / "audit").read_text().splitlines())


async def test_t32_what_one_agent_saw_is_worth_nothing_at_another() -> None:
    """The second agent replays AUTH word for word, as one would that collects them."""
    seen: list[Auth] = []

    def make(shown: bytes) -> Auth:
        seen.append(proving(bound_token())(shown))
        return seen[-1]

    first, second = real_sessions(Clock()), real_sessions(Clock())
    async with joined(first, make) as (client, _):
        await client.wait_established()
    other = CA.issue_server(["one.cluster.arcbridge"])
    context = inner_server_context(other.certificate_pem, other.key_pem)
    assert Peer(context.spki, CA.pin) != PEER
    handler = ClientSide()
    client = MuxSession(Side.INITIATOR, Kind.SESSION, handler, label="x")
    client.authenticate(seen[0])
    await _join(second, client.protocol, "x", "", context)
    assert await reason_of(client) == "peer"
    await second.close()


async def test_t32_each_connection_of_a_session_has_a_proof_of_its_own() -> None:
    sessions = real_sessions(Clock())
    text = bound_token()
    async with joined(sessions, proving(text)) as (client, handler):
        io = StreamIO()
        client.open("kubernetes", io)
        await io.write(b"before")
        assert await io.read() == b"before"
        lose(client)
        await handler.away.wait()
        # The thief of token and secret has no key; the session waits on.
        answer = await knock(sessions, asks_for(client), text)
        assert isinstance(answer, Goaway)
        assert refusal_in(answer.message) == "missing"
        assert sessions.detached == 1
        # The agent's certificate was renewed meanwhile: the proof is about the one that this connection showed.
        leaf = CA.issue_server(["one.cluster.arcbridge"])
        renewed = inner_server_context(leaf.certificate_pem, leaf.key_pem)
        await resume(sessions, client, proving(text), server=renewed)
        await io.write(b"after")
        assert await io.read() == b"after"
        # And so is that of a renewal.
        newer = bound_token(iat=1001)
        client.authenticate(proving(newer)(peer_certificate(client.transport)))
        async with asyncio.timeout(5):
            await handler.accepted_again.wait()
        assert not client.closed


async def test_t32_a_renewal_needs_a_proof_as_well() -> None:
    sessions = real_sessions(Clock())
    for unproved, reason in (
        (Auth(token=bound_token(iat=1001)), "missing"),
        (Auth(token=bound_token(iat=1001), proof=KEY.sign_proof(bound_token(), PEER.spki, PEER.pin, 1000.0)), "ath"),
    ):
        async with joined(sessions, proving(bound_token())) as (client, _):
            await client.wait_established()
            client.authenticate(unproved)
            assert await reason_of(client) == reason


async def test_t32_a_renewal_from_before_a_loss_changes_nothing(tmp_path: Path) -> None:
    """It is sent again with the rest, and what it says about the time is old then. That is no theft, and gets no
    record; another user's token is none that is sent again."""
    clock = Clock()
    audit = AuditLog(str(tmp_path / "audit"))
    sessions = real_sessions(clock, audit)
    async with joined(sessions, proving(bound_token())) as (client, handler):
        await client.wait_established()
        lose(client)
        await handler.away.wait()
        client.authenticate(
            proving(bound_token(iat=1001), now=1000.0 - IAT_WINDOW - 1)(ssl.PEM_cert_to_DER_cert(LEAF.certificate_pem))
        )
        await resume(sessions, client, proving(bound_token()))
        io = StreamIO()
        client.open("kubernetes", io)
        await io.write(b"on")
        assert await io.read() == b"on"
        assert sessions.authenticator.proofs.refused["iat"] == 1
        assert not client.closed
        for _ in range(3):
            client.authenticate(Auth(token=bound_token(iat=1001)))
            await io.write(b"on")
            assert await io.read() == b"on"
        async with asyncio.timeout(5):
            while not sessions.authenticator.proofs.refused["missing"]:
                await asyncio.sleep(0.005)
        assert not client.closed
        client.authenticate(Auth(token=bound_token(sub="bob")))
        assert await reason_of(client) == "missing"
    audit.close()
    (record,) = [one for one in written(tmp_path / "audit") if one.get("outcome") == "refused"]
    assert (record["user"], record["bound"]) == ("oidc:bob", "nonce")


@pytest.mark.parametrize("policy", [ProofPolicy.REQUIRED, ProofPolicy.OFF])
async def test_t31_the_other_settings(policy: ProofPolicy) -> None:
    sessions = real_sessions(Clock(), policy=policy)
    required = policy is ProofPolicy.REQUIRED
    async with joined(sessions, proving(bound_token()), alone=False) as (client, _):
        if required:
            await client.wait_established()
        else:
            assert await reason_of(client) == "off"
    async with joined(sessions, issuing.token(issuing.claims())) as (client, _):
        if required:
            assert await reason_of(client) == "unbound"
        else:
            await client.wait_established()


async def test_t30_an_older_agent_passes_over_the_proof() -> None:
    """A token that is bound is a bearer token there, as it was before."""
    judge, text = FakeAuthenticator(), bound_token()
    judge.add(text, "alice")
    sessions, _ = make_sessions(judge, Clock())
    async with joined(sessions, proving(text)) as (client, handler):
        await client.wait_established()
        assert handler.accepted[0].subject == "alice"


async def test_t30_an_older_client_is_served_with_an_unbound_token_alone() -> None:
    sessions = real_sessions(Clock())
    async with joined(sessions, issuing.token(issuing.claims()), alone=False) as (client, _):
        await client.wait_established()
    async with joined(sessions, bound_token()) as (client, _):
        ended = await end_of(client)
        assert "update arcbridge here" in ended.message

"""Sessions over one connection: AUTH, one subject until the token's expiry, streams, the end
(docs/threats.md#T5, docs/threats.md#M13).
"""

from __future__ import annotations

import asyncio
import socket

import pytest

from arcbridge.agent import agent_session
from arcbridge.agent import sessions as module
from arcbridge.errors import ArcbridgeError, ConnectionLost, PermissionRefused, SessionEnded, Unreachable
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.records import Auth
from tests.support.eventually import until
from tests.support.stream_io import StreamIO

from .pair import SERVER, Clock, FakeAuthenticator, end_of, joined, make_sessions, opened, renew, reset_of, used


async def test_accepted_and_served_as_the_caller() -> None:
    judge = FakeAuthenticator()
    judge.add("t", "alice", "dev")
    sessions, proxy = make_sessions(judge, Clock())
    async with joined(sessions) as (client, handler):
        await used(client, b"hello")
        assert handler.accepted[0].subject == "alice"
        assert handler.accepted[0].expires_in == 1000
        assert proxy.callers[0].identity.groups == ("dev",)
        assert proxy.callers[0].session == "j" * 16
        assert len(sessions) == 1
    assert len(sessions) == 0


async def test_nothing_is_served_before_auth_is_accepted() -> None:
    judge = FakeAuthenticator(t="alice")
    judge.hold = asyncio.Event()
    sessions, proxy = make_sessions(judge, Clock())
    async with joined(sessions, wait=False) as (client, _):
        io = opened(client, "kubernetes")
        await io.write(b"hello")
        await until(lambda: judge.asked)
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
    async with joined(sessions, wait=False) as (client, _):
        client.open("kubernetes", StreamIO())
        ended = await end_of(client)
        assert ended.code == code
        assert ended.message == (error.message if error else "not known")
    assert proxy.callers == []
    assert sessions.counters.refused == 1


async def test_a_token_that_has_lapsed_is_refused() -> None:
    judge = FakeAuthenticator()
    judge.add("t", "alice", expires=999.0)
    sessions, _ = make_sessions(judge, Clock())
    async with joined(sessions) as (client, _):
        assert "expired" in (await end_of(client)).message


async def test_the_session_ends_with_its_token_by_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_session, "CLOCK_CHECK", 0.01)
    judge, clock = FakeAuthenticator(), Clock()
    judge.add("t", "alice", expires=1100.0)
    sessions, _ = make_sessions(judge, clock)
    async with joined(sessions) as (client, _):
        io = opened(client, "kubernetes")
        await asyncio.sleep(0.05)
        assert not client.closed
        clock.now = 1100.0
        assert (await end_of(client)).code == GoawayCode.EXPIRED
        with pytest.raises(SessionEnded):
            await io.read()
    assert sessions.counters.expired == 1


async def test_a_renewal_leaves_no_gap_and_its_groups_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_session, "CLOCK_CHECK", 0.01)
    judge, clock = FakeAuthenticator(), Clock()
    judge.add("t", "alice", "dev", "ops", expires=1100.0)
    judge.add("t2", "alice", "dev", expires=1500.0)
    sessions, proxy = make_sessions(judge, clock)
    async with joined(sessions) as (client, handler):
        io = await used(client)
        await renew(client, handler, "t2")
        clock.now = 1200.0
        await asyncio.sleep(0.05)
        await io.write(b"y")
        assert await io.read() == b"y"
        assert proxy.callers[0].identity.groups == ("dev",)


async def test_a_renewal_by_another_subject_ends_the_session() -> None:
    sessions, _ = make_sessions(FakeAuthenticator(t="alice", t2="mallory"), Clock())
    async with joined(sessions) as (client, _):
        client.authenticate(Auth(kind="oidc", token="t2"))
        assert (await end_of(client)).code == GoawayCode.FORBIDDEN


async def test_a_renewal_in_another_mode_ends_the_session() -> None:
    judge = FakeAuthenticator(t="alice")
    judge.add("t2", "alice", token_mode=True)
    sessions, _ = make_sessions(judge, Clock())
    async with joined(sessions) as (client, _):
        client.authenticate(Auth(kind="bearer", token="t2"))
        assert isinstance(await end_of(client), SessionEnded)


async def test_a_renewal_that_cannot_be_judged_now_changes_nothing() -> None:
    judge = FakeAuthenticator(t="alice")
    judge.known["t2"] = Unreachable("issuer down")
    sessions, _ = make_sessions(judge, Clock())
    async with joined(sessions) as (client, _):
        client.authenticate(Auth(kind="oidc", token="t2"))
        await until(lambda: len(judge.asked) >= 2)
        await asyncio.sleep(0.02)
        assert not client.closed


async def test_unknown_targets() -> None:
    sessions, _ = make_sessions(FakeAuthenticator(t="alice"), Clock())
    async with joined(sessions) as (client, _):
        for target in ("node", "tcp:none", "tcp:", "10.0.0.1:22"):
            io = opened(client, target)
            assert await reset_of(io) == ResetCode.UNKNOWN_TARGET


async def test_drain_lets_streams_finish() -> None:
    sessions, _ = make_sessions(FakeAuthenticator(t="alice"), Clock())
    async with joined(sessions) as (client, _):
        io = await used(client)
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


async def test_j32_connections_that_one_relay_joined_keep_no_other_relay_s_users_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None of them has waited for long: a hostile relay makes new ones as fast as the old ones would have to leave."""
    monkeypatch.setattr(module, "MAX_UNAUTHENTICATED", 3)
    judge, monotonic = FakeAuthenticator(), Clock()
    judge.add("t", "alice")
    sessions, _ = make_sessions(judge, Clock(), monotonic=monotonic)
    pairs = [socket.socketpair() for _ in range(3)]
    silent = []
    for _, theirs in pairs:
        theirs.setblocking(False)
        silent.append(asyncio.ensure_future(sessions.serve(theirs, SERVER, "silent", via="hostile:443")))
        await asyncio.sleep(0)
        monotonic.now += 0.1
    assert not sessions.accepts_connection("hostile:443")
    assert sessions.accepts_connection("honest:443")
    async with joined(sessions, "t", via="honest:443") as (client, handler):
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(silent[0], 5)
        await until(lambda: handler.accepted)
        assert not client.closed
        assert not silent[1].done()
        for ours, _ in pairs:
            ours.close()
        await asyncio.gather(*silent, return_exceptions=True)


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
    async with joined(sessions, None, wait=False) as (stalled, _):
        assert not sessions.accepts_connection(may_come_back=True)
        monotonic.now += module.STALLED
        assert sessions.accepts_connection()
        async with joined(sessions, "t") as (client, handler):
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(silent, 5)
            await until(lambda: handler.accepted)
            assert not stalled.closed
            assert not client.closed
            monotonic.now += module.STALLED
            monkeypatch.setattr(module, "MAX_UNAUTHENTICATED", 1)
            async with joined(sessions, "t"):
                assert (await end_of(stalled)).code == GoawayCode.LIMIT
    ours.close()

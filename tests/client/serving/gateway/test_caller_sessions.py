"""One session for each caller and cluster: no caller gets another one's, and their number is bounded."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path

import pytest

from arcbridge.client.serving.gateway import caller_sessions
from arcbridge.client.serving.gateway.caller_tokens import CallerTokens
from arcbridge.client.session.session_manager import TARGET
from arcbridge.client.session.trust import ClusterTrust
from arcbridge.errors import ArcbridgeError, OverLimit, PermissionRefused, Unauthenticated, Unreachable
from arcbridge.mux.session import MuxSession
from arcbridge.net.join import JoinCode
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import JoinReply
from tests.client.far_side import CLUSTER
from tests.client.serving.gateway.station import REFUSED, Station, station
from tests.client.session.test_session_manager import jwt_like
from tests.support.eventually import until

ALICE = CallerTokens("relay-alice", "cluster-alice")
BOB = CallerTokens("relay-bob", "cluster-bob")


async def session_of(place: Station, tokens: CallerTokens) -> MuxSession:
    async with place.sessions.session(tokens, CLUSTER, "192.0.2.1") as session:
        return session


async def test_each_caller_has_a_session_of_its_own(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        first = await asyncio.gather(*(session_of(place, one) for one in (ALICE, BOB) * 10))
        assert first[0::2] == [first[0]] * 10
        assert first[1::2] == [first[1]] * 10
        assert first[0] is not first[1]
        assert {auth.token for auth in place.far.auths} == {"cluster-alice", "cluster-bob"}
        assert len(place.far.auths) == 2
        assert sorted(request.token for request in place.far.requests) == ["relay-alice", "relay-bob"]
        assert place.sessions.attempts == {"established": 2}


@pytest.mark.parametrize(
    "other", [CallerTokens("relay-mallory", "cluster-alice"), CallerTokens("relay-alice", "cluster-mallory")]
)
async def test_one_token_of_another_caller_leads_to_no_session_of_his(tmp_path: Path, other: CallerTokens) -> None:
    """A claim chooses nothing either: tokens that say the same of their holder are other texts."""
    async with station(tmp_path) as (place, _):
        assert await session_of(place, ALICE) is not await session_of(place, other)
        assert len(place.sessions) == 2


async def test_a_refused_token_is_not_asked_about_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with station(tmp_path) as (place, _):
        for _ in range(5):
            with pytest.raises(Unauthenticated):
                await session_of(place, CallerTokens("r", REFUSED))
        assert len(place.far.auths) == 1
        assert len(place.sessions) == 0
        monkeypatch.setattr(place.sessions, "_failures", type(place.sessions._failures)())
        with pytest.raises(Unauthenticated):
            await session_of(place, CallerTokens("r", REFUSED))
        assert len(place.far.auths) == 2
        assert place.sessions.attempts == {"failed": 2}


@pytest.mark.parametrize("after_a_session", [False, True])
async def test_a_refusal_that_is_repeated_keeps_no_request_alive(tmp_path: Path, after_a_session: bool) -> None:
    """The same error is raised for each of them: its traceback would hold the frames of all, with their headers."""

    class Request:
        pass

    async def refused(tokens: CallerTokens) -> weakref.ref[Request]:
        request = Request()
        with pytest.raises(ArcbridgeError):
            await session_of(place, tokens)
        return weakref.ref(request)

    async with station(tmp_path) as (place, _):
        if after_a_session:
            await session_of(place, ALICE)
            place.far.reply = JoinReply(code=JoinCode.NO_AGENT)
            place.far.sessions[0].abort()
            one = next(iter(place.sessions._sessions.values()))
            await until(lambda: one.manager.failure is not None)
        tokens = ALICE if after_a_session else CallerTokens("r", REFUSED)
        requests = [await refused(tokens) for _ in range(20)]
        await until(lambda: not place.sessions._ending)
        gc.collect()
        assert [request() for request in requests] == [None] * 20


async def test_a_cluster_that_the_gateway_does_not_know(tmp_path: Path) -> None:
    """Its caller cannot give a pin, and nothing was sent there."""
    async with station(tmp_path) as (place, _):
        place.trust = ClusterTrust()
        for _ in range(5):
            with pytest.raises(Unreachable, match="its operator has to put the cluster's pin in order") as found:
                await session_of(place, ALICE)
            assert found.value.status_code == 503
        assert len(place.far.requests) == 1, "relay and agent are not asked again at once"


async def test_the_relay_decides_about_the_callers_token(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        place.far.reply = JoinReply(code=JoinCode.FORBIDDEN)
        with pytest.raises(PermissionRefused, match="does not exist or you may not reach it"):
            await session_of(place, ALICE)
        assert [request.token for request in place.far.requests] == ["relay-alice"]
        assert not place.far.auths


async def test_a_session_that_its_agent_ends_for_its_token_is_over(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        await session_of(place, ALICE)
        place.far.sessions[0].close(GoawayCode.EXPIRED, "the token has expired")
        await until(lambda: all(one.is_over for one in place.sessions._sessions.values()))
        place.sessions.end_idle()
        assert len(place.sessions) == 0


async def test_what_an_agent_lets_drain_outlives_the_relays_token(tmp_path: Path) -> None:
    """An agent is rolled, and the relay refuses the next session; exec and logs go on in the former one."""
    async with station(tmp_path) as (place, _):
        async with place.sessions.session(ALICE, CLUSTER, "192.0.2.1") as draining:
            stream = draining.open(TARGET, asyncio.Protocol())
            await until(lambda: place.far.streams)
            place.far.reply = JoinReply(code=JoinCode.UNAUTHENTICATED)
            place.far.sessions[0].goaway(GoawayCode.DRAINING)
            await until(lambda: all(one.is_over for one in place.sessions._sessions.values()))
            place.sessions.end_idle()
            with pytest.raises(Unauthenticated):
                await session_of(place, ALICE)
            assert not place.sessions._sessions
            assert (len(place.sessions), place.sessions.requests) == (1, 1)
            stream.write(b"GET / HTTP/1.1\r\nUpgrade: websocket\r\n\r\n")
            await until(lambda: place.far.heads)
            assert not draining.closed
            assert not stream.is_closing()
        assert (len(place.sessions), place.sessions.requests) == (0, 0)
        await until(lambda: draining.closed)


async def test_a_session_ends_when_it_idles(tmp_path: Path) -> None:
    async with station(tmp_path, idle=0.0) as (place, _):
        async with place.sessions.session(ALICE, CLUSTER, "192.0.2.1") as session:
            await session_of(place, BOB)
            place.sessions.end_idle()
            assert len(place.sessions) == 1, "one that is in use stays"
            assert session.usable
        place.sessions.end_idle()
        assert len(place.sessions) == 0
        await until(lambda: session.closed)


async def test_what_idles_makes_room(tmp_path: Path) -> None:
    async with station(tmp_path, most=2) as (place, _):
        carol, dave = CallerTokens("r", "carol"), CallerTokens("r", "dave")
        first = await session_of(place, ALICE)
        async with place.sessions.session(BOB, CLUSTER, "192.0.2.1"):
            async with place.sessions.session(carol, CLUSTER, "192.0.2.1"):
                await until(lambda: first.closed)
                with pytest.raises(Unreachable, match="as many sessions as it may"):
                    await session_of(place, dave)
            await session_of(place, dave)
        assert len(place.sessions) == 2


async def test_the_bounds_of_one_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller_sessions, "REQUESTS", 2)
    monkeypatch.setattr(caller_sessions, "SESSIONS_OF_CALLER", 1)
    async with station(tmp_path) as (place, _):
        async with place.sessions.session(ALICE, CLUSTER, "a"), place.sessions.session(ALICE, CLUSTER, "a"):
            with pytest.raises(OverLimit, match="2 requests to cluster"):
                await session_of(place, ALICE)
            await session_of(place, BOB)
            monkeypatch.setattr(caller_sessions, "REQUESTS_OF_CALLER", 2)
            with pytest.raises(OverLimit, match="2 requests under way at this gateway"):
                async with place.sessions.session(ALICE, "other", "a"):
                    pass
        with pytest.raises(OverLimit, match="sessions to 1 clusters"):
            async with place.sessions.session(ALICE, "other", "a"):
                pass
        await session_of(place, ALICE)


async def test_made_up_tokens_cost_a_bounded_number_of_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller_sessions, "NEW_SESSIONS", 5)
    monkeypatch.setattr(caller_sessions, "NEW_SESSIONS_PER_SECOND", 0.001)
    monkeypatch.setattr(caller_sessions, "FAILURES", 3)
    async with station(tmp_path) as (place, _):
        place.far.reply = JoinReply(code=JoinCode.UNAUTHENTICATED)
        errors: list[ArcbridgeError] = []
        for n in range(50):
            try:
                await session_of(place, CallerTokens(f"made-up-{n}", "c"))
            except ArcbridgeError as error:
                errors.append(error)
        assert [type(error) for error in errors] == [Unauthenticated] * 5 + [OverLimit] * 45
        assert len(place.far.requests) == 5
        assert len(place.sessions._failures) == 3
        place.far.reply = JoinReply()
        async with place.sessions.session(ALICE, CLUSTER, "198.51.100.7"):
            pass  # another address has its own


async def test_made_up_tokens_do_not_keep_out_a_user_who_was_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are behind one tool, and tokens are renewed every few minutes."""
    monkeypatch.setattr(caller_sessions, "NEW_SESSIONS", 3)
    monkeypatch.setattr(caller_sessions, "NEW_SESSIONS_PER_SECOND", 0.001)
    monkeypatch.setattr(caller_sessions, "RENEWALS", 2)
    monkeypatch.setattr(caller_sessions, "RENEWALS_PER_SECOND", 0.001)

    def tokens(user: str, mark: str) -> CallerTokens:
        return CallerTokens(f"relay-{user}", jwt_like(600, mark, iss="https://issuer", sub=user))

    async with station(tmp_path) as (place, _):
        await session_of(place, tokens("alice", "1"))
        await session_of(place, CallerTokens("relay-opaque", "no-jwt"))
        await session_of(place, tokens("bob", "1"))
        for kept_out in (tokens("mallory", "1"), CallerTokens("relay-opaque", "another")):
            with pytest.raises(OverLimit):
                await session_of(place, kept_out)
        for mark in "23":
            await session_of(place, tokens("alice", mark))
        with pytest.raises(OverLimit):
            await session_of(place, tokens("alice", "4"))  # made up in alice's name: bounded, and bob's is his own
        await session_of(place, tokens("bob", "2"))


async def test_a_request_that_is_cancelled_affects_no_other(tmp_path: Path) -> None:
    async with station(tmp_path) as (place, _):
        place.far.answers.clear()
        loop = asyncio.get_running_loop()
        first, second = (loop.create_task(session_of(place, ALICE)) for _ in range(2))
        await place.far.joined.wait()
        first.cancel()
        place.far.answers.set()
        assert (await second).usable
        assert first.cancelled()


async def test_sweep_runs_until_it_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller_sessions, "SWEEP", 0.001)
    async with station(tmp_path, idle=0.0) as (place, _):
        sweeping = asyncio.get_running_loop().create_task(place.sessions.sweep())
        await session_of(place, ALICE)
        await until(lambda: len(place.sessions) == 0)
        sweeping.cancel()

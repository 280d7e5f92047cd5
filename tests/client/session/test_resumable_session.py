"""A session over several connections: what was lost is sent again, what cannot be resumed ends with a reason."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.session import detachment, resumable_session
from arcbridge.errors import PinMismatch, SessionEnded, Unauthenticated, Unreachable
from arcbridge.mux.connection import Migration
from arcbridge.net.backoff import Backoff
from arcbridge.net.join import JoinCode
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.limits import Limits
from arcbridge.wire.records import JoinReply
from tests.client.echo_stream import BACK, OVER, WAITS, Lines, Stream, events
from tests.client.far_side import OTHER_CA, FarSide
from tests.client.session.test_session_manager import echo, echo_again, make, running, streaming
from tests.support.eventually import until

pytestmark = pytest.mark.usefixtures("soon")


class TestResuming:
    async def test_nothing_is_lost(self, far: FarSide, tmp_path: Path, lines: Lines) -> None:
        async def cut() -> None:
            far.cut()

        async with streaming(far, tmp_path) as (session, stream):
            mux = session.current
            for number in range(1, 4):
                await stream.during(cut)
                await until(lambda wanted=number: session.counters.resumed == wanted)
            assert session.current is mux
            assert session.replayed_bytes > 0
            assert sum(session.counters.detached_seconds.counts) == 3
            assert (session.counters.established, session.detached_count, session.failure) == (1, 0, None)
        assert [request.instance for request in far.requests] == ["", "pod-1", "pod-1", "pod-1"]
        assert events(lines, WAITS, BACK, OVER, "session lost") == [WAITS, BACK] * 3
        waits, back = (next(line for line in lines if line["event"] == event) for event in (WAITS, BACK))
        assert (waits["cluster"], waits["streams"], back["relay"]) == ("prod", 1, f"127.0.0.1:{far.port}")
        assert "the connection was lost" in waits["reason"]

    async def test_through_another_relay(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        async def kill() -> None:
            await far.stop_listening()
            far.cut()

        async with streaming(far, tmp_path, others=(second,)) as (session, stream):
            assert session.relay is session.connector.relays.all[0]
            await stream.during(kill)
            assert session.relay is session.connector.relays.all[1]
            assert session.counters.resumed == 1
        assert [request.instance for request in second.requests] == ["pod-1"]

    async def test_the_token_is_read_again(self, far: FarSide, tmp_path: Path) -> None:
        async with streaming(far, tmp_path) as (_session, stream):
            (tmp_path / "id").write_text("a-newer-token")
            (tmp_path / "access").write_text("a-newer-access-token")
            far.cut()
            await stream.check(b"more")
        assert [auth.token for auth in far.auths] == ["the-id-token", "a-newer-token"]
        assert [request.token for request in far.requests] == ["the-access-token", "a-newer-access-token"]

    async def test_a_resumption_renews(self, far: FarSide, tmp_path: Path) -> None:
        far.auth_answer = replace(far.auth_answer, expires_in=3600)
        async with streaming(far, tmp_path) as (session, stream):
            far.auth_answer = replace(far.auth_answer, expires_in=7200)
            far.cut()
            await stream.check(b"more")
            (resumable,) = session._sessions.values()
            assert resumable.renewal.schedule.ends_at - asyncio.get_running_loop().time() > 7000

    async def test_refused_for_now(self, far: FarSide, tmp_path: Path, lines: Lines) -> None:
        far.resume_refusals = [(GoawayCode.UNAVAILABLE, "not yet"), (GoawayCode.LIMIT, "not yet")]
        async with streaming(far, tmp_path) as (_session, stream):
            far.cut()
            await stream.check(b"more")
            assert far.resume_refusals == []
        assert events(lines, WAITS, BACK, OVER, "no session") == [WAITS, BACK]

    async def test_a_relay_that_does_not_know_the_cluster_yet(
        self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A relay with a registry of its own learns of the cluster from the agent's next connection."""
        monkeypatch.setattr(detachment, "FORBIDDEN_TIMEOUT", 60.0)
        async with streaming(far, tmp_path) as (_session, stream):
            far.reply = JoinReply(code=JoinCode.FORBIDDEN)
            far.cut()
            await until(lambda: len(far.requests) >= 3)
            far.reply = JoinReply()
            await stream.check(b"more")

    @pytest.mark.parametrize("why", ["lost", "moved"])
    async def test_lost_again_at_once(self, far: FarSide, tmp_path: Path, lines: Lines, why: str) -> None:
        far.deaths_behind_a_resumption = 10
        async with streaming(far, tmp_path) as (session, stream):
            if why == "lost":
                far.cut()
            else:
                far.sessions[0].migration.ask()
            await until(lambda: not far.deaths_behind_a_resumption)
            await stream.check(b"more")
            await until(lambda: session.current is not None and not session.detached_count)
        seen = events(lines, WAITS, BACK, OVER)
        assert seen == [WAITS, BACK] * (len(seen) // 2)

    async def test_lost_in_the_turn_in_which_it_was_attached(
        self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Lines
    ) -> None:
        attached, times = Migration.wait, 3

        async def wait(migration: Migration) -> None:
            nonlocal times
            await attached(migration)
            if times:
                times -= 1
                session = migration._session
                assert session.connection is not None
                session.connection_lost(session.connection, ConnectionResetError())

        monkeypatch.setattr(Migration, "wait", wait)
        async with streaming(far, tmp_path) as (session, stream):
            far.cut()
            await until(lambda: not times)
            await stream.check(b"more")
            await until(lambda: session.current is not None and not session.detached_count)
        assert events(lines, WAITS, BACK, OVER) == [WAITS, BACK]

    async def test_an_agent_that_does_not_answer(
        self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with streaming(far, tmp_path) as (session, stream):
            monkeypatch.setattr("arcbridge.client.session.connection.HANDSHAKE_DEADLINE", 0.1)
            far.silent_resume = True
            far.cut()
            await until(lambda: session.counters.failures >= 2)
            far.silent_resume = False
            monkeypatch.undo()
            await stream.check(b"more")

    async def test_another_ca_gets_no_token(self, far: FarSide, tmp_path: Path) -> None:
        async with streaming(far, tmp_path) as (session, stream):
            far.says_ca = far.shows_ca = OTHER_CA
            far.cut()
            await until(lambda: isinstance(session.failure, PinMismatch))
            assert len(far.auths) == 1
            far.says_ca = far.shows_ca = far.trusted_ca
            await stream.check(b"more")

    async def test_a_draining_session(self, far: FarSide, tmp_path: Path) -> None:
        async def cut() -> None:
            far.cut()

        async with running(make(far, tmp_path)) as session:
            old = await Stream.open(session)
            far.sessions[0].goaway(GoawayCode.DRAINING)
            await until(lambda: session.counters.established == 2 and session.current is not None)
            new = await Stream.open(session)
            await asyncio.gather(old.during(cut), new.during(cut))
            assert len(session.sessions()) == 2


class TestTheEnd:
    async def test_the_agent_no_longer_has_it(self, far: FarSide, tmp_path: Path, lines: Lines) -> None:
        async with streaming(far, tmp_path) as (session, stream):
            far.sessions[0].abort()
            error = await stream.end()
            assert isinstance(error, SessionEnded)
            assert error.code == GoawayCode.GONE
            assert await echo(session) == b"hello"
            assert session.counters.resume_failures["gone"] == 1
            assert len(session.sessions()) == 1
        assert events(lines, WAITS, BACK, OVER, "session lost") == [WAITS, OVER]

    async def test_the_agent_does_not_take_the_token(self, far: FarSide, tmp_path: Path) -> None:
        async with streaming(far, tmp_path) as (session, stream):
            far.resume_refusals = [(GoawayCode.UNAUTHENTICATED, "no")]
            far.auth_answer = (GoawayCode.UNAUTHENTICATED, "no")
            far.cut()
            assert isinstance(await stream.end(), SessionEnded)
            with pytest.raises(Unauthenticated, match="log in again"):
                await session.ready()
            assert session.counters.resume_failures["refused"] == 1

    async def test_it_waited_too_long(self, far: FarSide, tmp_path: Path, lines: Lines) -> None:
        session = make(far, tmp_path)
        session.connector.limits = Limits(detached_timeout=0.1)
        async with running(session):
            stream = await Stream.open(session)
            await far.stop_listening()
            far.cut()
            assert isinstance(await stream.end(), SessionEnded)
            await until(lambda: session.counters.resume_failures["timeout"] == 1)
            await far.start_listening()
            assert await echo_again(session) == b"hello"
        assert events(lines, WAITS, BACK, OVER) == [WAITS, OVER]

    async def test_nothing_to_keep(self, far: FarSide, tmp_path: Path, lines: Lines) -> None:
        async with running(make(far, tmp_path)) as session:
            await session.ready()
            far.cut()
            await until(lambda: session.counters.established == 2)
            assert await echo(session) == b"hello"
            assert [request.instance for request in far.requests] == ["", ""]
            assert session.counters.resumed == 0
        assert events(lines, WAITS, BACK, OVER, "session lost") == ["session lost"]

    async def test_without_resumption(self, far: FarSide, tmp_path: Path, lines: Lines) -> None:
        async with streaming(far, tmp_path, resumption=False) as (session, stream):
            far.cut()
            assert await stream.end() is not None
            assert await echo(session) == b"hello"
        assert events(lines, WAITS, BACK, OVER, "session lost") == ["session lost"]

    async def test_a_bug_ends_it(self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*arguments: object, **named: object) -> None:
            raise ZeroDivisionError

        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
        async with streaming(far, tmp_path) as (session, stream):
            monkeypatch.setattr(resumable_session, "join", broken)
            far.cut()
            assert await stream.end() is not None
            assert [type(context["exception"]) for context in told] == [ZeroDivisionError]
            assert await echo(session) == b"hello"

    async def test_closed_while_it_waits(self, far: FarSide, tmp_path: Path, lines: Lines) -> None:
        before = asyncio.all_tasks()
        async with streaming(far, tmp_path) as (session, stream):
            far.not_serving = True
            far.cut()
            await until(lambda: session.detached_count == 1)
        assert await stream.end() is not None
        await until(lambda: not session.sessions())
        assert events(lines, WAITS, BACK, OVER) == [WAITS]
        far.not_serving = False
        await until(lambda: asyncio.all_tasks() - before <= far._tasks)


class TestNoLongerAllowed:
    """The cluster was revoked, or the policy has changed, and the relay has cut the session."""

    async def test_streams_do_not_wait_for_what_will_not_come(
        self, far: FarSide, tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(detachment, "FORBIDDEN_TIMEOUT", 0.05)
        async with streaming(far, tmp_path) as (session, stream):
            far.reply = JoinReply(code=JoinCode.FORBIDDEN)
            far.cut()
            with pytest.raises(SessionEnded):
                await stream.check(b"more")
            assert session.detached_count == 0
        assert events(lines, WAITS, BACK, OVER) == [WAITS, OVER]

    async def test_a_session_that_is_asked_to_move_stays(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        async with streaming(far, tmp_path, others=(second,)) as (_session, stream):
            far.reply = second.reply = JoinReply(code=JoinCode.FORBIDDEN)
            far.sessions[0].migration.ask()
            await until(lambda: len(second.requests) >= 1)
            await stream.check(b"over the old one")


class TestAnotherAgent:
    """Relays have an agent of the cluster, but not the one with the session."""

    async def test_new_streams_go_to_it_and_old_ones_wait(self, far: FarSide, tmp_path: Path, lines: Lines) -> None:
        async with streaming(far, tmp_path) as (session, stream):
            far.absent = {"pod-1"}
            far.cut()
            await until(lambda: session.counters.established == 2)
            assert session.detached_count == 1
            assert await echo(session) == b"hello"
            far.absent = set()
            await stream.check(b"more")
        assert events(lines, WAITS, BACK, OVER, "no session", "session lost") == [WAITS, BACK]

    async def test_another_relay_has_it(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        async with streaming(far, tmp_path, others=(second,)) as (session, stream):
            second.absent = {"pod-1"}
            far.cut()
            await stream.check(b"more")
            assert (len(far.requests), len(second.requests), session.counters.established) == (2, 1, 1)

    async def test_after_an_outage_of_all_relays_it_has_more_time(
        self, far: FarSide, tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each agent comes back by a backoff of its own: another one may be there long before it."""
        monkeypatch.setattr(detachment, "MISSING_TIMEOUT", 0.0)
        async with streaming(far, tmp_path) as (session, stream):
            await far.stop_listening()
            far.cut()
            await until(lambda: session.current is None)
            with pytest.raises(Unreachable):
                await session.ready()
            far.absent = {"pod-1"}
            asked = len(far.requests)
            await far.start_listening()
            await until(lambda: len(far.requests) >= asked + 4)
            far.absent = set()
            await stream.check(b"more")
            # A later loss without an outage is judged by the short time again.
            far.absent = {"pod-1"}
            far.cut()
            assert isinstance(await stream.end(), SessionEnded)
        assert events(lines, WAITS, BACK, OVER) == [WAITS, BACK, WAITS, OVER]

    async def test_an_agent_that_said_it_stops_is_not_waited_for(
        self, far: FarSide, tmp_path: Path, lines: Lines
    ) -> None:
        async with streaming(far, tmp_path) as (session, stream):
            far.sessions[0].goaway(GoawayCode.DRAINING)
            await until(lambda: session.counters.established == 2 and session.current is not None)
            far.absent = {"pod-1"}
            far.cut()
            error = await stream.end()
            assert isinstance(error, SessionEnded)
            assert (error.code, "is being stopped" in error.message) == (GoawayCode.GONE, True)


class TestReady:
    async def test_it_gets_the_error_of_the_try_under_way(
        self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("arcbridge.client.session.session_manager.DETACHED_WAIT", 0.1)
        async with streaming(far, tmp_path) as (session, stream):
            await far.stop_listening()
            far.cut()
            await until(lambda: session.current is None)
            for _ in range(2):
                async with asyncio.timeout(20):
                    with pytest.raises(Unreachable):
                        await session.ready()
            await far.start_listening()
            await stream.check(b"more")
            assert session.counters.established == 1

    @pytest.mark.parametrize("patience", [0.0, 60.0])
    async def test_it_waits_for_the_resumption(
        self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float
    ) -> None:
        monkeypatch.setattr("arcbridge.client.session.session_manager.DETACHED_WAIT", patience)
        async with streaming(far, tmp_path) as (session, stream):
            mux = session.current
            far.silent_join = True
            far.joined.clear()
            far.cut()
            await far.joined.wait()
            asking = asyncio.ensure_future(session.ready())
            far.silent_join = False
            far.cut()
            if patience:  # the streams that run wait no longer than that as a rule, and nor does it
                assert await asking is mux
            else:  # the try under way failed, and the caller that waited got its error
                with pytest.raises(Unreachable):
                    await asking
            await stream.check(b"more")
            assert await session.ready() is mux

    async def test_a_waiting_caller_makes_it_try_again(
        self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("arcbridge.client.session.waiters.FAILURE_HOLD", 0.0)
        monkeypatch.setattr(
            resumable_session, "Backoff", lambda *, cap: Backoff(first=3600.0, cap=7200.0, random=lambda: 0.9)
        )
        async with streaming(far, tmp_path) as (session, stream):
            await far.stop_listening()
            far.cut()
            await until(lambda: session.counters.failures >= 1)
            await far.start_listening()
            async with asyncio.timeout(20):
                await session.ready()
            await stream.check(b"more")

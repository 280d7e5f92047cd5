"""A session whose connection still works, or may, goes to another one: asked by the agent, or after a sleep."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.session import resumable_session
from arcbridge.client.session.resumable_session import ResumableSession
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.client.session.sleep_detector import SleepDetector
from arcbridge.errors import SessionEnded, Unreachable
from arcbridge.mux.session import BaseHandler
from arcbridge.net.backoff import Backoff
from arcbridge.net.join import JoinCode
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import JoinReply
from tests.client.echo_stream import BACK, MOVED, OVER, WAITS, Lines, Stream, events
from tests.client.far_side import FarSide
from tests.client.session.test_session_manager import echo, make, running, streaming
from tests.support.eventually import until

pytestmark = pytest.mark.usefixtures("soon")


class TestMoving:
    async def test_another_relay_first(self, far: FarSide, second: FarSide, tmp_path: Path, lines: Lines) -> None:
        async def ask() -> None:
            far.sessions[0].migration.ask()

        async with streaming(far, tmp_path, others=(second,)) as (session, stream):
            await stream.during(ask)
            await until(lambda: session.counters.moved == 1)
            assert session.relay is session.connector.relays.all[1]
            far.cut()
            await stream.check(b"more")
            assert (session.counters.resumed, len(far.requests), len(second.requests)) == (0, 1, 1)
        assert events(lines, WAITS, BACK, OVER, MOVED) == [MOVED]

    async def test_it_stays_until_there_is_another(
        self, far: FarSide, second: FarSide, tmp_path: Path, lines: Lines
    ) -> None:
        far_reply = far.reply
        async with streaming(far, tmp_path, others=(second,)) as (session, stream):
            second.reply = JoinReply(code=JoinCode.NO_AGENT)
            far.reply = JoinReply(code=JoinCode.DRAINING)
            far.sessions[0].migration.ask()
            await until(lambda: len(second.requests) >= 3)
            await stream.check(b"over the old one")
            assert session.current is not None
            assert session.failure is None
            second.reply = far_reply
            await until(lambda: session.counters.moved == 1)
            await stream.check(b"over the new one")
        assert events(lines, WAITS, BACK, OVER, MOVED) == [MOVED]

    async def test_the_old_one_dies_meanwhile(
        self, far: FarSide, second: FarSide, tmp_path: Path, lines: Lines
    ) -> None:
        async with streaming(far, tmp_path, others=(second,)) as (session, stream):
            second.reply = far.reply = JoinReply(code=JoinCode.DRAINING)
            far.sessions[0].migration.ask()
            await until(lambda: len(second.requests) >= 1)
            far.cut()
            await until(lambda: session.detached_count == 1)
            second.reply = JoinReply()
            await stream.check(b"more")
        assert events(lines, WAITS, BACK, OVER, MOVED) == [WAITS, BACK]

    async def test_the_new_one_dies_before_it_is_attached(
        self, far: FarSide, second: FarSide, tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The old connection is gone by then: streams wait, and a caller that asks for a session gets the failure."""
        monkeypatch.setattr("arcbridge.client.session.session_manager.DETACHED_WAIT", 0.1)
        async with streaming(far, tmp_path, others=(second,)) as (session, stream):
            monkeypatch.setattr("arcbridge.client.session.connection.HANDSHAKE_DEADLINE", 0.1)
            far.silent_resume = True
            far.sessions[0].migration.ask()
            await until(lambda: session.detached_count == 1)
            with pytest.raises(Unreachable):
                await session.ready()
            far.silent_resume = False
            monkeypatch.undo()
            await stream.check(b"more")
        assert events(lines, WAITS, BACK, OVER, MOVED) == [WAITS, BACK]

    async def test_with_nothing_to_keep_a_fresh_session_first(
        self, far: FarSide, second: FarSide, tmp_path: Path
    ) -> None:
        async with running(make(far, tmp_path, others=(second,))) as session:
            old = await session.ready()
            seen = []
            far.sessions[0].migration.ask()
            async with asyncio.timeout(20):
                while session.current is old:
                    await asyncio.sleep(0)
                    seen.append(session.current)
            assert None not in seen
            error = await old.wait_ended()
            assert isinstance(error, SessionEnded)
            assert error.code == GoawayCode.DONE
            assert session.relay is session.connector.relays.all[1]
            assert [request.instance for request in second.requests] == [""]
            assert await echo(session) == b"hello"

    async def test_a_stream_that_begins_meanwhile_moves_with_its_session(
        self, far: FarSide, second: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with running(make(far, tmp_path, others=(second,))) as session:
            old = await session.ready()
            attempt, stream = session.connector.connect, Stream()

            async def attempt_and_open(handler: BaseHandler, leaving: RelayAccess | None = None) -> ResumableSession:
                fresh = await attempt(handler, leaving)
                old.open("tcp:echo", stream.io)
                return fresh

            monkeypatch.setattr(session.connector, "connect", attempt_and_open)
            far.sessions[0].migration.ask()
            await until(lambda: session.counters.moved == 1)
            await stream.check(b"over the new connection")
            assert session.current is not old
            assert [request.instance for request in second.requests] == ["", "pod-1"]

    async def test_without_resumption_what_runs_may_finish(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        async with streaming(far, tmp_path, others=(second,), resumption=False) as (session, stream):
            old = await session.ready()
            session.move_requested(old)
            await until(lambda: session.current is not old)
            await stream.check(b"still there")
            assert stream.io.transport is not None
            stream.io.transport.write_eof()
            assert await stream.end() is None
            assert isinstance(await old.wait_ended(), SessionEnded)
            assert await echo(session) == b"hello"


class Asleep:
    """How long the machine has slept, and which addresses are gone."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.gone = False
        self.sleep_detector = SleepDetector(lambda: self.seconds, lambda address: self.gone)


class TestSuspicion:
    @pytest.mark.parametrize("what", ["sleep", "address"])
    async def test_it_goes_to_another_connection_at_once(
        self, far: FarSide, tmp_path: Path, lines: Lines, what: str
    ) -> None:
        machine = Asleep()
        async with streaming(far, tmp_path, sleep_detector=machine.sleep_detector) as (session, stream):
            mux = session.current
            machine.seconds, machine.gone = (60.0, False) if what == "sleep" else (0.0, True)
            session.check_connections()
            session.check_connections()
            machine.gone = False
            await until(lambda: session.counters.moved == 1)
            await stream.check(b"more")
            assert session.current is mux
            assert len(far.requests) == 2
        assert events(lines, WAITS, BACK, OVER) == []

    async def test_with_nothing_to_keep_it_begins_anew(self, far: FarSide, tmp_path: Path) -> None:
        machine = Asleep()
        async with running(make(far, tmp_path, sleep_detector=machine.sleep_detector)) as session:
            await session.ready()
            machine.seconds = 60.0
            session.check_connections()
            await until(lambda: session.counters.established == 2)

    async def test_a_connection_that_lives_is_kept(self, far: FarSide, tmp_path: Path) -> None:
        """While no relay can be joined yet, as after a sleep, the old connection may come back by itself."""
        machine = Asleep()
        async with streaming(far, tmp_path, sleep_detector=machine.sleep_detector) as (session, stream):
            far.reply = JoinReply(code=JoinCode.NO_AGENT)
            machine.seconds = 60.0
            session.check_connections()
            await until(lambda: len(far.requests) >= 3)
            await stream.check(b"it lives")
            (resumable,) = session._sessions.values()
            await until(lambda: resumable._task is None)
            await stream.check(b"more")
            assert session.counters.moved == session.counters.resumed == 0

    async def test_a_sleep_ends_the_wait_of_a_detached_one(
        self, far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            resumable_session, "Backoff", lambda *, cap: Backoff(first=3600.0, cap=7200.0, random=lambda: 0.9)
        )
        machine = Asleep()
        async with streaming(far, tmp_path, sleep_detector=machine.sleep_detector) as (session, stream):
            await far.stop_listening()
            far.cut()
            await until(lambda: session.counters.failures >= 1)
            await far.start_listening()
            machine.seconds = 60.0
            session.check_connections()
            await stream.check(b"more")


class TestANearerRelay:
    @pytest.fixture(autouse=True)
    def _often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("FIRST_LOOK", "LOOK"):
            monkeypatch.setattr(f"arcbridge.client.session.session_manager.{name}", 0.02)

    @staticmethod
    def beside(session: SessionManager) -> list[RelayAccess]:
        """Let the second relay be the nearer one; return the relays in use at each look."""
        nearest, (_, second) = session.connector.nearest, session.connector.relays.all
        looks: list[RelayAccess] = []

        async def look(in_use: RelayAccess, round_trip: float) -> RelayAccess | None:
            looks.append(in_use)
            return second if in_use is not second else None

        nearest.asks, nearest.look = True, look
        return looks

    async def test_the_session_goes_there_uncut(
        self, far: FarSide, second: FarSide, tmp_path: Path, lines: Lines
    ) -> None:
        session = make(far, tmp_path, others=(second,))
        looks = self.beside(session)
        async with running(session):
            stream = await Stream.open(session)
            await until(lambda: session.counters.moved == 1)
            await stream.check(b"over the near one")
            assert session.relay is session.connector.relays.all[1]
            assert len(far.requests) == len(second.requests) == 1
            seen = len(looks)
            await until(lambda: len(looks) > seen + 3)
            assert session.counters.moved == 1, "and stays there"
        assert events(lines, WAITS, BACK, OVER, MOVED) == [MOVED]

    async def test_it_stays_where_the_nearer_one_does_not_join(
        self, far: FarSide, second: FarSide, tmp_path: Path, lines: Lines
    ) -> None:
        session = make(far, tmp_path, others=(second,))
        second.reply = JoinReply(code=JoinCode.NO_INSTANCE)
        looks = self.beside(session)
        async with running(session):
            stream = await Stream.open(session)
            await until(lambda: len(looks) > 5 and len(second.requests) > 1)
            await stream.check(b"over the far one")
            assert session.relay is session.connector.relays.all[0]
            assert len(far.requests) == 1, "it was not joined anew"
            assert session.counters.moved == 0
        assert events(lines, WAITS, BACK, OVER, MOVED) == []

    async def test_what_the_agent_asks_for_comes_first(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        """A drain of the relay in use is no wish of this client: the tries go on until there is another relay."""
        async with streaming(far, tmp_path, others=(second,)) as (session, stream):
            (resumable,) = session.connector.sessions.values()
            assert resumable.nearer_found(session.connector.relays.all[1]) == 0.0
            assert resumable.move_requested() is not None
            assert resumable.nearer_found(session.connector.relays.all[1]) is None
            resumable.failed(Unreachable("not now"))
            assert await resumable.due(0.0)
            await stream.check(b"still there")

    async def test_without_streams_a_fresh_session(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        session = make(far, tmp_path, others=(second,))
        self.beside(session)
        async with running(session):
            old = await session.ready()
            await until(lambda: session.relay is session.connector.relays.all[1])
            assert await echo(session) == b"hello"
            assert isinstance(await old.wait_ended(), SessionEnded)

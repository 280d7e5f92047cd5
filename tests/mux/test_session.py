"""The shell of a session: establishing, every way to end, drains, handlers that fail, nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from arcbridge.errors import ArcbridgeError, ConnectionLost, RemoteProtocolError, SessionEnded, StreamReset
from arcbridge.mux import memory
from arcbridge.mux import session as shell
from arcbridge.mux.session import MuxSession
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.limits import Limits
from arcbridge.wire.records import AuthOk, Dial, Revoke, Status
from arcbridge.wire.session import Kind, State
from tests.mux.ends import Faults, Recorder, both_links, connect_in_memory, connected, make_sessions, soon, take_out
from tests.support.stream_io import StreamIO

pytestmark = pytest.mark.usefixtures("faults")


async def turns(count: int = 40) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@both_links
async def test_both_ends_know_each_other(link: str) -> None:
    """docs/threats.md#B2: a client says under which id it was joined."""
    async with connected(link) as ends:
        mine, theirs = await ends.stream()
        await mine.write(b"x")
        assert await theirs.read() == b"x"
        assert ends.client_handler.calls == ["established", "auth_accepted"]
        assert ends.agent_handler.calls == ["auth_received", "established", "stream_opened"]
        assert (ends.agent.peer_hello.join_id, ends.client.peer_hello.join_id) == (ends.client.label, "")
        assert ends.client.round_trip > 0


async def test_the_first_flight_carries_everything() -> None:
    """Streams opened, written and finished before AUTH was even sent reach the agent whole, once it has accepted."""
    ends = make_sessions(agent_handler=Recorder(accept=False))
    mine = StreamIO()
    ends.client.open("kubernetes", mine)
    await mine.write(b"GET / HTTP/1.1\r\n\r\n")
    mine.finish()
    connect_in_memory(ends)
    await turns()
    assert ends.agent_handler.calls == ["auth_received"]
    assert ends.client.state is State.AUTH
    ends.agent.accept_auth(AuthOk(b"id", b"secret", "jane", 60))
    theirs = await ends.agent_handler.opened.get()
    assert await theirs.read_all() == b"GET / HTTP/1.1\r\n\r\n"
    await theirs.write(b"HTTP/1.1 200 OK\r\n\r\n")
    theirs.finish()
    assert await mine.read_all() == b"HTTP/1.1 200 OK\r\n\r\n"
    await ends.client.wait_established()
    await ends.stop()


# -- ends -------------------------------------------------------------------------------------------------------------


ENDS: dict[str, tuple[Callable[[Any], None], type, type]] = {
    "peer vanishes": (lambda ends: ends.agent.transport.abort(), ConnectionLost, ConnectionLost),
    "agent aborts": (lambda ends: ends.agent.abort(), ConnectionLost, ConnectionLost),
    "agent closes": (lambda ends: ends.agent.close(GoawayCode.REVOKED, "revoked", 7), SessionEnded, SessionEnded),
    "client closes": (lambda ends: ends.client.close(GoawayCode.DONE, "done"), SessionEnded, SessionEnded),
    "nonsense arrives": (lambda ends: ends.agent.transport.write(b"GET / \r\n\r\n"), RemoteProtocolError, SessionEnded),
}


@both_links
@pytest.mark.parametrize("how", ENDS)
async def test_every_end_is_told_to_every_part_once(link: str, how: str) -> None:
    act, client_error, agent_error = ENDS[how]
    async with connected(link, limits=Limits(replay=0)) as ends:
        mine, theirs = await ends.stream()
        lost: list[str] = []
        for name, io in (("client", mine), ("agent", theirs)):
            original = io.connection_lost
            io.connection_lost = lambda exc, n=name, o=original: (lost.append(n), o(exc))
        reading = asyncio.ensure_future(mine.read())
        writing = asyncio.ensure_future(_write_for_ever(theirs))
        waiting = [asyncio.ensure_future(s.wait_ended()) for s in (ends.client, ends.agent)]
        for handler, session in ((ends.client_handler, ends.client), (ends.agent_handler, ends.agent)):
            original_end = handler.session_ended

            def told(s: Any, e: Exception, o: Any = original_end, n: str = session.label) -> None:
                assert ("client" if n == "c" else "agent") in lost, "a stream was not told before"
                o(s, e)

            handler.session_ended = told
        await turns()
        reading.cancel()
        act(ends)
        errors = await asyncio.gather(*waiting)
        assert [type(e) for e in errors] == [client_error, agent_error]
        assert ends.client_handler.calls.count("session_ended") == 1
        assert ends.agent_handler.calls.count("session_ended") == 1
        assert sorted(lost) == ["agent", "client"]
        with pytest.raises(client_error):
            await mine.read_all()
        with pytest.raises(agent_error):
            await writing
        with pytest.raises(SessionEnded):
            ends.client.open("kubernetes", StreamIO())
        await ends.client.wait_established()  # it was
        if how == "agent closes":
            assert isinstance(errors[0], SessionEnded)
            assert (errors[0].code, errors[0].retry_after) == (GoawayCode.REVOKED, 7)
        # Whatever is done to what is over does nothing.
        for session in (ends.client, ends.agent):
            session.close()
            session.abort()
            session.goaway(GoawayCode.DRAINING)
        for io in (mine, theirs):
            io.transport.write(b"x")
            io.transport.write_eof()
            io.transport.close()
            io.transport.abort()
            io.transport.pause_reading()
            io.transport.resume_reading()
        await turns()
        assert len(lost) == 2


async def _write_for_ever(io: StreamIO) -> None:
    while True:
        await io.write(b"w" * 10_000)
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "the other end closed the connection"),
        (ConnectionAbortedError("ended without TLS's close_notify"), "the other end closed the connection"),
        (ConnectionAbortedError(10053, "by this machine"), r"the connection was lost \(ConnectionAbortedError\)"),
        (ConnectionResetError(104, "reset"), r"the connection was lost \(ConnectionResetError\)"),
    ],
)
async def test_a_lost_connection_says_how(error: OSError | None, words: str) -> None:
    """A process that has died leaves FIN without close_notify: its peer's log says the same as of one that closed."""
    ends = make_sessions(limits=Limits(replay=0))
    connect_in_memory(ends)
    await ends.client.wait_established()
    connection = ends.client.connection
    assert connection is not None
    ends.client.connection_lost(connection, error)
    lost = await ends.client.wait_ended()
    assert lost.__cause__ is error
    with pytest.raises(ConnectionLost, match=f"^{words}$"):
        raise lost
    ends.agent.abort()
    await ends.stop()


async def test_auth_that_is_answered_after_the_session_is_over() -> None:
    ends = make_sessions(agent_handler=Recorder(accept=False))
    connect_in_memory(ends)
    await turns()
    ends.client.close()
    await ends.agent.wait_ended()
    ends.agent.accept_auth(AuthOk())
    ends.agent.close(GoawayCode.FORBIDDEN, "no")
    assert "established" not in ends.agent_handler.calls
    with pytest.raises(SessionEnded):
        await ends.agent.wait_established()
    await ends.stop()


@pytest.mark.parametrize("how", ["abort", "close", "goaway"])
async def test_an_end_before_the_connection_is_made(how: str) -> None:
    ends = make_sessions()
    mine = StreamIO()
    if how != "goaway":
        ends.client.open("kubernetes", mine)
    if how == "goaway":
        ends.client.goaway(GoawayCode.DONE)
    else:
        getattr(ends.client, how)()
    error = await ends.client.wait_ended()
    with pytest.raises(type(error)):
        await ends.client.wait_established()
    connect_in_memory(ends)
    error = await ends.agent.wait_ended()
    assert isinstance(error, ConnectionLost)
    assert ends.client_handler.calls == ["session_ended"]
    await ends.stop()


@both_links
async def test_a_drain_lets_run_what_runs(link: str) -> None:
    async with connected(link) as ends:
        mine, theirs = await ends.stream()
        ends.agent.goaway(GoawayCode.DRAINING, "restart", 3)
        crossing = StreamIO()
        ends.client.open("kubernetes", crossing)
        await crossing.write(b"never seen")
        with pytest.raises(StreamReset) as caught:
            await crossing.read()
        assert caught.value.code == ResetCode.REFUSED
        assert not ends.client.usable
        sending = asyncio.ensure_future(_send(theirs, 2_000_000))
        mine.finish()
        assert len(await mine.read_all()) == 2_000_000
        await sending
        for session in (ends.client, ends.agent):
            error = await session.wait_ended()
            assert isinstance(error, SessionEnded)
        assert ends.agent_handler.calls.count("stream_opened") == 1
        await soon(lambda: ends.client.transport is None and ends.agent.transport is None)


async def _send(io: StreamIO, size: int) -> None:
    await io.write(b"d" * size)
    io.finish()


async def test_a_slow_network_gets_its_last_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The close deadline counts from the last progress, not from the close."""
    monkeypatch.setattr(shell, "CLOSE_TIMEOUT", 0.5)
    ends = make_sessions()
    left, right = connect_in_memory(ends, piece=4096)
    await ends.client.wait_established()
    mine, theirs = await ends.stream()
    mine.finish()
    ends.agent.goaway(GoawayCode.DRAINING)
    await turns()
    right.freeze(True)
    theirs.transport.write(b"tail" * 25_000)
    theirs.finish()
    reading = asyncio.ensure_future(mine.read_all())
    for _ in range(8):
        right.freeze(False)
        await turns(3)
        right.freeze(True)
        await asyncio.sleep(0.1)  # less than the deadline; all eight are more, and nothing may end by it
    right.freeze(False)
    assert await reading == b"tail" * 25_000
    await ends.stop()
    # A peer that takes nothing at all is not waited for.
    monkeypatch.setattr(shell, "CLOSE_TIMEOUT", 0.1)
    ends = make_sessions()
    left, right = connect_in_memory(ends)
    await ends.client.wait_established()
    mine, theirs = await ends.stream()
    left.freeze(True)
    await mine.write(b"x" * 200_000)
    await turns()
    ends.client.close()
    await soon(lambda: ends.client.transport is None)
    await ends.stop()


# -- handlers that fail or act ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["established", "auth_received", "stream_opened", "session_ended", "goaway_received"])
async def test_a_handler_that_raises_ends_its_session_with_an_internal_error(where: str, faults: Faults) -> None:
    def bug(*_: Any) -> None:
        raise ZeroDivisionError("a bug of the role")

    ends = make_sessions()
    setattr(ends.agent_handler, where, bug)
    connect_in_memory(ends)
    mine = StreamIO()
    ends.client.open("kubernetes", mine)
    await turns()
    if where == "goaway_received":
        ends.client.goaway(GoawayCode.DRAINING)
    if where == "session_ended":
        ends.client.close()
    for session in (ends.client, ends.agent):
        error = await session.wait_ended()
        if where != "session_ended":
            assert isinstance(error, SessionEnded)
            assert error.code == GoawayCode.INTERNAL
            assert "ZeroDivision" not in error.message
    with pytest.raises(ArcbridgeError):
        await mine.read()
    await ends.stop()
    take_out(faults, "ZeroDivisionError")


@pytest.mark.parametrize("command", ["close", "abort"])
@pytest.mark.parametrize("where", ["established", "auth_received", "stream_opened"])
async def test_a_handler_that_ends_the_session_is_called_no_more_after_the_end(where: str, command: str) -> None:
    ends = make_sessions()
    original = getattr(ends.agent_handler, where)

    def act(session: MuxSession, *args: Any) -> None:
        original(session, *args)
        getattr(session, command)()

    setattr(ends.agent_handler, where, act)
    for _ in range(3):
        ends.client.open("kubernetes", StreamIO())
    connect_in_memory(ends)
    await ends.agent.wait_ended()
    await turns()
    assert ends.agent_handler.calls[-1] == "session_ended"
    assert ends.agent_handler.calls.count("session_ended") == 1
    await ends.stop()


async def test_control_connections() -> None:
    class Relay(Recorder):
        def status_received(self, session: MuxSession, status: Status) -> None:
            self.calls.append(f"status {status.code}")

    class Agent(Recorder):
        def dial_received(self, session: MuxSession, dial: Dial) -> None:
            self.calls.append(f"dial {dial.join_id}")
            session.send(Status(dial.token, 4, "no", "i", True))

        def revoke_received(self, session: MuxSession, revoke: Revoke) -> None:
            self.calls.append(f"revoke {revoke.user} {revoke.before}")

    agent_handler, relay_handler = Agent(), Relay()
    async with connected("tls", kind=Kind.CONTROL, client_handler=agent_handler, agent_handler=relay_handler) as ends:
        ends.agent.send(Dial("canary", "relay:443", "c", "join-1"))
        await soon(lambda: "status 4" in relay_handler.calls)
        assert agent_handler.calls == ["established", "dial join-1"]
        ends.agent.send(Revoke("jane", 1_700_000_000, True))
        await soon(lambda: "revoke jane 1700000000" in agent_handler.calls)
        ends.agent.goaway(GoawayCode.DRAINING, "restart", 5)
        await soon(lambda: "goaway_received" in agent_handler.calls)
        assert not ends.client.closed


# -- waiting ----------------------------------------------------------------------------------------------------------


async def test_cancelled_waits_change_nothing() -> None:
    ends = make_sessions()
    for wait in (ends.client.wait_established, ends.client.wait_ended):
        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    connect_in_memory(ends)
    await ends.client.wait_established()
    await ends.stop()


async def test_a_socket_that_is_full_holds_payload_in_its_stream() -> None:
    """The transport is bounded, the order fair: a late keystroke is not behind a megabyte of another stream."""
    ends = make_sessions()
    left, _ = connect_in_memory(ends)
    await ends.client.wait_established()
    await ends.agent.wait_established()
    bulk, _ = await ends.stream()
    key, far_key = await ends.stream()
    left.freeze(True)
    highest = 0
    writing = asyncio.ensure_future(_write_for_ever(bulk))
    for _ in range(200):
        await asyncio.sleep(0)
        highest = max(highest, left.get_write_buffer_size())
    assert highest <= 1024 * 1024, "the transport is not a queue"
    before = left.written
    await key.write(b"k")
    left.freeze(False)
    reading = asyncio.ensure_future(far_key.read())
    await soon(lambda: reading.done())
    assert left.written - before < 1024 * 1024
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    await ends.stop()


async def test_m9_what_the_transport_could_not_write_counts_until_it_can() -> None:
    ends = make_sessions(limits=Limits(replay=0, under_way=0, stream_window=1 << 20))
    _, right = connect_in_memory(ends)
    await ends.agent.wait_established()
    _, theirs = await ends.stream()
    right.freeze(True)
    writing = asyncio.ensure_future(theirs.write(bytes(800_000)))
    await soon(lambda: right.paused)
    transport, stream = theirs.transport, theirs.transport._stream
    assert ends.agent.backlog.held == right.get_write_buffer_size() + stream.held > 256 * 1024
    right.freeze(False)
    await soon(lambda: not right.paused and not stream.queued)
    assert ends.agent.backlog.held == 0
    await writing
    _, theirs = await ends.stream()
    right.freeze(True)
    writing = asyncio.ensure_future(theirs.write(bytes(800_000)))
    await soon(lambda: right.paused)
    right.abort()
    await ends.agent.wait_ended()
    await asyncio.gather(writing, return_exceptions=True)
    assert memory.backlog.held == 0
    assert transport.is_closing()
    await ends.stop()

"""Streams as transports: the conformance suite over memory and over TLS, then what is particular to a transport."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import pytest

from arcbridge.errors import SessionEnded
from arcbridge.mux import buffer, memory
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.limits import Limits
from arcbridge.wire.stream import SMALL
from tests.mux.ends import Faults, Recorder, both_links, connected, read_until_cut, take_out
from tests.support.books import check_session, unconsumed
from tests.support.eventually import until
from tests.support.stream_conformance import CHECKS, check

pytestmark = pytest.mark.usefixtures("faults")


@pytest.mark.parametrize("name", CHECKS)
@both_links
async def test_conformance(link: str, name: str) -> None:
    async with connected(link) as ends:

        @asynccontextmanager
        async def pair() -> Any:
            yield await ends.stream()

        await check(pair, name)
        # The session is as it was: no stream, no credit kept, and it still works.
        for session in (ends.client, ends.agent):
            await until(lambda session=session: len(session.streams) == 0, timeout=10)
            assert unconsumed(session._machine) == 0
            check_session(session._machine)
        mine, theirs = await ends.stream()
        await mine.write(b"still there")
        assert await theirs.read() == b"still there"


class Plain(asyncio.Protocol):
    """Remembers its callbacks; `on_data` may act within a delivery."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.got = bytearray()
        self.transport: Any = None
        self.on_data: Any = None
        self.keep_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.calls.append("made")
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert type(data) is bytes
        self.got += data
        if self.on_data is not None:
            self.on_data(data)

    def eof_received(self) -> bool:
        self.calls.append("eof")
        return self.keep_open

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(("lost", type(exc).__name__, getattr(exc, "code", None)))


async def turns(count: int = 30) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@asynccontextmanager
async def plain_pair(*, agent_handler: Recorder | None = None, **kwargs: Any) -> Any:
    """(ends, client's protocol, agent's protocol) with one open stream."""
    async with connected("memory", agent_handler=agent_handler or Recorder(Plain), **kwargs) as ends:
        mine = Plain()
        ends.client.open("kubernetes", mine)
        theirs = await ends.agent_handler.opened.get()
        await turns()
        yield ends, mine, theirs


async def test_a_pause_during_delivery_defers_credit_until_resume() -> None:
    async with plain_pair(limits=Limits(max_stream_window=256 * 1024)) as (_, mine, theirs):
        theirs.on_data = lambda _: theirs.transport.pause_reading()
        mine.transport.write(b"x" * 1_000_000)
        await turns(100)
        stuck = mine.transport.bytes_sent
        assert stuck <= 256 * 1024, "nothing was granted"
        first = len(theirs.got)
        assert 0 < first <= 256 * 1024
        await turns(100)
        assert len(theirs.got) == first, "delivered while paused"
        rounds = 0
        while len(theirs.got) < 1_000_000:
            theirs.transport.resume_reading()
            await turns()
            rounds += 1
            assert mine.transport.bytes_sent - len(theirs.got) <= 256 * 1024
        assert rounds >= 3
        theirs.on_data = None


async def test_a_paused_stream_stalls_no_other() -> None:
    async with plain_pair() as (ends, mine, theirs):
        theirs.transport.pause_reading()
        assert not theirs.transport.is_reading()
        mine.transport.write(b"x" * 2_000_000)
        a = Plain()
        ends.client.open("kubernetes", a)
        b = await ends.agent_handler.opened.get()
        a.transport.write(b"y" * 500_000)
        await turns(200)
        assert len(b.got) == 500_000
        assert not theirs.got
        theirs.transport.resume_reading()
        await turns(200)
        assert len(theirs.got) == 2_000_000


async def test_a_fin_that_comes_within_a_delivery_ends_behind_what_waits() -> None:
    """As where a protocol has the session read within its call: bytes and end keep their order."""
    first, second = b"1" * SMALL, b"2" * SMALL
    async with plain_pair() as (_ends, mine, theirs):
        theirs.transport.pause_reading()
        for part in (first, second):
            mine.transport.write(part)
            await turns()
        order: list[Any] = []

        def on_data(data: bytes) -> None:
            order.append(data)
            if data == first:
                theirs.transport.finish_received()
                order.append("returned")

        theirs.on_data = on_data
        theirs.transport.resume_reading()
        await turns()
        assert order == [first, "returned", second]
        assert theirs.calls.count("eof") == 1


async def test_a_close_that_meets_a_paused_reader() -> None:
    """FIN and RESET(NO_ERROR) arrive together; a reader that resumes later loses its answer and sees one end."""
    for keep_open in (True, False):
        async with plain_pair() as (ends, mine, theirs):
            theirs.keep_open = keep_open
            theirs.transport.pause_reading()
            mine.transport.write(b"bye")
            mine.transport.close()
            await turns()
            assert mine.calls[-1] == ("lost", "NoneType", None)
            theirs.transport.write(b"into the void")
            theirs.transport.resume_reading()
            await turns()
            assert theirs.got == b"bye"
            assert theirs.calls == ["made", "eof", ("lost", "NoneType", None)]
            assert unconsumed(ends.agent._machine) == 0


async def test_an_eof_that_is_not_kept_open_closes() -> None:
    async with plain_pair() as (_, mine, theirs):
        theirs.keep_open = False
        theirs.transport.write(b"answer" * 100_000)
        mine.transport.write_eof()
        await turns(100)
        assert mine.got == b"answer" * 100_000
        assert theirs.calls[-1] == mine.calls[-1] == ("lost", "NoneType", None)


@pytest.mark.parametrize("whole", [True, False])
async def test_as_many_streams_as_may_be_open_end_in_one_read(whole: bool) -> None:
    """Each end closes its stream, which makes the session act: one within the other they were too deep for Python."""
    async with connected("memory", agent_handler=Recorder(Plain), piece=256 * 1024) as ends:
        mine = [Plain() for _ in range(1000)]
        for one in mine:
            ends.client.open("kubernetes", one)
        theirs = [await ends.agent_handler.opened.get() for _ in mine]
        for one in theirs:
            one.keep_open = False
        for one in mine:
            if whole:
                one.transport.close()
            else:
                one.transport.write_eof()
        await turns()
        assert {tuple(one.calls) for one in theirs} == {("made", "eof", ("lost", "NoneType", None))}
        assert len(ends.agent.streams) == 0


@pytest.mark.parametrize("how", ["abort", "close", "session.abort", "session.close", "raise"])
async def test_ends_from_within_a_delivery(how: str, faults: Faults) -> None:
    async with plain_pair(limits=Limits(replay=0)) as (ends, mine, theirs):

        def act(_: bytes) -> None:
            if how == "raise":
                raise ZeroDivisionError("a bug of the application")
            target: Any = ends.agent if how.startswith("session") else theirs.transport
            getattr(target, how.split(".")[-1])()

        theirs.on_data = act
        other = Plain()
        ends.client.open("kubernetes", other)
        neighbour = await ends.agent_handler.opened.get()
        mine.transport.write(b"1" * 300_000)
        other.transport.write(b"2" * 10)
        await turns(100)
        assert len([c for c in theirs.calls if c[0] == "lost"]) == 1
        assert len([c for c in mine.calls if c[0] == "lost"]) == 1
        if not how.startswith("session"):
            assert neighbour.got == b"2" * 10, "a neighbour does not notice"
            assert unconsumed(ends.agent._machine) == 0
            reset = {"abort": ResetCode.CANCELLED, "raise": ResetCode.INTERNAL, "close": ResetCode.NO_ERROR}
            assert mine.calls[-1][2] in (reset[how], None if how == "close" else reset[how])
        else:
            assert len([c for c in neighbour.calls if c[0] == "lost"]) == 1
    if how == "raise":
        take_out(faults, "ZeroDivisionError")


@pytest.mark.parametrize("where", ["pause_writing", "resume_writing", "eof_received", "connection_lost"])
async def test_an_exception_in_any_callback_ends_that_stream_alone(where: str, faults: Faults) -> None:
    async with plain_pair() as (ends, mine, theirs):

        def bug(*_: Any) -> None:
            raise ZeroDivisionError("a bug of the application")

        theirs.transport.pause_reading()
        setattr(mine, where, bug)
        mine.transport.write(b"x" * 1_000_000)
        await turns()
        theirs.transport.resume_reading()
        theirs.transport.write_eof()
        await turns(100)
        mine.transport.write_eof()
        await turns(100)
        a, b = await _open(ends)
        a.transport.write(b"neighbour")
        await turns()
        assert b.got == b"neighbour"
        assert len(ends.client.streams) == 1
    take_out(faults, "ZeroDivisionError")


async def test_an_exception_in_connection_lost_leaves_what_came_in_the_same_flight(faults: Faults) -> None:
    """Both streams end by a FIN of the peer, and their protocols are told of it while the session's events are read."""

    def bug(*_: Any) -> None:
        raise ZeroDivisionError("a bug of the application")

    async with plain_pair() as (ends, mine, theirs):
        other, neighbour = await _open(ends)
        await turns()
        for one in (theirs, neighbour):
            one.transport.write_eof()
        await turns()
        theirs.connection_lost = bug
        for one in (mine, other):
            one.transport.write_eof()
        await turns()
        assert neighbour.calls[-1] == ("lost", "NoneType", None)
        assert not ends.agent.closed
        assert ends.agent.connection is not None
        assert len(ends.agent.streams) == 0
        a, b = await _open(ends)
        a.transport.write(b"still there")
        await turns()
        assert b.got == b"still there"
    take_out(faults, "ZeroDivisionError")


async def _open(ends: Any) -> tuple[Plain, Plain]:
    mine = Plain()
    ends.client.open("kubernetes", mine)
    return mine, await ends.agent_handler.opened.get()


async def test_an_exception_in_connection_made_resets_the_stream() -> None:
    class Broken(Plain):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            raise ZeroDivisionError("a bug")

    async with plain_pair() as (ends, _, _theirs):
        with pytest.raises(ZeroDivisionError):
            ends.client.open("kubernetes", Broken())
        await turns()
        assert len(ends.client.streams) == 1
        assert not ends.client.closed


async def test_write_limits_are_as_asyncios() -> None:
    async with plain_pair(limits=Limits(under_way=0)) as (_, mine, theirs):
        transport = mine.transport
        transport.set_write_buffer_limits(high=1000, low=100)
        assert transport.get_write_buffer_limits() == (100, 1000)
        with pytest.raises(ValueError, match="must be"):
            transport.set_write_buffer_limits(high=1, low=2)
        theirs.transport.pause_reading()
        transport.write(b"x" * 262_144)
        assert "pause" not in mine.calls
        transport.write(b"y" * 1001)
        assert mine.calls[-1] == "pause"
        assert transport.get_write_buffer_size() == 1001
        transport.write(b"z")
        assert mine.calls.count("pause") == 1
        await turns()
        theirs.transport.resume_reading()
        await turns()
        assert mine.calls[-1] == "resume"
        assert transport.get_write_buffer_size() == 0
        transport.set_write_buffer_limits()
        transport.writelines([b"a", bytearray(b"b"), memoryview(b"c")])
        await turns()
        assert theirs.got[-3:] == b"abc"
        assert transport.can_write_eof()
        assert transport.get_extra_info("socket") is None
        assert transport.get_extra_info("stream_id") == transport.id == 1
        assert transport.target == "kubernetes"
        assert "StreamTransport" in repr(transport)


async def test_what_is_written_may_be_reused_at_once() -> None:
    async with plain_pair() as (_, mine, theirs):
        theirs.transport.pause_reading()
        scratch = bytearray(50_000)
        for n in range(20):
            scratch[:] = bytes((n,)) * 50_000
            mine.transport.write(memoryview(scratch))
        scratch[:] = b"\xff" * 50_000
        await turns()
        theirs.transport.resume_reading()
        await turns(100)
        assert theirs.got == b"".join(bytes((n,)) * 50_000 for n in range(20))


async def test_the_protocol_can_be_changed_at_any_time() -> None:
    class Views(Plain):
        def view_received(self, view: memoryview) -> None:
            assert type(view) is memoryview
            self.got += view

    async with plain_pair() as (_, mine, theirs):
        mine.transport.write(b"first")
        await turns()
        later = Views()
        theirs.transport.set_protocol(later)
        assert theirs.transport.get_protocol() is later
        mine.transport.write(b"second")
        await turns()
        assert (theirs.got, later.got) == (b"first", b"second")
        mine.transport.abort(ResetCode.TRUNCATED)
        await turns()
        assert later.calls == [("lost", "StreamReset", ResetCode.TRUNCATED)]
        assert theirs.calls == ["made"]


async def test_a_stream_that_ends_before_it_is_attached_is_told_then() -> None:
    class Late(Recorder):
        def stream_opened(self, session: Any, stream: Any, target: str) -> None:
            self.opened.put_nowait(stream)

    async with connected("memory", agent_handler=Late()) as ends:
        a, b = Plain(), Plain()
        ends.client.open("kubernetes", a)
        ends.client.open("kubernetes", b)
        a.transport.write(b"whole")
        a.transport.write_eof()
        b.transport.write(b"part")
        b.transport.abort()
        await turns()
        first, second = await ends.agent_handler.opened.get(), await ends.agent_handler.opened.get()
        far, gone = Plain(), Plain()
        first.attach(far)
        second.attach(gone)
        await turns()
        assert far.got == b"whole"
        assert far.calls == ["made", "eof"]
        assert gone.calls == ["made", ("lost", "StreamReset", ResetCode.CANCELLED)]
        assert not gone.got
        first.close()
        await turns()


@both_links
async def test_a_cut_comes_behind_every_byte(link: str) -> None:
    """What was written before the source broke off is delivered, also to a slow reader; then comes the cut."""
    data = bytes(range(256)) * 8192  # 2 MiB, more than the first window
    async with connected(link) as ends:
        near, far = await ends.stream()
        near.transport.write(data)
        near.transport.cut()
        received, error = await read_until_cut(far)
        assert received == data
        assert error.code == ResetCode.TRUNCATED
        for session in (ends.client, ends.agent):
            await until(lambda session=session: len(session.streams) == 0, timeout=10)
            check_session(session._machine)
        assert unconsumed(ends.client._machine) == unconsumed(ends.agent._machine) == 0


class Source(Plain):
    """Writes as a socket is read: a portion at a time, as long as it is not paused."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.paused = False
        self.written = 0

    def pour(self, most: int) -> None:
        """Write until the stream pauses, or `most` bytes are written."""
        while not self.paused and self.written < most:
            count = min(self.transport.portion, most - self.written)
            self.transport.write(bytes(count))
            self.written += count

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False


BACKLOG = 1024 * 1024


async def test_m9_streams_whose_peer_grants_nothing_hold_little() -> None:
    """Many streams pour towards a peer that takes nothing: the sum is bounded, and a stream that is read goes on."""
    limits = Limits(stream_window=64 * 1024, max_stream_window=64 * 1024, session_window=8 << 20, backlog=BACKLOG)
    async with connected("memory", agent_handler=Recorder(Source), limits=limits) as ends:
        mine = []
        for _ in range(60):
            mine.append(Plain())
            ends.client.open("kubernetes", mine[-1])
            mine[-1].transport.pause_reading()
        theirs = [await ends.agent_handler.opened.get() for _ in mine]
        backlog = ends.agent.backlog
        before, now = [-1], [0]
        while before != now or not all(one.paused for one in theirs):  # until the last credit has come
            for one in theirs:
                one.pour(1 << 20)
            await turns()
            before, now = now, [one.transport.get_write_buffer_size() for one in theirs]
        # One read is under way when the bound is reached; then each stream holds two small portions at the most.
        bound = BACKLOG + buffer.SIZE + 2 * buffer.PORTION * len(theirs)
        assert BACKLOG <= backlog.held <= bound
        assert memory.backlog.held >= backlog.held
        assert backlog.full
        held = [one.transport.get_write_buffer_size() for one in theirs]
        mine[-1].transport.resume_reading()
        while len(mine[-1].got) < 1 << 20:
            theirs[-1].pour(1 << 20)
            await turns()
            assert backlog.held <= bound
        assert [one.transport.get_write_buffer_size() for one in theirs[:-1]] == held[:-1], "another one moved"
        for one in mine:
            one.transport.resume_reading()
        while any(len(one.got) < 1 << 20 for one in mine):
            for one in theirs:
                one.pour(1 << 20)
            await turns()
    assert memory.backlog.held == 0


async def test_m9_bytes_one_at_a_time_fill_no_stream_beyond_a_portion() -> None:
    """While its backlog is full a stream goes on when it is empty, not with each byte that the peer takes."""
    limits = Limits(backlog=1)
    async with plain_pair(limits=limits, agent_handler=Recorder(Source)) as (_, mine, theirs):
        mine.transport.pause_reading()
        theirs.pour(1 << 20)
        await turns(100)
        stream = theirs.transport._stream
        assert stream.queued <= 2 * buffer.PORTION
        for _ in range(50):
            theirs.transport._sender.add_credit(stream, 1)
            theirs.transport._session.wake()
            await turns(2)
            theirs.pour(1 << 20)
            assert stream.queued <= 2 * buffer.PORTION


async def test_an_end_in_order_that_came_is_delivered_before_that_of_the_session() -> None:
    """Both are in one read: what a session says last to a program is whole."""
    async with connected("memory") as ends:
        mine, _ = await ends.stream()
        assert mine.transport is not None
        mine.transport.finish_received()
        mine.transport.session_ended(SessionEnded(GoawayCode.EXPIRED, "the token has expired"))
        assert await mine.read() == b""


async def test_the_rest_of_a_frame_behind_a_cut_is_dropped() -> None:
    async with plain_pair() as (_, _, theirs):
        rest = theirs.transport._deliver  # the decoder has it until the frame that has begun is over
        theirs.transport.cut()
        await turns()
        rest(memoryview(b"late"))
        await turns()
        assert theirs.got == b""

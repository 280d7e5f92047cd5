"""Which streams and sessions make room when more waits than may, and which never do."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

import pytest

from arcbridge.agent.relief import LEAST_READER_STALL, LEAST_STALL, AheadRelief, BacklogRelief
from arcbridge.errors import SessionEnded, StreamReset
from arcbridge.mux.session import MuxSession
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.limits import Limits
from arcbridge.wire.stream import PROGRESS
from tests.mux.ends import connect_in_memory, connected, make_sessions
from tests.support.stream_io import StreamIO

SIZE = 100_000


@dataclass
class Member:
    session: MuxSession | None
    detached_at: float | None = None


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


@asynccontextmanager
async def stalled(count: int, process: Backlog) -> Any:
    """A session with streams that hold SIZE bytes each: (ends, callers' ends, agent's streams)."""
    limits = Limits(stream_window=64 * 1024, max_stream_window=64 * 1024)
    async with connected("memory", limits=limits) as ends:
        ends.agent.backlog.move(process)
        pairs = [await ends.stream() for _ in range(count)]
        streams = []
        for mine, theirs in pairs:
            mine.transport.pause_reading()
            theirs.transport.write(bytes(SIZE + 64 * 1024))
            streams.append(theirs.transport._stream)
        await settle()
        yield ends, [mine for mine, _ in pairs], streams
        await settle()


async def end_of(caller: StreamIO) -> int:
    """The code with which a caller's stream was reset."""
    caller.transport.resume_reading()

    async def read_on() -> None:
        while True:
            await caller.read()

    with pytest.raises(StreamReset) as caught:
        await asyncio.wait_for(read_on(), 5)
    return caught.value.code


async def test_m9_the_stream_that_was_stalled_longest_makes_room() -> None:
    process = Backlog(1 << 30)
    async with stalled(4, process) as (ends, callers, streams):
        relief, now = BacklogRelief(process), monotonic()
        for stream, since in zip(streams, (50.0, 60.0, 40.0, LEAST_STALL - 1.0), strict=True):
            stream.stalled_since = now - since
        relief.relieve([Member(ends.agent)], now)
        assert relief.streams_reset == 0, "there is room"
        process.most = process.held
        relief.relieve([Member(ends.agent), Member(None)], now)
        await settle()
        assert relief.streams_reset == 1, "one freed an eighth"
        assert process.held <= process.most * 7 // 8
        assert await end_of(callers[1]) == ResetCode.IDLE
        process.most = 1
        relief.relieve([Member(ends.agent)], now)
        await settle()
        assert relief.streams_reset == 3
        assert await end_of(callers[0]) == await end_of(callers[2]) == ResetCode.IDLE
        assert relief.sessions_ended == 0
        callers[3].transport.resume_reading()
        received = 0
        while received < SIZE + 64 * 1024:  # it has stalled for a moment only, and is complete
            received += len(await callers[3].read())


async def test_m9_a_stream_whose_application_is_done_makes_room_too() -> None:
    """The end of an answer waits behind its bytes: nothing of the agent's holds the stream any more."""
    process = Backlog(1 << 30)
    async with stalled(2, process) as (ends, callers, streams):
        streams[0].owner.cut()
        streams[1].owner.close()
        assert streams[0].owner is None
        for stream in streams:
            stream.stalled_since = 0.0
        process.most = 1
        relief = BacklogRelief(process)
        relief.relieve([Member(ends.agent)], monotonic())
        await settle()
        assert relief.streams_reset == 2
        assert await end_of(callers[0]) == await end_of(callers[1]) == ResetCode.IDLE
        assert len(ends.agent.streams) == 0


async def test_m9_sessions_without_a_connection_make_room_when_no_stream_can() -> None:
    process = Backlog(1 << 30)
    pairs = []
    for _ in range(3):
        ends = make_sessions()
        left, right = connect_in_memory(ends)
        await ends.agent.wait_established()
        ends.agent.backlog.move(process)
        _, theirs = await ends.stream()
        left.freeze(True)
        right.freeze(True)
        await theirs.write(bytes(50_000))
        await settle()
        pairs.append(ends)
    relief, now = BacklogRelief(process), monotonic()
    held = process.held
    assert held > 150_000
    members = [
        Member(pairs[0].agent, now - 30.0), Member(pairs[1].agent, now - 60.0), Member(pairs[2].agent, now - 5.0)
    ]  # fmt: skip
    process.most = held
    relief.relieve(members, now)
    assert relief.sessions_ended == 1
    error = await pairs[1].agent.wait_ended()
    assert isinstance(error, SessionEnded)
    assert error.code == GoawayCode.GONE
    process.most = 1
    relief.relieve(members, now)
    assert [ends.agent.closed for ends in pairs] == [True, True, False], "the last one lost its connection just now"
    assert process.held == pairs[2].agent.backlog.held
    for ends in pairs:
        for session in (ends.agent, ends.client):
            session.abort()
        await ends.stop()
    assert process.held == 0


# -- readers that stopped ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def ahead(count: int, user: Backlog) -> Any:
    """A session with streams of which SIZE bytes each wait for readers that stopped: (ends, callers, readers)."""
    async with connected("memory") as ends:
        ends.agent.ahead.move(user)
        pairs = [await ends.stream() for _ in range(count)]
        for mine, theirs in pairs:
            theirs.transport.pause_reading()
            mine.transport.write(bytes(SIZE))
        await settle()
        yield ends, [mine for mine, _ in pairs], [theirs for _, theirs in pairs]
        await settle()


async def test_m20_streams_whose_readers_have_stopped_make_room() -> None:
    process = Backlog(1 << 30)
    user = Backlog(4 * SIZE, process)
    relief = AheadRelief()
    async with ahead(4, user) as (ends, callers, readers):
        ends.agent.streams.unread()
        assert process.held == user.held == 4 * SIZE
        relief.relieve([ends.agent], 100.0)
        relief.relieve([ends.agent], 100.0 + LEAST_READER_STALL - 0.1)
        assert relief.streams_reset == 0, "they have stalled for a moment only"
        readers[0].transport.resume_reading()
        await settle()
        readers[0].transport.pause_reading()
        callers[0].transport.write(bytes(SIZE))
        await settle()
        relief.relieve([ends.agent], 100.0 + LEAST_READER_STALL)
        await settle()
        assert relief.streams_reset == 1, "one freed an eighth"
        assert user.held == process.held == 3 * SIZE
        user.most = 1
        relief.relieve([ends.agent], 100.0 + LEAST_READER_STALL + 1.0)
        await settle()
        assert relief.streams_reset == 3
        assert user.held == SIZE
        for caller in callers[1:]:
            with pytest.raises(StreamReset) as caught:
                await caller.read()
            assert caught.value.code == ResetCode.IDLE
        readers[0].transport.resume_reading()
        received = 0
        while received < 2 * SIZE:  # its reader takes bytes: it is complete
            received += len(await readers[0].read())


async def test_m20_nothing_is_reset_or_remembered_while_there_is_room() -> None:
    user = Backlog(4 * SIZE + 2, Backlog(1 << 30))
    relief = AheadRelief()
    async with ahead(2, user) as (ends, _, _):
        for now in (0.0, 1000.0):
            relief.relieve([ends.agent], now)
        assert relief.streams_reset == 0
        assert not relief._seen


async def test_m20_a_reader_that_sips_counts_as_one_that_stopped() -> None:
    user = Backlog(2 * SIZE)
    relief = AheadRelief()
    async with ahead(2, user) as (ends, _, _):
        streams = ends.agent.streams.unread()
        for stream, taken in zip(streams, (PROGRESS - 1, PROGRESS), strict=True):
            relief.relieve([ends.agent], 0.0)
            ends.agent._machine.receiver.consumed(stream, taken)
        user.most = 1
        relief.relieve([ends.agent], LEAST_READER_STALL)
        assert relief.streams_reset == 1
        assert ends.agent.streams.unread() == streams[1:]


async def test_m20_a_complete_stream_that_nobody_reads_makes_room_too() -> None:
    """Both directions have ended, so that no limit of streams counts it any more."""
    user = Backlog(SIZE)
    relief = AheadRelief()
    async with ahead(1, user) as (ends, callers, readers):
        callers[0].finish()
        readers[0].finish()
        await settle()
        assert len(ends.agent.streams) == 0
        ends.agent.streams.unread()
        relief.relieve([ends.agent], 0.0)
        relief.relieve([ends.agent], LEAST_READER_STALL)
        assert relief.streams_reset == 1
        assert user.held == 0

"""Who makes room when more waits than may, and who never does."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

import pytest

from arcbridge.agent.backlog_relief import LEAST_STALL, BacklogRelief
from arcbridge.errors import SessionEnded, StreamReset
from arcbridge.mux.session import MuxSession
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.limits import Limits
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
    assert caller.transport is not None
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

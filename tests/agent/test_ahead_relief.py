"""Which streams make room when readers that stopped hold more than may wait, and which never do."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import pytest

from arcbridge.agent.ahead_relief import LEAST_STALL, AheadRelief
from arcbridge.errors import StreamReset
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.frames import ResetCode
from arcbridge.wire.stream import PROGRESS
from tests.mux.ends import connected

SIZE = 100_000


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


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
        relief.relieve([ends.agent], 100.0 + LEAST_STALL - 0.1)
        assert relief.streams_reset == 0, "they have stalled for a moment only"
        readers[0].transport.resume_reading()
        await settle()
        readers[0].transport.pause_reading()
        callers[0].transport.write(bytes(SIZE))
        await settle()
        relief.relieve([ends.agent], 100.0 + LEAST_STALL)
        await settle()
        assert relief.streams_reset == 1, "one freed an eighth"
        assert user.held == process.held == 3 * SIZE
        user.most = 1
        relief.relieve([ends.agent], 100.0 + LEAST_STALL + 1.0)
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
        relief.relieve([ends.agent], LEAST_STALL)
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
        relief.relieve([ends.agent], LEAST_STALL)
        assert relief.streams_reset == 1
        assert user.held == 0

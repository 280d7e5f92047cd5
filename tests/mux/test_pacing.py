"""Payload is held back for the pacer, and for readers that are too far behind; other frames and the end are not."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from arcbridge.mux import pacing
from arcbridge.mux.pacing import AHEAD_FREE, PACED
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.limits import Limits
from tests.mux.ends import both_links, connected, soon
from tests.support.books import unconsumed
from tests.support.stream_io import StreamIO

pytestmark = pytest.mark.usefixtures("faults")


class Pacer:
    """Makes a session wait for as long as a test says, in pieces of `wait` seconds."""

    def __init__(self, *, sending: bool, reading: bool, wait: float = 0.005) -> None:
        self.sending, self.reading, self.wait = sending, reading, wait
        self.sent = self.received = self.asked = 0
        self.at: list[float] = []
        """When bytes came, monotonic seconds."""

    def bytes_sent(self, count: int, now: float) -> float:
        self.sent += count
        self.asked += self.sending
        return self.wait if self.sending else 0.0

    def bytes_received(self, count: int, now: float) -> float:
        self.received += count
        self.at.append(now)
        self.asked += self.reading
        return self.wait if self.reading else 0.0


async def _write_in_pieces(io: StreamIO) -> None:
    for _ in range(30):
        await io.write(b"x" * 100_000)


@both_links
async def test_payload_waits_for_the_pacer_in_its_streams_and_other_frames_do_not(link: str) -> None:
    async with connected(link) as ends:
        mine, theirs = await ends.stream()
        pacer = ends.agent.pacing.pacer = Pacer(sending=True, reading=False)
        writing = asyncio.ensure_future(_write_in_pieces(theirs))
        await soon(lambda: pacer.asked > 5)
        early = pacer.sent
        assert early < 1_000_000, "what had left before the first answer"
        assert not writing.done(), "the writer is held back"
        other, _ = await ends.stream()  # OPEN and its WINDOW pass
        asked = pacer.asked
        await soon(lambda: pacer.asked > asked + 5)
        assert pacer.sent < early + 1000
        pacer.sending = False
        got = 0
        while got < 3_000_000:
            got += len(await mine.read())
        await writing
        other.finish()
    assert pacer.sent > 3_000_000


async def test_nothing_is_read_while_the_pacer_says_so() -> None:
    async with connected("tls") as ends:
        mine, theirs = await ends.stream()
        pacer = ends.agent.pacing.pacer = Pacer(sending=False, reading=True, wait=0.2)
        writing = asyncio.ensure_future(_write_in_pieces(mine))
        # What comes is taken: of a window that nobody gives back three reads may be all.
        reading = asyncio.ensure_future(theirs.read_exactly(3_000_000))
        await soon(lambda: len(pacer.at) >= 4)
        # By the pacer's own clock: a test that looks at the transport now and then may miss a moment.
        assert all(after - before >= 0.19 for before, after in itertools.pairwise(pacer.at[:4]))
        assert pacer.received < 3_000_000
        pacer.reading = False
        assert await reading == b"x" * 3_000_000
        await writing
    assert pacer.received > 3_000_000


async def test_the_bytes_of_small_frames_are_counted_together_and_each_once() -> None:
    async with connected("tls") as ends:
        mine, theirs = await ends.stream()
        pacer = ends.agent.pacing.pacer = Pacer(sending=False, reading=False)
        for _ in range(100):
            await mine.write(b"x" * 100)
            await theirs.write(await theirs.read())
            await mine.read()
        assert len(pacer.at) <= pacer.received // PACED
        for counted, moved in (
            (pacer.received, ends.agent.stats.bytes_received),
            (pacer.sent, ends.agent.stats.bytes_sent),
        ):
            assert moved - PACED < counted <= moved
        stats = ends.agent.stats
    assert (pacer.received, pacer.sent) == (stats.bytes_received, stats.bytes_sent), "the rest at the session's end"


@pytest.mark.parametrize("how", ["close", "abort", "loss"])
async def test_a_session_that_is_paced_ends_at_once(how: str) -> None:
    async with connected("tls", limits=Limits(replay=0)) as ends:
        mine, theirs = await ends.stream()
        pacer = ends.agent.pacing.pacer = Pacer(sending=True, reading=True)
        writing = [asyncio.ensure_future(_write_in_pieces(io)) for io in (mine, theirs)]
        await soon(lambda: pacer.asked > 3)
        if how == "close":
            ends.agent.close()
        elif how == "abort":
            ends.agent.abort()
        else:
            ends.client.abort()
            pacer.reading = False  # a loss is found by reading
        await ends.agent.wait_ended()
        await ends.client.wait_ended()
        await asyncio.gather(*writing, return_exceptions=True)


async def test_m20_a_session_too_far_ahead_of_its_readers_is_not_read_until_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most, size, count = 1 << 20, 200_000, 20
    monkeypatch.setattr(pacing, "AHEAD_PAUSE", 0.01)
    user = Backlog(most)
    async with connected("tls") as ends:
        ends.agent.ahead.move(user)
        pairs = [await ends.stream() for _ in range(count)]
        for mine, theirs in pairs:
            theirs.transport.pause_reading()
            mine.transport.write(bytes(size))
            mine.finish()
        await soon(lambda: ends.agent.pacing.reading_held is not None)
        looks = set()

        def looked_again() -> bool:
            looks.add(ends.agent.pacing.reading_held)
            return len(looks) >= 5

        await soon(looked_again)
        assert None not in looks
        assert most <= unconsumed(ends.agent._machine) < most + 2 * AHEAD_FREE, "nothing more was read meanwhile"
        for _, theirs in pairs:
            theirs.transport.resume_reading()
        got = await asyncio.gather(*(theirs.read_all() for _, theirs in pairs))
        assert [len(one) for one in got] == [size] * count, "all of it arrives once it is taken"
        assert user.held < AHEAD_FREE
        ends.agent.streams.unread()
        assert user.held == 0


async def test_m20_a_session_that_holds_little_is_read_however_much_others_hold() -> None:
    user = Backlog(1)
    user.add(1 << 30)
    async with connected("tls") as ends:
        ends.agent.ahead.move(user)
        stalled, unread = await ends.stream()
        unread.transport.pause_reading()
        await stalled.write(bytes(AHEAD_FREE - 1000))
        mine, theirs = await ends.stream()
        await mine.write(b"x")
        assert await theirs.read() == b"x"

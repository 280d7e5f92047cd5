"""A reader that stops costs its window and nothing else; what a process promises is counted, and comes back."""

from __future__ import annotations

import pytest

from arcbridge.wire.frames import FIRST_CREDIT, ResetCode
from arcbridge.wire.limits import KIB, MIB, Limits
from arcbridge.wire.replay import Budget
from tests.support.slow_path import MBIT, SlowPath

SMALL = Limits(stream_window=FIRST_CREDIT, max_stream_window=512 * KIB, session_window=2 * MIB)


def frozen(path: SlowPath, count: int) -> list[int]:
    """Streams with more to say than their windows take, whose readers, at the agent, take nothing."""
    ids = []
    for _ in range(count):
        stream = path.client.adopt(path.client.machine.open_stream("tcp:frozen"))
        path.agent.frozen.add(stream.id)
        path.client.machine.sender.send(stream, bytes(2 * FIRST_CREDIT))
        ids.append(stream.id)
    path.flush()
    return ids


@pytest.mark.parametrize("count", [1, 10, 100])
def test_neighbours_of_frozen_readers_go_on_at_full_speed(count: int) -> None:
    """A hundred frozen readers hold three times the session's window."""
    path = SlowPath(rate=40 * MBIT, round_trip=0.01, limits=SMALL)
    ids = frozen(path, count)
    path.run(0.5 + count * FIRST_CREDIT / (30 * MBIT))
    held = [path.agent.unread.get(one, 0) for one in ids]
    assert max(held) <= SMALL.stream_window, "a window that is not read does not grow"
    assert sum(held) == count * SMALL.stream_window
    took = path.start_ticks(0.01, path.now + 2)
    bulk = path.start_bulk(up=True)
    path.run(0.5)
    assert carried(path, bulk, 1.0) >= 0.9 * 40 * MBIT
    assert len(took) > 100
    assert max(took) < 0.1


def test_readers_that_freeze_with_grown_windows_leave_half_the_session_to_others() -> None:
    path = SlowPath(rate=100 * MBIT, round_trip=0.1, limits=SMALL)
    ids = [path.start_bulk(up=True) for _ in range(6)]
    path.run(3)
    assert sum(path.agent.machine.streams[one].window.grown for one in ids) > SMALL.session_window // 4
    assert sum(path.agent.machine.streams[one].window.grown for one in ids) <= SMALL.session_window // 2
    path.agent.frozen.update(ids)
    path.run(1)
    bulk = path.start_bulk(up=True)
    path.run(1)
    assert carried(path, bulk, 1.0) >= 0.7 * SMALL.stream_window / 0.1, "no frozen window stands in its way"


def limited(budget: Budget) -> SlowPath:
    return SlowPath(rate=40 * MBIT, round_trip=0.2, limits=SMALL, budget=budget)


def carried(path: SlowPath, stream: int, seconds: float) -> float:
    before = path.agent.read.get(stream, 0)
    path.run(seconds)
    return (path.agent.read[stream] - before) / seconds


def test_what_was_promised_comes_back_when_streams_end() -> None:
    budget = Budget(512 * MIB)
    path = limited(budget)
    bulk = path.start_bulk(up=True)
    path.run(3)
    window = path.agent.machine.streams[bulk].window
    assert window.grown == window.size - SMALL.stream_window > 256 * KIB
    assert budget.held >= window.grown
    path.client.machine.stream_table.reset(path.client.bulk.pop(bulk), ResetCode.CANCELLED)
    path.flush()
    path.run(1)
    assert path.agent.machine.stream_table.growth.held == 0
    assert budget.held < 256 * KIB, "history of the last frames is all that is left"

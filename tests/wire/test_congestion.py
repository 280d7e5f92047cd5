"""How much may be under way: a slow last mile stays shallow, a long path is filled, and nothing ever stands still."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcbridge.wire.congestion import FIRST, ROUND_TRIP_MEMORY, STEP_SECONDS, CongestionWindow
from arcbridge.wire.frames import FIRST_CREDIT
from arcbridge.wire.limits import DEFAULT
from arcbridge.wire.round_trip import BULK_ROUND_TRIP, LEAST_ROUND_TRIP
from tests.support.slow_path import MBIT, SlowPath

KIB = 1024


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[int(part * len(values))]


def carried(path: SlowPath, stream: int, seconds: float, *, up: bool = True) -> float:
    """Bytes per second that bulk moves from now on."""
    node = path.agent if up else path.client
    before = node.read.get(stream, 0)
    path.run(seconds)
    return (node.read.get(stream, 0) - before) / seconds


# -- the slow last mile -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_a_keystroke_passes_a_copy_over_a_slow_last_mile(up: bool) -> None:
    path = SlowPath(rate=20 * MBIT, round_trip=0.04)
    took = path.start_ticks(0.01, path.now + 12)
    bulk = path.start_bulk(up=up)
    assert carried(path, bulk, 12, up=up) >= 0.95 * 20 * MBIT
    assert len(took) > 1000
    assert percentile(took, 0.99) <= 0.1
    assert percentile(took, 0.5) <= 0.075


def test_many_copies_share_one_queue() -> None:
    path = SlowPath(rate=20 * MBIT, round_trip=0.04)
    took = path.start_ticks(0.01, path.now + 6)
    bulk = [path.start_bulk(up=True) for _ in range(10)]
    path.run(6)
    got = [path.agent.read[one] for one in bulk]
    assert sum(got) >= 0.9 * 6 * 20 * MBIT
    assert max(got) - min(got) <= 0.1 * max(got), "equal shares"
    assert percentile(took, 0.99) <= 0.2, "its turn comes behind ten frames of 16 KiB, no more"


@pytest.mark.parametrize("largest", [16 * KIB, 256 * KIB])
def test_a_keystroke_waits_for_what_is_under_way_and_not_for_frames(largest: int) -> None:
    path = SlowPath(rate=400 * MBIT, round_trip=0.001, limits=replace(DEFAULT, frame_alone=largest))
    took = path.start_ticks(0.01, path.now + 1.5)
    for _ in range(10):
        path.start_bulk(up=True)
    path.run(1.5)
    congestion = path.client.machine.sender.congestion
    assert congestion.interactive
    assert percentile(took[50:], 0.99) <= 0.005


def test_a_copy_fills_a_short_fast_path_within_milliseconds() -> None:
    """5 Gbit/s and 0.3 ms, as between processes of one machine: neither cap nor credit holds up the first 10 MB."""
    path = SlowPath(rate=5000 * MBIT, round_trip=0.0003)
    stream = path.client.adopt(path.client.machine.open_stream("tcp:x"))
    path.client.bulk[stream.id] = stream
    began = path.now
    path.flush()
    while path.agent.read.get(stream.id, 0) < 10_000_000:
        path.run(0.0001)
        assert path.now < began + 1
    assert path.now - began <= 1.15 * 10_000_000 / (5000 * MBIT)


# -- the long path ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mbit", "round_trip"), [(400, 0.1), (640, 0.2)])
def test_one_stream_fills_a_long_path(mbit: int, round_trip: float) -> None:
    path = SlowPath(rate=mbit * MBIT, round_trip=round_trip)
    bulk = path.start_bulk(up=True)
    path.run(14 * round_trip)  # it doubles each round trip, nearly
    assert carried(path, bulk, 1.0) >= 0.95 * mbit * MBIT
    again = path.start_bulk(up=True)
    path.client.bulk.pop(bulk)
    path.run(4 * round_trip)
    assert carried(path, again, 1.0) >= 0.95 * mbit * MBIT, "a second stream begins with what the first one found"


# -- paths that change --------------------------------------------------------------------------------------------


def test_a_path_that_gets_slower_and_faster_is_followed() -> None:
    path = SlowPath(rate=20 * MBIT, round_trip=0.04)
    bulk = path.start_bulk(up=True)
    path.run(2)
    path.up.rate = 5 * MBIT
    path.run(2)
    assert carried(path, bulk, 2) >= 0.9 * 5 * MBIT
    assert path.up.queue(path.now) <= 0.1
    path.up.rate = 80 * MBIT
    path.run(2)
    assert carried(path, bulk, 2) >= 0.9 * 80 * MBIT


def test_a_path_that_gets_longer_is_believed() -> None:
    path = SlowPath(rate=100 * MBIT, round_trip=0.005)
    bulk = path.start_bulk(up=True)
    path.run(1)
    path.up.delay = path.down.delay = 0.1
    path.run(15)
    assert carried(path, bulk, 2) >= 0.9 * 100 * MBIT
    assert path.client.machine.sender.congestion.round_trip >= 0.2
    path.up.delay = path.down.delay = 0.01
    path.run(ROUND_TRIP_MEMORY + 2)
    assert path.client.machine.sender.congestion.round_trip <= 0.04, (
        "a shorter one as soon as the queue was let run empty"
    )


def test_counts_that_come_in_bursts_neither_starve_nor_flood() -> None:
    path = SlowPath(rate=20 * MBIT, round_trip=0.04)
    path.down.hold = 0.02
    bulk = path.start_bulk(up=True)
    path.run(2)
    assert carried(path, bulk, 5) >= 0.75 * 20 * MBIT
    assert path.client.machine.sender.congestion.rate <= 1.3 * 20 * MBIT


def test_an_application_that_sends_little_says_little_of_the_path() -> None:
    path = SlowPath(rate=20 * MBIT, round_trip=0.04)
    bulk = path.start_bulk(up=True)
    path.run(3)
    window = path.client.machine.sender.congestion
    cap, rate = window.cap, window.rate
    path.client.bulk.clear()
    path.start_ticks(0.02, path.now + 20, size=1000)
    path.run(20)
    assert window.rate >= 0.9 * rate, "it did not collapse"
    assert window.rate <= 1.1 * rate
    assert window.cap >= 0.7 * cap
    path.client.bulk[bulk] = path.client.machine.streams[bulk]
    path.flush()
    assert carried(path, bulk, 2) >= 0.8 * 20 * MBIT


# -- nothing stands still -----------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    rate=st.sampled_from([0.1, 1, 20, 300]),
    round_trip=st.sampled_from([0.0005, 0.01, 0.3]),
    sizes=st.lists(st.sampled_from([1, 5000, 100_000, 1_000_000]), min_size=1, max_size=4),
    ack_every=st.sampled_from([5_000, 256 * KIB, 2**30]),
    changes=st.lists(st.tuples(st.sampled_from([0.05, 1, 100]), st.sampled_from([0.001, 0.5])), max_size=3),
)
def test_whatever_the_path_all_arrives(
    rate: float, round_trip: float, sizes: list[int], ack_every: int, changes: list[tuple[float, float]]
) -> None:
    """Also to a peer that confirms nothing unless asked."""
    limits = replace(DEFAULT, ack_every=ack_every, replay=2**31, ping_interval=10_000, ping_timeout=50_000)
    path = SlowPath(rate=rate * MBIT, round_trip=round_trip, limits=limits, most=10_000)
    streams = [path.client.adopt(path.client.machine.open_stream("tcp:x")) for _ in sizes]
    for stream, size in zip(streams, sizes, strict=True):
        path.client.machine.sender.send(stream, bytes(size))
    path.flush()
    for rate_after, delay in changes:
        path.run(0.2)
        path.up.rate, path.down.delay = rate_after * MBIT, delay
    slowest = min([rate] + [one for one, _ in changes])
    path.run(60 + 3 * sum(sizes) / (slowest * MBIT))
    assert [path.agent.read.get(stream.id) for stream in streams] == sizes


# -- the estimate by itself -----------------------------------------------------------------------------------------


def test_the_first_cap_and_its_bounds() -> None:
    window = CongestionWindow(1024 * KIB)
    assert window.cap == FIRST
    assert window.least <= window.step <= window.cap // 2
    small = CongestionWindow(FIRST_CREDIT)
    assert small.cap == FIRST_CREDIT


def feed(
    window: CongestionWindow, rate: float, trip: float, rounds: int, start: float = 0.0, sent: int = 0
) -> tuple[float, int]:
    """Rounds in which always as much is sent as the cap lets out and the path carries."""
    now = start
    for _ in range(rounds):
        count = int(min(window.cap, rate * trip))
        sent += count
        window.pinged(sent, now)
        now += trip
        window.confirmed(sent + 24, sent + 24, now)
        sent += 24
    return now, sent


def test_a_round_trip_below_the_least_counts_as_the_least() -> None:
    window = CongestionWindow(16 * 1024 * KIB)
    feed(window, 1e9, 0.0001, 400)
    assert window.cap >= 1e9 * LEAST_ROUND_TRIP


def test_on_a_short_path_less_is_under_way_while_sparse_streams_wait() -> None:
    bulk, shared = CongestionWindow(16 * 1024 * KIB), CongestionWindow(16 * 1024 * KIB)
    shared.interactive = True
    for window in (bulk, shared):
        feed(window, 500e6, 0.0002, 400)
    assert bulk.cap >= 500e6 * BULK_ROUND_TRIP
    assert shared.cap < bulk.cap / 2
    far = CongestionWindow(16 * 1024 * KIB)
    now, sent = feed(far, 50e6, 0.1, 30)
    cap = far.cap
    far.interactive = True
    feed(far, 50e6, 0.1, 6, now, sent)
    assert far.cap == pytest.approx(cap, rel=0.3), "the round trip of a long path decides alone"


def test_directions_that_share_processors_come_to_equal_shares() -> None:
    """Whoever began first has all of it at first: 500 MB/s between two directions, and a keystroke beside them."""
    first, second = (CongestionWindow(16 * 1024 * KIB) for _ in range(2))
    first.interactive = second.interactive = True
    counts = {first: feed(first, 500e6, 0.0002, 400)[1], second: feed(second, 1e6, 0.0002, 400)[1]}
    now = 0.08
    while now < 0.7:
        left = now
        for window in counts:
            counts[window] += window.cap
            window.pinged(counts[window], left)
        now += max(0.0005, (first.cap + second.cap) / 500e6)
        for window in counts:
            counts[window] += 24
            window.confirmed(counts[window], counts[window], now)
    assert first.cap == pytest.approx(second.cap, rel=0.15)


def test_a_short_path_is_not_asked_more_often_than_schedulers_answer() -> None:
    """A peer counts PINGs as frames that need no credit, and ends a session that sends a flood of them."""
    path = SlowPath(rate=100 * MBIT, round_trip=0.0005)
    path.start_bulk(up=True)
    path.run(0.5)
    keepalive = path.client.machine.lifecycle.keepalive
    before = keepalive.number
    path.run(1)
    assert keepalive.number - before <= 1.3 / STEP_SECONDS

"""Growth until the path is full: how fast, what slows it, what ends it, and what begins it again."""

from __future__ import annotations

import pytest

from arcbridge.wire.rate_estimate import SPAN
from arcbridge.wire.slow_start import (
    CONSERVATIVE_ROUNDS,
    DELAY_LEAST,
    DELAY_MOST,
    PLATEAU,
    SHORT_FIRST,
    SHORT_ROUND_TRIP,
    SlowStart,
)

FIRST = 100_000
MOST = 10_000_000
USUAL = 0.02
"""Seconds that an answer takes without a queue."""


def full(rate: float = 1e6) -> SlowStart:
    """A slow start that found its path full at `rate`."""
    slow_start = SlowStart(FIRST, MOST)
    for _ in range(PLATEAU + 1):
        slow_start.end_round(USUAL, USUAL, rate, measured=True, cap=FIRST)
    assert not slow_start.growing
    return slow_start


def test_each_count_adds_what_it_confirmed_up_to_the_bound() -> None:
    slow_start = SlowStart(FIRST, MOST)
    slow_start.grow(30_000)
    assert slow_start.cap == FIRST + 30_000
    slow_start.grow(2 * MOST)
    assert slow_start.cap == MOST
    assert SlowStart(FIRST, 5000).cap == 5000


@pytest.mark.parametrize(
    ("usual", "delay"), [(0.004, DELAY_LEAST), (0.08, 0.01), (0.4, DELAY_MOST)], ids=["least", "an eighth", "most"]
)
def test_a_queue_is_a_delay_that_lasts(usual: float, delay: float) -> None:
    slow_start = SlowStart(FIRST, MOST)
    late, in_time = usual + 1.01 * delay, usual + 0.99 * delay
    slow_start.take_trip(late, usual, 10.0)
    slow_start.take_trip(late, usual, 10.0 + SPAN / 2)
    slow_start.grow(4000)
    assert slow_start.cap == FIRST + 4000, "a scheduler delays all answers of a moment"
    slow_start.take_trip(late, usual, 10.0 + 1.01 * SPAN)
    assert slow_start.conservative
    slow_start.grow(4000)
    assert slow_start.cap == FIRST + 5000
    slow_start.take_trip(in_time, usual, 10.0 + 2 * SPAN)
    slow_start.grow(4000)
    assert slow_start.cap == FIRST + 9000
    slow_start.take_trip(late, usual, 10.0 + 3 * SPAN)
    slow_start.grow(4000)
    assert slow_start.cap == FIRST + 13_000, "the delay has to last anew"


def test_it_ends_when_the_rate_stops_rising() -> None:
    slow_start = SlowStart(FIRST, MOST)
    rate = 1e6
    for _ in range(10):
        rate *= 1.25
        slow_start.end_round(USUAL, USUAL, rate, measured=True, cap=FIRST)
    for number in range(PLATEAU):
        assert slow_start.growing
        slow_start.end_round(USUAL, USUAL, 1.1 * rate, measured=True, cap=FIRST)
        assert slow_start.growing is (number < PLATEAU - 1)
    assert slow_start.full_rate == pytest.approx(1.1 * rate)


def test_rounds_without_a_sample_end_nothing() -> None:
    slow_start = SlowStart(FIRST, MOST)
    slow_start.end_round(USUAL, USUAL, 1e6, measured=True, cap=FIRST)
    for _ in range(10 * PLATEAU):
        slow_start.end_round(USUAL, USUAL, 1e6, measured=False, cap=FIRST)
    assert slow_start.growing


def test_it_ends_with_a_long_queue_once_a_rate_is_known() -> None:
    long = 1.5 * USUAL + 2.1 * SPAN
    slow_start = SlowStart(FIRST, MOST)
    slow_start.end_round(long, USUAL, 0.0, measured=False, cap=FIRST)
    assert slow_start.growing
    slow_start.end_round(long, USUAL, 1e6, measured=True, cap=FIRST)
    assert not slow_start.growing


def test_it_ends_after_rounds_with_a_short_queue() -> None:
    slow_start = SlowStart(FIRST, MOST)
    late = USUAL + 1.1 * DELAY_LEAST
    slow_start.take_trip(late, USUAL, 10.0)
    rate = 1e6
    for number in range(CONSERVATIVE_ROUNDS):
        slow_start.take_trip(late, USUAL, 10.1 + number)
        rate *= 1.3  # it still rises
        assert slow_start.growing
        slow_start.end_round(late, USUAL, rate, measured=True, cap=FIRST)
    assert not slow_start.growing
    assert not slow_start.conservative


def test_a_path_a_quarter_faster_is_grown_into_from_the_cap_in_force() -> None:
    slow_start = full(1e6)
    for rate, state in ((1.24e6, (False, FIRST, 1e6)), (1.26e6, (True, 777_000, 1.26e6))):
        slow_start.end_round(USUAL, USUAL, rate, measured=True, cap=777_000)
        assert (slow_start.growing, slow_start.cap, slow_start.full_rate) == state


@pytest.mark.parametrize(("trip", "most", "cap"), [
    (SHORT_ROUND_TRIP, MOST, SHORT_FIRST), (1.1 * SHORT_ROUND_TRIP, MOST, FIRST), (SHORT_ROUND_TRIP, 5000, 5000),
])  # fmt: skip
def test_a_short_path_begins_with_more(trip: float, most: int, cap: int) -> None:
    slow_start = SlowStart(FIRST, most)
    slow_start.take_trip(trip, 0.004, 10.0)
    assert slow_start.cap == cap


def test_the_cap_of_the_connection_before_counts_once_on_a_path_no_longer() -> None:
    slow_start = SlowStart(FIRST, MOST, earlier=(500_000, 0.1))
    assert slow_start.cap == FIRST
    slow_start.take_trip(0.13, 0.13, 10.0)
    assert slow_start.cap == FIRST
    slow_start.take_trip(0.125, 0.125, 10.1)
    assert slow_start.cap == 500_000
    small = SlowStart(FIRST, 300_000, earlier=(500_000, 0.1))
    small.take_trip(0.1, 0.1, 10.0)
    assert small.cap == 300_000


def test_a_full_path_makes_nothing_of_the_connection_before() -> None:
    slow_start = SlowStart(FIRST, MOST, earlier=(500_000, 0.1))
    slow_start.end_round(1.0, USUAL, 1e6, measured=True, cap=FIRST)
    assert not slow_start.growing
    slow_start.take_trip(0.05, 0.05, 10.0)
    assert slow_start.cap == FIRST

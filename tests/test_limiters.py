"""The token bucket."""

from __future__ import annotations

from arcbridge.limiters import Allowance


def test_a_burst_and_then_the_rate() -> None:
    bucket = Allowance(3, 2.0)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    bucket = Allowance(3, 2.0)
    for _ in range(3):
        bucket.take(100.0)
    assert bucket.take(100.5)
    assert not bucket.take(100.5)


def test_a_flood_stays_refused() -> None:
    bucket = Allowance(10, 1.0)
    for _ in range(100):
        bucket.take(0.0)
    assert not bucket.take(50.0)


def test_it_never_holds_more_than_the_burst() -> None:
    bucket = Allowance(2, 1.0)
    bucket.give(100)
    assert bucket.take(1e9)
    assert bucket.take(1e9)
    assert not bucket.take(1e9)


def test_a_clock_that_stands_or_steps_back_gives_nothing() -> None:
    bucket = Allowance(1, 1000.0)
    assert bucket.take(5.0)
    assert not bucket.take(4.0)


def test_giving_pays_the_debt() -> None:
    bucket = Allowance(1, 0.0)
    bucket.take(0.0)
    assert not bucket.take(0.0)
    bucket.give(2)
    assert bucket.take(0.0)

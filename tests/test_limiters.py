"""Token buckets, one and one per key, and caps on what runs at once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.limiters import Bursts, KeyedTokenBucket, TokenBucket


def test_a_burst_and_then_the_rate() -> None:
    bucket = TokenBucket(3, 2.0)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    bucket = TokenBucket(3, 2.0)
    for _ in range(3):
        bucket.take(100.0)
    assert bucket.take(100.5)
    assert not bucket.take(100.5)


def test_a_caller_that_is_refused_owes_nothing_and_a_time_that_lies_back_gives_nothing() -> None:
    bucket = TokenBucket(2, 1.0)
    assert [bucket.reserve(100.0) is not None for _ in range(50)] == [True, True, *[False] * 48]
    assert bucket.reserve(101.0) is not None
    assert bucket.reserve(101.5) is None
    assert bucket.reserve(103.5, count=2.0) is not None
    assert bucket.reserve(103.0) is None
    assert bucket.reserve(104.4) is None
    assert bucket.reserve(104.5) is not None
    bucket.take(104.0, 0.0)
    assert bucket.reserve(105.4) is None, "104 to 104.5 counts once"
    assert bucket.reserve(105.5) is not None


@pytest.mark.parametrize(("burst", "rate"), [(20, 4.0), (3, 0.5)])
def test_other_numbers_and_what_was_spent_stays_spent(burst: int, rate: float) -> None:
    bucket = TokenBucket(5, 1.0)
    assert bucket.take(100.0, 2.0)
    bucket.change(100.0, burst, rate)
    assert bucket.reserve(100.0, count=burst - 2) is not None
    assert bucket.reserve(100.0, count=0.1) is None
    assert bucket.reserve(100.0 + 1 / rate) is not None
    assert bucket.reserve(100.0 + 1 / rate) is None


def test_giving_pays_the_debt() -> None:
    bucket = TokenBucket(1, 0.0)
    bucket.take(0.0)
    assert not bucket.take(0.0)
    bucket.give(2)
    assert bucket.take(0.0)


def test_waiting_takes_nothing_and_says_how_long() -> None:
    bucket = TokenBucket(2, 0.5)
    assert bucket.wait(100.0) == bucket.wait(100.0, 2.0) == 0.0
    bucket.take(100.0, 2.0)
    assert bucket.wait(100.0) == bucket.wait(100.0) == 2.0
    assert bucket.wait(101.0) == 1.0
    assert bucket.wait(103.0) == 0.0
    bucket.take(100.0, 3.0)
    assert bucket.wait(100.0, 0.0) == 6.0


def test_a_rate_of_zero_never_refills() -> None:
    bucket = TokenBucket(1, 0.0)
    bucket.take(0.0)
    assert bucket.wait(1e9) == math.inf
    assert bucket.reserve(1e9, 1e9) is None


def test_turns_come_one_after_the_other() -> None:
    bucket = TokenBucket(1, 10)
    assert [bucket.reserve(1000.0, 0.35) for _ in range(4)] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert bucket.reserve(1000.0, 0.35) is None
    assert bucket.wait(1000.0) == pytest.approx(0.4)


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=300), st.integers(1, 20), st.floats(1, 200))
def test_turns_never_exceed_the_rate_and_the_burst(gaps: list[float], burst: int, rate: float) -> None:
    bucket, now, turns = TokenBucket(burst, rate), 1000.0, []
    for gap in gaps:
        now += gap
        wait = bucket.reserve(now, 2.0)
        if wait is not None:
            assert 0 <= wait <= 2.0
            turns.append(now + wait)
    assert turns == sorted(turns)
    for first in range(0, len(turns), 7):
        for last in range(first, len(turns), 5):
            assert last - first + 1 <= burst + (turns[last] - turns[first]) * rate + 1e-3


def test_each_key_has_a_bucket_of_its_own() -> None:
    limiter: KeyedTokenBucket[str] = KeyedTokenBucket(2, 0.1, size=10)
    assert [limiter.take("a", 0.0) for _ in range(3)] == [True, True, False]
    assert limiter.take("b", 0.0)
    assert limiter.wait("a", 0.0) == pytest.approx(20.0)
    assert limiter.wait("c", 0.0) == 0.0
    assert len(limiter) == 2, "asking remembers no key"


def test_a_full_table_forgets_the_key_that_was_charged_longest_ago() -> None:
    limiter: KeyedTokenBucket[int] = KeyedTokenBucket(1, 0.001, size=100)
    for key in range(10_000):
        limiter.take(key, 0.0)
        limiter.take(0, 0.0)
    assert len(limiter) == 100
    assert limiter.wait(0, 0.0) > 0, "charged all the time"
    assert limiter.wait(1, 0.0) == 0.0
    assert limiter.wait(9_999, 0.0) > 0


def test_keys_without_a_place_share_one_bucket() -> None:
    limiter: KeyedTokenBucket[int] = KeyedTokenBucket(2, 0.1, size=3, shares=True)
    passed = [key for key in range(1000) if limiter.reserve(key, 0.0) is not None]
    assert passed == [0, 1, 2, 3, 4]
    assert len(limiter) == 3
    assert limiter.wait(0, 0.0) == 0.0
    assert limiter.wait(1000, 0.0) == pytest.approx(10.0)
    assert limiter.wait(1000, 10.0) == 0.0, "key 0 is as good as forgotten"
    assert limiter.reserve(1000, 10.0) == limiter.reserve(1001, 10.0) == 0.0
    assert len(limiter) == 3


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0, 5)), max_size=300), st.integers(1, 5))
def test_the_sum_over_all_keys_is_bounded(calls: list[tuple[int, float]], size: int) -> None:
    limiter: KeyedTokenBucket[int] = KeyedTokenBucket(2, 0.5, size=size, shares=True)
    now, passed = 0.0, 0
    for key, gap in calls:
        now += gap
        passed += limiter.reserve(key, now) is not None
        assert len(limiter) <= size
    assert passed <= (size + 1) * (2 + 0.5 * now) + 1e-6


def test_a_burst_is_told_of_once_and_counted() -> None:
    bursts: Bursts[str] = Bursts(10.0)
    assert bursts.seen("a", 100.0) == 1
    assert [bursts.seen("a", 100.0 + n) for n in range(9)] == [None] * 9
    assert bursts.seen("b", 105.0) == 1
    assert bursts.seen("a", 110.0) == 10
    assert bursts.seen("a", 200.0) == 1


def test_a_keyed_bucket_that_changes_forgets_no_debt() -> None:
    buckets: KeyedTokenBucket[str] = KeyedTokenBucket(2, 1.0, size=4, shares=True)
    assert buckets.take("a", 0.0, 2)
    buckets.change(0.0, 4, 2.0)
    assert buckets.wait("a", 0.0, 2) == 0.0, "two were spent, and four may be"
    assert buckets.wait("a", 0.0, 3) == 0.5
    assert buckets.wait("new", 0.0, 4) == 0.0

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arcbridge.net.backoff import CAP, HEALTHY, Backoff


def test_bounds_double_up_to_the_cap() -> None:
    highest = Backoff(random=lambda: 1.0)
    assert [highest.next_delay() for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, CAP, CAP]


def test_jitter_is_full() -> None:
    lowest = Backoff(random=lambda: 0.0)
    assert [lowest.next_delay() for _ in range(5)] == [0.0] * 5


def test_a_healthy_minute_is_a_new_story() -> None:
    backoff = Backoff(random=lambda: 1.0)
    for _ in range(10):
        backoff.next_delay()
    assert backoff.next_delay(lasted=HEALTHY - 1) == CAP
    assert backoff.next_delay(lasted=HEALTHY) == 0.5
    assert backoff.attempt == 1
    backoff.reset()
    assert backoff.next_delay() == 0.5


@given(st.lists(st.one_of(st.none(), st.floats(0, 600)), max_size=200), st.floats(0, 0.999))
def test_never_before_the_hint_never_long_after_it(hints: list[float | None], draw: float) -> None:
    backoff = Backoff(random=lambda: draw)
    for hint in hints:
        delay = backoff.next_delay(hint=hint)
        assert (hint or 0) <= delay <= (hint or 0) + CAP


def test_weeks_of_failures_do_not_overflow() -> None:
    backoff = Backoff(random=lambda: 1.0)
    backoff.attempt = 100_000
    assert backoff.next_delay() == CAP

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.relay.handshake_rate import HandshakeRate


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_turns_come_one_after_the_other() -> None:
    pace = HandshakeRate(10, longest=0.35, clock=Clock())
    assert [pace.turn() for _ in range(4)] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert pace.turn() is None
    assert pace.backlog == pytest.approx(0.4)


def test_who_is_turned_away_takes_no_turn() -> None:
    clock = Clock()
    pace = HandshakeRate(10, longest=0.05, clock=clock)
    assert [pace.turn() for _ in range(100)] == [0.0] + [None] * 99
    clock.now += 0.1
    assert pace.turn() == pytest.approx(0.0)


def test_a_pause_gives_a_burst_and_no_more() -> None:
    clock = Clock()
    pace = HandshakeRate(10, burst=3, longest=1.0, clock=clock)
    assert [pace.turn() for _ in range(4)] == pytest.approx([0.0, 0.0, 0.0, 0.1])
    clock.now += 1e6
    assert pace.backlog == 0.0
    assert [pace.turn() for _ in range(4)] == pytest.approx([0.0, 0.0, 0.0, 0.1])


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=300), st.integers(1, 20), st.floats(1, 200))
def test_never_more_than_the_rate_and_the_burst(gaps: list[float], burst: int, rate: float) -> None:
    clock = Clock()
    pace = HandshakeRate(rate, burst=burst, longest=2.0, clock=clock)
    turns = []
    for gap in gaps:
        clock.now += gap
        wait = pace.turn()
        if wait is not None:
            assert 0 <= wait <= 2.0
            turns.append(clock.now + wait)
    assert turns == sorted(turns)
    for first in range(0, len(turns), 7):
        for last in range(first, len(turns), 5):
            assert last - first + 1 <= burst + (turns[last] - turns[first]) * rate + 1e-3

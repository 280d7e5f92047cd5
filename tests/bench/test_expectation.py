"""How long a run still takes."""

from __future__ import annotations

from bench.expectation import Expectation, minutes


def test_what_is_left_follows_the_pace_of_what_is_done() -> None:
    now = [100.0]
    expectation = Expectation(60.0, lambda: now[0])
    assert expectation.left_s() == 60
    now[0] += 30
    expectation.done(20)
    assert expectation.left_s() == 60, "half as fast as expected"
    expectation.done(50)
    assert expectation.left_s() == 0
    assert expectation.left() == "about 0 s left"
    assert (minutes(89), minutes(150)) == ("89 s", "2 min")

"""Liveness, by a clock that is an argument."""

from __future__ import annotations

import pytest

from arcbridge.wire.keepalive import ROUND_TRIP_MEMORY, Keepalive


def test_nothing_arrives() -> None:
    alive = Keepalive(10.0, 25.0, 100.0)
    assert alive.dead(124.9) is None
    assert "arrived for 25 s" in (alive.dead(125.0) or "")
    alive.last_received = 120.0
    assert alive.dead(144.9) is None


def test_our_way_out_is_cut_though_the_way_in_works() -> None:
    alive = Keepalive(10.0, 25.0, 0.0)
    alive.ping(10.0)
    for second in range(11, 35):
        alive.last_received = float(second)
        assert alive.dead(float(second)) is None
    alive.ping(30.0)
    alive.last_received = 36.0
    assert "that was sent" in (alive.dead(36.0) or "")


def test_progress_without_a_pong_is_life() -> None:
    alive = Keepalive(10.0, 25.0, 0.0)
    alive.ping(10.0)
    for second in range(11, 100):
        alive.last_received = float(second)
        alive.last_progress = float(second)
        assert alive.dead(float(second)) is None
    alive.last_received = 123.0
    assert alive.dead(124.0) is not None


def test_a_side_that_leaves_ping_to_the_other_sends_none_while_the_others_come() -> None:
    alive = Keepalive(10.0, 25.0, 0.0)
    for second in range(1, 100, 10):
        assert not alive.ping_due(float(second))
        alive.last_received = float(second)
        alive.last_progress = float(second)
        alive.peer_pinged(float(second))
    assert not alive.ping_due(110.9)
    assert alive.ping_due(111.0), "20 s after the last one"


def test_it_still_notices_that_its_answers_do_not_arrive() -> None:
    alive = Keepalive(10.0, 25.0, 0.0)
    for second in (10.0, 20.0, 30.0):
        alive.last_received = second
        alive.last_progress = 10.0
        alive.peer_pinged(second)
    assert alive.dead(34.9) is None
    alive.last_received = 35.0
    assert "that was sent" in (alive.dead(35.0) or "")


def test_pings_are_due_by_the_interval() -> None:
    alive = Keepalive(10.0, 25.0, 0.0)
    assert not alive.ping_due(9.99)
    assert alive.ping_due(10.0)
    assert alive.ping(10.0) == 1
    assert not alive.ping_due(19.9)
    assert alive.ping(20.0) == 2


def test_the_deadline_is_when_the_answer_may_change() -> None:
    alive = Keepalive(10.0, 25.0, 0.0)
    assert alive.next_deadline() == 10.0
    alive.ping(10.0)
    alive.last_received = 11.0
    assert alive.next_deadline() == 20.0
    alive.ping(20.0)
    alive.ping(30.0)
    assert alive.next_deadline() == 35.0


def test_the_smallest_round_trip_counts_for_a_while() -> None:
    alive = Keepalive(10.0, 25.0, 0.0)
    assert alive.round_trip == 0.0
    alive.sample(0.2, 1.0)
    alive.sample(0.05, 2.0)
    alive.sample(0.5, 3.0)
    assert alive.round_trip == 0.05
    alive.sample(0.5, 2 + ROUND_TRIP_MEMORY)
    assert alive.round_trip == 0.05
    alive.sample(0.5, 4 + 2 * ROUND_TRIP_MEMORY)
    alive.sample(0.5, 6 + 3 * ROUND_TRIP_MEMORY)
    assert alive.round_trip == 0.5, "a path that became longer is believed in the end"


@pytest.mark.parametrize("number", [0, 2, 99, 2**64 - 1])
def test_an_answer_to_no_ping_counts_for_nothing(number: int) -> None:
    alive = Keepalive(10.0, 25.0, 0.0)
    alive.ping(1.0)
    alive.pong(number, 2.0)
    assert alive.round_trip == 0.0
    alive.last_received = 26.0
    assert alive.dead(26.0) is not None


def test_a_late_answer_is_measured_from_its_own_ping() -> None:
    alive = Keepalive(10.0, 25.0, 0.0)
    alive.ping(0.0)
    alive.ping(10.0)
    alive.pong(2, 10.25)  # the peer answers the latest only
    assert alive.round_trip == 0.25

"""The probe of the round trip alone: when it is wanted, when the queue counts as empty, and what it returns."""

from __future__ import annotations

from arcbridge.wire.rate_estimate import SPAN
from arcbridge.wire.round_trip import PROBE_INTERVAL, SLOW_ROUNDS, RoundTripProbe

USUAL = 0.02
"""Seconds that an answer takes without a queue."""
SLOW = 2 * USUAL + 2.1 * SPAN
CAP = 1000
"""Bytes that may be under way during the probe."""
START = 10.0
LATER = START + PROBE_INTERVAL
"""The first moment, monotonic seconds, at which a probe may begin."""


def probing() -> RoundTripProbe:
    probe = RoundTripProbe(START)
    assert probe.begin(LATER)
    return probe


def finish(probe: RoundTripProbe) -> None:
    """Let a probe end: its queue is empty, and two PINGs are answered."""
    probe.take_count(received=0, sent=0, cap=CAP)
    assert probe.take_trip(USUAL, received=1, sent=1, cap=CAP) == 0
    assert probe.take_trip(USUAL, received=2, sent=2, cap=CAP) == USUAL
    assert not probe.active


def test_probes_keep_their_distance() -> None:
    probe = RoundTripProbe(START)
    assert (probe.begin(START + 0.9 * PROBE_INTERVAL), probe.active) == (False, False)
    assert (probe.begin(LATER), probe.active) == (True, True)
    assert not probe.begin(LATER + 5 * PROBE_INTERVAL), "one runs"


def test_slow_rounds_in_a_row_are_a_doubt() -> None:
    probe = RoundTripProbe(START)
    for _ in range(SLOW_ROUNDS - 1):
        probe.end_round(SLOW, USUAL)
    assert not probe.doubts(LATER)
    probe.end_round(USUAL, USUAL)
    for _ in range(SLOW_ROUNDS - 1):
        probe.end_round(SLOW, USUAL)
    assert not probe.doubts(LATER), "not in a row"
    probe.end_round(SLOW, USUAL)
    assert probe.doubts(LATER)
    assert not probe.doubts(START + 0.9 * PROBE_INTERVAL)
    assert probe.begin(LATER)
    after = LATER + 2 * PROBE_INTERVAL
    finish(probe)
    assert not probe.doubts(after), "a probe forgets the rounds before it"
    assert probe.begin(after)
    for _ in range(SLOW_ROUNDS):
        probe.end_round(SLOW, USUAL)
    assert not probe.doubts(after + PROBE_INTERVAL), "one runs"
    finish(probe)
    assert probe.doubts(after + PROBE_INTERVAL)


def test_the_smallest_answer_behind_an_empty_queue_ends_the_probe() -> None:
    probe = probing()
    assert probe.take_trip(0.2, received=4000, sent=6000, cap=CAP) == 0, "the queue is not empty"
    probe.take_count(received=6500, sent=7500, cap=CAP)  # from here on it is
    assert probe.take_trip(0.01, received=7500, sent=8000, cap=CAP) == 0, "it left before"
    assert probe.take_trip(0.08, received=7501, sent=8200, cap=CAP) == 0, "the other end began later"
    assert probe.take_trip(0.05, received=8000, sent=8500, cap=CAP) == 0, "a round more is not over"
    assert probe.take_trip(0.06, received=8201, sent=8600, cap=CAP) == 0.05
    assert not probe.active


def test_a_count_with_an_answer_shows_the_empty_queue_as_well() -> None:
    probe = probing()
    assert probe.take_trip(0.2, received=5000, sent=6000, cap=CAP) == 0
    assert probe.take_trip(0.08, received=6001, sent=6500, cap=CAP) == 0
    assert probe.take_trip(0.09, received=6501, sent=7000, cap=CAP) == 0.08


def test_the_moment_of_the_empty_queue_is_the_first_one() -> None:
    probe = probing()
    probe.take_count(received=5000, sent=6000, cap=CAP)
    probe.take_count(received=6000, sent=7000, cap=CAP)
    assert probe.take_trip(0.08, received=6001, sent=7000, cap=CAP) == 0
    assert probe.take_trip(0.08, received=7001, sent=7500, cap=CAP) == 0.08


def test_each_probe_measures_anew() -> None:
    probe = probing()
    probe.take_count(received=0, sent=0, cap=CAP)
    assert probe.take_trip(0.01, received=1, sent=1, cap=CAP) == 0
    assert probe.take_trip(0.01, received=2, sent=2, cap=CAP) == 0.01
    assert probe.begin(LATER + PROBE_INTERVAL)
    assert probe.take_trip(0.3, received=3, sent=3, cap=CAP) == 0
    assert probe.take_trip(0.3, received=4, sent=4, cap=CAP) == 0
    assert probe.take_trip(0.3, received=5, sent=5, cap=CAP) == 0.3

"""The delivery rate from samples alone: the best of two periods, and what a sender's own limits must not teach it."""

from __future__ import annotations

from arcbridge.wire.rate_estimate import ROUNDS, RateEstimate


def rounds(estimate: RateEstimate, rate: float, count: int) -> list[bool]:
    """Rounds of one sample each; whether a period ended with each of them."""
    ended = []
    for _ in range(count):
        estimate.take(rate, app_limited=False, probing=False)
        ended.append(estimate.end_round(probing=False))
    return ended


def test_the_best_sample_is_the_rate() -> None:
    estimate = RateEstimate()
    assert estimate.rate == 0
    for rate in (3e6, 5e6, 4e6):
        estimate.take(rate, app_limited=False, probing=False)
    assert estimate.rate == 5e6
    assert estimate.round_rate == 5e6
    assert not estimate.end_round(probing=False)
    assert (estimate.rate, estimate.round_rate, estimate.rounds) == (5e6, 0, 1)


def test_a_slower_path_is_believed_after_two_periods_at_most() -> None:
    estimate = RateEstimate()
    assert rounds(estimate, 5e6, ROUNDS)[-1]
    assert rounds(estimate, 1e6, ROUNDS)[-1]
    assert estimate.rate == 5e6, "the round that ended a period counts in the next one"
    estimate.take(2e6, app_limited=True, probing=False)
    assert estimate.rate == 5e6, "the best of this period is not the best of both"
    assert rounds(estimate, 1e6, ROUNDS)[-1]
    assert rounds(estimate, 1e6, ROUNDS)[-1]
    assert estimate.rate == 1e6


def test_a_faster_path_is_believed_at_once_and_for_a_whole_period() -> None:
    estimate = RateEstimate()
    rounds(estimate, 1e6, ROUNDS - 1)
    rounds(estimate, 5e6, 1)
    rounds(estimate, 1e6, ROUNDS - 1)
    assert estimate.rate == 5e6


def test_an_app_limited_sample_raises_the_rate_and_is_no_round() -> None:
    estimate = RateEstimate()
    rounds(estimate, 2e6, 1)
    for rate in (1e6, 3e6):
        estimate.take(rate, app_limited=True, probing=False)
    assert estimate.rate == 3e6, "the path carries at least so much"
    for _ in range(3 * ROUNDS):
        assert not estimate.end_round(probing=False)
        estimate.take(1e6, app_limited=True, probing=False)
    assert estimate.rate == 3e6, "a sender that sends little forgets nothing"
    assert estimate.rounds == 1


def test_a_halved_cap_changes_neither_the_best_nor_the_period() -> None:
    estimate = RateEstimate()
    rounds(estimate, 2e6, 1)
    for _ in range(3 * ROUNDS):
        estimate.take(3e6, app_limited=False, probing=True)
        assert not estimate.end_round(probing=True)
    assert (estimate.rate, estimate.rounds, estimate.round_rate) == (2e6, 1, 0)


def test_a_burst_counts_for_its_period_and_the_next() -> None:
    estimate = RateEstimate()
    estimate.ack_burst = 70_000
    rounds(estimate, 1e6, ROUNDS)
    assert (estimate.ack_burst, estimate.ack_burst_before) == (0, 70_000)
    rounds(estimate, 1e6, ROUNDS)
    assert (estimate.ack_burst, estimate.ack_burst_before) == (0, 0)


def test_a_restart_keeps_the_latest_round_alone() -> None:
    estimate = RateEstimate()
    rounds(estimate, 5e6, ROUNDS + 2)
    rounds(estimate, 1e6, 1)
    assert estimate.rate == 5e6
    assert estimate.restart() == estimate.rate == 1e6
    assert estimate.rounds == 0
    rounds(estimate, 2e6, 1)
    assert estimate.rate == 2e6, "no better sample from before is left"

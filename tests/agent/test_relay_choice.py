"""Which relays an agent connects to: spread, stand-ins, and the patience that relays ask for."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from arcbridge.agent.relay_choice import HINT_MAX, RelayChoice
from arcbridge.net.address import Address
from arcbridge.net.backoff import HEALTHY, Backoff
from arcbridge.net.round_trips import RoundTrips

A, B, C, D = (Address(name, 443) for name in "abcd")


def choice(wanted: int = 2, *, draw: float = 0.5) -> RelayChoice:
    """Four relays in the order A, B, C, D; every random number of a backoff is `draw`."""
    return RelayChoice([A, B, C, D], wanted, draw=lambda: 0.0, make_backoff=lambda: Backoff(random=lambda: draw))


def test_the_order_is_the_draws() -> None:
    assert choice().order == [A, B, C, D]
    assert RelayChoice([A, B, C, D], 2, draw=lambda: 0.999).order == [D, C, B, A]


def test_many_agents_spread() -> None:
    draw = random.Random(1).random
    preferred = Counter(relay for _ in range(4000) for relay in RelayChoice([A, B, C, D], 2, draw=draw).preferred)
    assert sum(preferred.values()) == 8000
    assert all(1850 < count < 2150 for count in preferred.values()), preferred


@pytest.mark.parametrize(("wanted", "kept"), [(0, 1), (1, 1), (2, 2), (4, 4), (9, 4)])
def test_how_many(wanted: int, kept: int) -> None:
    assert choice(wanted).wanted == kept
    assert len(choice(wanted).preferred) == kept


def test_the_next_is_the_first_that_is_free() -> None:
    made = choice()
    assert made.next([], 0.0) == A
    assert made.next([A], 0.0) == B
    assert made.next([A, B, C, D], 0.0) is None
    assert made.next_time([A, B, C, D]) is None


def near(choice: RelayChoice, **seconds: float) -> None:
    for name, found in seconds.items():
        choice.round_trips.note(str(Address(name, 443)), found)


def test_nearer_relays_take_the_place_of_far_ones() -> None:
    made = choice()
    near(made, a=0.150, b=0.160, c=0.010, d=0.012)
    assert made.preferred == [A, B]
    made.rerank()
    assert set(made.preferred) == {C, D}
    made.rerank()
    assert set(made.preferred) == {C, D}
    near(made, a=0.011)
    before = made.preferred
    made.rerank()
    assert made.preferred == before, "an equal one takes nobody's place"
    assert made.order[2] == A, "and stands in first"


def test_what_is_known_counts_from_the_start() -> None:
    known = RoundTrips()
    for relay in (A, B, C):
        known.note(str(relay), 0.150)
    known.note(str(D), 0.010)
    starts = [RelayChoice([A, B, C, D], 1, round_trips=known, draw=random.Random(n).random) for n in range(100)]
    assert [made.order[0] for made in starts].count(D) >= 95


def test_a_region_is_preferred_and_no_duty() -> None:
    made = RelayChoice([A, B, C, D], 2, region={C}, draw=lambda: 0.0)
    near(made, a=0.010, c=0.150, d=0.011)
    made.rerank()
    assert set(made.preferred) in ({C, A}, {C, D})


def test_what_is_to_be_measured() -> None:
    made = choice()
    near(made, a=0.010, b=0.010)
    assert made.unmeasured([], 3600.0) == [C, D]
    assert made.unmeasured([C], 3600.0) == [D]
    assert made.unmeasured([], 0.0) == [A, B, C, D], "all are old"
    assert choice(4).unmeasured([], 0.0) == [], "all are wanted"


def test_a_failed_relay_waits_and_holds_no_other_up() -> None:
    made = choice()
    assert made.failed(A, 100.0) == 0.25
    assert made.next([], 100.0) == B
    assert not made.may_try(A, 100.0)
    assert made.next_time([B, C, D]) == 100.25
    assert made.next([], 100.25) == A


def test_one_that_turns_the_agent_away_slows_it_down_at_all() -> None:
    made = RelayChoice([A, B, C, D], 2, draw=lambda: 0.5)
    first = made.order[0]
    made.failed(first, 100.0, hint=7)
    made.turned_away(first, 100.0)
    assert made.next([], 100.2) is None
    assert not made.may_try(made.order[1], 100.2)
    assert made.next_time([]) == 100.25
    assert made.next([], 100.25) == made.order[1], "the one that named a time is not tried before it"

    now, pauses = 100.25, []
    for _ in range(8):
        made.turned_away(first, now)
        then = made.next_time([])
        assert then is not None
        pauses.append(then - now)
        now = then
    assert pauses == [0.5, 1.0, 2.0, *[2.5] * 5], "the delay doubles, whichever relay is next, up to a bound"
    made.turned_away(first, now, within=2.0)
    assert made.next_time([]) == now + 2.0, "users wait"
    made.cap_delays(now, 0.5)
    assert made.next_time([]) == now + 0.5, "the last relay is lost, and the pause was for another one"
    made.turned_away(first, now + 100.0)
    assert made.next_time([]) == now + 100.25, "a minute later it is a new story"
    assert made.next_time(made.order) is None


def test_relays_that_turn_the_agent_away_come_last_behind_the_pause() -> None:
    """Two that always do, as a balancer without backends, kept the agent from the healthy ones for long."""
    made = RelayChoice([A, B, C, D], 2, draw=lambda: 0.5)
    first, second, third, _ = made.order
    for relay, at in ((first, 100.0), (second, 101.0)):
        made.failed(relay, at)
        made.turned_away(relay, at)
    assert made.next([], 110.0) == first, "once is no reason"
    for relay, at in ((first, 102.0), (second, 103.0)):
        made.turned_away(relay, at)
    assert made.next([], 110.0) == third
    assert made.next(made.order[2:], 110.0) == first, "it was the longest ago"
    made.turned_away(third, 103.0 + HEALTHY)
    assert made.next([], 110.0 + HEALTHY) == first, "it is forgotten"


def test_a_time_that_was_named_outlives_the_end_of_another_connection() -> None:
    made = choice(draw=0.0)
    assert made.failed(A, 100.0, hint=5.0) == 5.0
    assert made.failed(A, 100.5, lasted=3600.0) == 4.5
    made.left(A, 101.0)
    assert not made.may_try(A, 104.9)
    assert made.failed(A, 105.0) == 0.0


def test_failures_add_up_until_a_connection_was_good() -> None:
    made = choice(draw=0.999)
    delays = [made.failed(A, 0.0) for _ in range(8)]
    assert delays == sorted(delays)
    assert 29 < delays[-1] < 30
    assert made.failed(A, 0.0, lasted=61.0) < 0.5
    assert made.failed(B, 0.0) < 0.5, "each relay has its own"


@pytest.mark.parametrize(("hint", "least"), [(7, 7.0), (0.001, 1.0), (10**9, HINT_MAX)])
def test_b8_a_hint_is_obeyed_within_bounds(hint: float, least: float) -> None:
    delay = choice().failed(A, 0.0, hint=hint)
    assert least <= delay <= least + 30


def test_a_delay_is_bounded_while_sessions_wait_unless_the_relay_named_it() -> None:
    made = choice(draw=1.0)
    for _ in range(10):
        assert made.failed(A, 0.0, within=3.0) <= 3.0
    assert made.failed(A, 0.0) == 30.0, "the backoff has gone on"
    assert made.failed(A, 0.0, hint=7, within=3.0) >= 7.0
    assert made.failed(A, 0.0, not_before=50.0, within=3.0) == 50.0


def test_an_earlier_word_holds_still() -> None:
    made = choice()
    assert made.failed(A, 100.0, not_before=150.0) == 50.0
    assert made.failed(A, 200.0, not_before=150.0) < 1.0


def test_one_that_was_left_may_be_tried_at_once() -> None:
    made = choice()
    for _ in range(5):
        made.failed(A, 100.0)
    made.left(A, 101.0)
    assert made.may_try(A, 101.0)
    assert made.failed(A, 101.0) == 0.25


def test_surplus() -> None:
    made = choice()
    assert made.surplus([D, C]) == []
    assert made.surplus([D, C, A]) == [D]
    assert made.surplus([D, C, B, A]) == [C, D]


def test_in_a_hurry_pauses_are_cut_short_but_a_relays_own_word_is_not() -> None:
    made = choice(draw=0.999)
    for _ in range(8):
        made.failed(A, 100.0)
    made.failed(B, 100.0, hint=20)
    made.failed(C, 100.0, not_before=150.0)
    made.cap_delays(100.0, 0.5)
    assert made.may_try(A, 100.5)
    assert not made.may_try(A, 100.4)
    assert not made.may_try(B, 119.0)
    assert not made.may_try(C, 149.0)
    assert made.may_try(D, 100.0)
    made.failed(B, 200.0)
    made.cap_delays(200.0, 0.1)
    assert made.may_try(B, 200.1), "it named no time the last time"

"""Which relays an agent connects to: spread, stand-ins, and the patience that relays ask for."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from arcbridge.agent.relay_choice import AT_ONCE, HINT_MAX, PAUSE_LIMIT, SERVED, RelayChoice
from arcbridge.net.address import Address
from arcbridge.net.backoff import CAP, Backoff
from arcbridge.net.round_trips import RoundTrips

A, B, C, D = (Address(name, 443) for name in "abcd")
RELAYS = [Address(name, 443) for name in "abcdefghijkl"]


def choice(wanted: int = 2, *, draw: float = 0.5) -> RelayChoice:
    """Four relays in the order A, B, C, D; every random number of a backoff is `draw`."""
    return RelayChoice([A, B, C, D], wanted, draw=lambda: 0.0, make_backoff=lambda: Backoff(random=lambda: draw))


def test_the_order_is_the_draws() -> None:
    assert choice().order == [A, B, C, D]
    assert RelayChoice([A, B, C, D], 2, draw=lambda: 0.999).order == [D, C, B, A]


def failing(made: RelayChoice, until: float) -> list[tuple[float, Address]]:
    """When each relay is tried, one after the other, each of which turns the agent away within 10 ms."""
    now, tries = 0.0, []
    while now < until:
        if (relay := made.next((), now)) is None:
            now = max(made.next_time(()) or 0.0, now + 0.001)
            continue
        tries.append((now, relay))
        now += 0.01
        made.failed(relay, now)
    return tries


def test_after_some_failures_in_a_row_it_waits_whichever_relay_is_next() -> None:
    draw = random.Random(3).random
    tries = failing(RelayChoice(RELAYS, 2, draw=draw, make_backoff=lambda: Backoff(random=draw)), 60.0)
    assert len({relay for _, relay in tries[:AT_ONCE]}) == AT_ONCE
    assert tries[AT_ONCE - 1][0] < 0.1, "the first ones follow each other at once"
    assert len(tries) < 25, "twelve relays of which each has its own backoff would be tried a hundred times"
    assert len({relay for _, relay in tries}) == len(RELAYS), "and not the near ones alone"


@pytest.mark.parametrize("count", [2, 12, 24])
def test_one_relay_that_is_back_among_refused_ones_is_found_as_soon_as_its_backoff_allows(count: int) -> None:
    """All were away for a while, and one comes back: no relay that takes no connection makes the agent wait."""
    waits, draw, back_at = [], random.Random(count).random, 60.0
    relays = [Address(f"r{number}", 443) for number in range(count)]
    for number in range(100):
        made = RelayChoice(relays, 2, draw=draw, make_backoff=lambda: Backoff(random=draw))
        back, now = relays[number % count], 0.0
        while True:
            while (relay := made.next((), now)) is None:
                now = max(made.next_time(()) or 0.0, now)
            if relay == back and now >= back_at:
                break
            now += 0.01
            made.failed(relay, now, accepted=False)
        waits.append(now - back_at)
    assert max(waits) <= CAP + 1.0


def test_a_refused_try_within_a_row_neither_ends_nor_lengthens_the_wait() -> None:
    made = RelayChoice(RELAYS, 2, draw=lambda: 0.999, make_backoff=lambda: Backoff(random=lambda: 0.0))
    for _ in range(9):
        made.failed(A, 100.0)
    for _ in range(9):
        made.failed(B, 101.0, accepted=False)
    assert made.next_time(()) == pytest.approx(100.0 + PAUSE_LIMIT, abs=0.1)


def test_who_has_found_relays_away_has_no_tries_left_that_follow_each_other_at_once() -> None:
    made = RelayChoice(RELAYS, 2, draw=lambda: 0.999, make_backoff=lambda: Backoff(random=lambda: 0.0))
    for relay in RELAYS:
        made.failed(relay, 100.0, accepted=False)
    assert made.next((), 100.0) is not None
    made.failed(A, 100.0)
    assert made.next_time(()) == pytest.approx(101.0, abs=0.1), "the first wait is the shortest"


def test_a_connection_that_served_begins_another_row() -> None:
    made = RelayChoice(RELAYS, 2, draw=lambda: 0.999, make_backoff=lambda: Backoff(random=lambda: 0.0))
    for _ in range(9):
        made.failed(A, 100.0, lasted=0.1)
    assert made.next((), 101.0) is None
    assert made.next_time(()) == pytest.approx(100.0 + PAUSE_LIMIT, abs=0.1)
    made.cap_delays(100.0, 0.5)
    assert made.next((), 100.5) is not None
    made.failed(A, 200.0)
    assert made.next((), 200.0) is None
    made.failed(A, 200.0, within=2.0)
    assert made.next((), 202.0) is not None, "sessions wait for it"
    made.failed(A, 300.0, lasted=SERVED)
    assert made.next((), 300.0) is not None


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

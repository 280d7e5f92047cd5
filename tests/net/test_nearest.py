"""The order of relays by the length of the way: equals, preferred regions, and that no two take turns."""

from __future__ import annotations

import math
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from arcbridge.net.nearest import LEAST, SHARE, Nearest, shorter

lengths = st.lists(st.one_of(st.floats(0.0001, 2.0), st.just(math.inf)), min_size=1, max_size=8)
seeds = st.integers(0, 2**32)


def nearest(found: list[float], preferred: tuple[int, ...] = ()) -> Nearest[int]:
    return Nearest(lambda one: found[one], preferred)


def test_a_fifth_and_ten_milliseconds() -> None:
    assert shorter(0.010, 0.150)
    assert not shorter(0.150, 0.010)
    assert not shorter(0.001, 0.0105), "below 10 ms"
    assert not shorter(0.085, 0.100), "below a fifth"
    assert shorter(0.080, 0.100)
    assert shorter(1.0, math.inf)
    assert not shorter(math.inf, math.inf)
    assert not shorter(math.inf, 1.0)


@given(lengths, seeds)
def test_each_relay_stands_once_and_none_before_a_shorter_way(found: list[float], seed: int) -> None:
    ranked = nearest(found).ranked(range(len(found)), random.Random(seed).random)
    assert sorted(ranked) == list(range(len(found)))
    assert not any(shorter(found[other], found[ranked[0]]) for other in ranked)


@given(lengths, seeds, st.integers(1, 3))
def test_what_was_chosen_stays_chosen(found: list[float], seed: int, wanted: int) -> None:
    """With the same lengths a second choice changes nothing, whatever was in use first."""
    draw, relays = random.Random(seed).random, range(len(found))
    in_use = random.Random(seed).sample(relays, min(wanted, len(found)))
    chosen = nearest(found).chosen(in_use, relays, wanted, draw)
    assert len(set(chosen)) == min(wanted, len(found))
    assert nearest(found).chosen(chosen, relays, wanted, draw) == chosen
    outside = set(relays) - set(chosen)
    assert not any(shorter(found[other], found[one]) for other in outside for one in chosen)


@given(st.floats(0.001, 1.0), st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), max_size=40), seeds)
def test_hysteresis_never_flaps(length: float, noise: list[tuple[float, float]], seed: int) -> None:
    """Two equal ways whose measurements differ by less than the margin never replace each other."""
    margin = max(SHARE * length, LEAST) / 2.3  # of the longer one, which is at most a tenth more
    draw, in_use = random.Random(seed).random, [0]
    for one, other in noise:
        in_use = nearest([length + one * margin, length + other * margin]).chosen(in_use, [0, 1], 1, draw)
        assert in_use == [0]


@given(seeds)
def test_equals_are_drawn_evenly_and_a_far_one_never(seed: int) -> None:
    draw = random.Random(seed).random
    drawn = Counter(nearest([0.010, 0.012, 0.015, 0.150]).ranked(range(4), draw)[0] for _ in range(3000))
    assert drawn[3] == 0
    assert all(0.85 < drawn[one] / 1000 < 1.15 for one in range(3)), drawn


@given(seeds)
def test_a_near_relay_takes_the_place_of_the_farthest(seed: int) -> None:
    draw = random.Random(seed).random
    assert set(nearest([0.150, 0.010, 0.080]).chosen([0, 2], range(3), 2, draw)) == {1, 2}
    assert nearest([0.012, 0.010]).chosen([0], range(2), 1, draw) == [0], "an equal one does not"


def test_a_region_comes_before_the_round_trip_and_is_no_duty() -> None:
    found = nearest([0.010, 0.150, math.inf], preferred=(1, 2))
    assert found.ranked(range(3), lambda: 0.0) == [1, 2, 0]
    assert found.chosen([0], range(3), 1, lambda: 0.0) == [1]
    assert found.chosen([], [0], 1, lambda: 0.0) == [0], "where it has no relay"
    assert found.chosen([1], range(3), 1, lambda: 0.0) == [1]

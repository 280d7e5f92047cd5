"""The length of the way through each relay: both parts, the word of a relay, and what a session shows."""

from __future__ import annotations

import math
import random
from collections import Counter

from arcbridge.client.relay.path_lengths import WHOLE_COUNTS, PathLengths
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays
from arcbridge.net.round_trips import RoundTrips
from tests.support.clock import Clock

A, B, C, D = ALL = [RelayAccess(f"https://{name}:443") for name in "abcd"]


def ways(clock: Clock | None = None) -> PathLengths:
    return PathLengths(ALL, RoundTrips(clock=clock or Clock()), "prod")


def test_the_sum_counts() -> None:
    found = ways()
    found.learn(A, 0.010, 0.150)
    found.learn(B, 0.050, 0.050)
    assert round(found.length(A), 3) == 0.160
    assert round(found.length(B), 3) == 0.100
    assert found.nearest.before(B, A), "though A is nearer to the client"
    assert found.length(C) == math.inf


def test_a_relay_that_says_nothing_of_its_agent_attracts_nobody() -> None:
    """An older relay, or one of several workers."""
    found = ways()
    found.learn(A, 0.010, 0.0)
    assert found.length(A) == 0.010, "where all say nothing the client's own part counts"
    found.learn(B, 0.010, 0.020)
    assert found.length(A) == found.length(B)


def test_a_relay_without_an_agent_is_last_until_it_has_one() -> None:
    clock = Clock()
    found = ways(clock)
    found.learn(A, 0.010, 0.0)
    found.learn(B, 0.100, 0.010)
    found.learn_absence(A)
    assert found.length(A) == math.inf
    assert round(found.possible(A), 3) == 0.020, "worth a question"
    assert found.of_cluster("other").length(A) == 0.010
    clock.now += 1
    found.learn(A, 0.010, 0.010)
    assert round(found.length(A), 3) == 0.020


def test_each_cluster_has_its_agents() -> None:
    found = ways()
    found.learn(A, 0.010, 0.150)
    other = found.of_cluster("other")
    assert other.length(A) == 0.010
    other.learn(A, 0.010, 0.001)
    assert round(found.length(A), 3) == 0.160


def test_j33_what_a_session_shows_counts_against_the_relays_word() -> None:
    clock = Clock()
    found = ways(clock)
    found.learn(A, 0.010, 0.000001)
    found.learn(B, 0.050, 0.030)
    assert found.nearest.before(A, B)
    found.learn_whole(A, 0.300)
    assert found.length(A) == 0.300
    assert found.nearest.before(B, A)
    for _ in range(10):
        found.learn(A, 0.010, 0.000001)
    assert found.nearest.before(B, A), "it may repeat itself"
    clock.now += WHOLE_COUNTS
    assert found.nearest.before(A, B), "once an hour it is tried again"


def test_near_in_a_hundred_starts_and_equals_are_spread() -> None:
    found = ways()
    for relay, own in zip(ALL, (0.010, 0.012, 0.150, 0.160), strict=True):
        found.learn(relay, own, 0.005)
    draw = random.Random(1).random
    first = Counter(Relays(ALL, draw=draw, lengths=found).order()[0] for _ in range(1000))
    assert first[C] + first[D] == 0
    assert 0.85 < first[A] / 500 < 1.15, first


def test_the_one_in_use_gives_way_to_a_nearer_one_alone() -> None:
    found = ways()
    for relay, own in zip(ALL, (0.012, 0.010, 0.150, 0.150), strict=True):
        found.learn(relay, own, 0.005)
    relays = Relays(ALL, draw=lambda: 0.0, lengths=found)
    relays.works(A)
    assert relays.order()[0] is A, "B is no nearer"
    relays.works(C)
    assert relays.order()[0] is B
    relays.failed(B)
    relays.failed(A)
    assert relays.order()[0] is C, "what failed lately is last, near or not"


def test_a_region_comes_first() -> None:
    found = PathLengths(ALL, RoundTrips(clock=Clock()), "prod", frozenset({C.address}))
    for relay, own in zip(ALL, (0.010, 0.012, 0.150, 0.160), strict=True):
        found.learn(relay, own, 0.005)
    relays = Relays(ALL, lengths=found)
    assert relays.order()[0] is C
    relays.failed(C)
    assert relays.order()[0] in (A, B), "it is no duty"

"""What is kept, what is let go, and what is sent again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.wire.backlog import Backlog
from arcbridge.wire.replay import FLUSH_OVERHEAD, Budget, Replay


def filled(
    *flushes: list[bytes], most: int = 1000, budget: Budget | None = None, backlog: Backlog | None = None
) -> Replay:
    replay = Replay(most, budget or Budget(10**9), backlog or Backlog(10**9))
    for pieces in flushes:
        replay.append(pieces, sum(map(len, pieces)))
    return replay


@given(
    st.lists(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=4), max_size=8),
    st.lists(st.integers(0, 700), max_size=4),
    st.integers(0, 700),
)
def test_it_gives_exactly_what_follows_an_offset(flushes: list[list[bytes]], acks: list[int], offset: int) -> None:
    whole = b"".join(b"".join(pieces) for pieces in flushes)
    budget, backlog = Budget(10**9), Backlog(10**9)
    replay = filled(*flushes, budget=budget, backlog=backlog)
    for ack in acks:
        replay.acknowledge(min(ack, len(whole)))
    assert replay.end == len(whole)
    assert budget.held == replay.size
    assert backlog.held == replay.held
    assert replay.size <= replay.held <= replay.size + FLUSH_OVERHEAD * len(flushes)
    if replay.holds(offset):
        assert b"".join(replay.since(offset)) == whole[offset:]
    else:
        with pytest.raises(ValueError, match="is not in"):
            replay.since(offset)
    assert replay.holds(len(whole))
    assert all(replay.holds(ack) for ack in acks if ack <= len(whole) and ack == max(acks))


def test_what_is_confirmed_does_not_count_any_more_be_it_a_part_of_a_flush() -> None:
    budget = Budget(10**9)
    replay = filled([b"abc", b"d"], [b"efgh"], budget=budget)
    replay.acknowledge(3)
    assert (replay.start, replay.size, budget.held) == (3, 5, 5)
    assert b"".join(replay.since(3)) == b"defgh"
    assert not replay.holds(2)
    replay.acknowledge(4)
    assert (replay.start, replay.size) == (4, 4)
    replay.acknowledge(1)
    assert (replay.start, replay.size) == (4, 4)
    assert not replay.holds(3)
    replay.acknowledge(8)
    assert (replay.start, replay.size, budget.held) == (8, 0, 0)


def test_a_history_of_one_large_flush_becomes_roomy_by_its_parts() -> None:
    """The peer confirms in smaller portions than are sent; nothing may wait for it to confirm the whole."""
    replay = filled([b"x" * 1000])
    seen = []
    for offset in (0, 499, 500):
        replay.acknowledge(offset)
        seen.append((replay.full, replay.roomy))
    assert seen == [(True, False), (False, False), (False, True)]


def test_full_and_roomy_have_a_distance() -> None:
    replay = filled([b"x" * 600], [b"x" * 399])
    seen = [(replay.full, replay.roomy)]
    replay.append([b"y"], 1)
    seen.append((replay.full, replay.roomy))
    replay.acknowledge(600)
    seen.append((replay.full, replay.roomy))
    assert seen == [(False, False), (True, False), (False, True)]


def test_the_budget_counts_for_those_above_the_floor() -> None:
    budget = Budget(100)
    small = filled([b"x" * 200], most=10**8, budget=budget)
    assert budget.full
    assert not small.full
    large = filled([b"x" * Replay.FLOOR], most=10**8, budget=budget)
    assert large.full
    assert not large.roomy
    small.clear()
    large.clear()
    assert budget.held == 0
    assert large.end == Replay.FLOOR

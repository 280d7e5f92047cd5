"""Counts of what waits, each a part of another."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arcbridge.wire.backlog import Backlog


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-50, 100)), max_size=40), st.integers(0, 3))
def test_a_backlog_holds_what_its_parts_hold(steps: list[tuple[int, int]], mover: int) -> None:
    process = Backlog(10**6)
    users = [Backlog(10**6, process), Backlog(10**6, process)]
    sessions = [Backlog(10**6, users[number % 2]) for number in range(4)]
    for number, count in steps:
        sessions[number].add(count)
    sessions[mover].move(users[0])
    held = [session.held for session in sessions]
    assert held == [sum(count for number, count in steps if number == i) for i in range(4)]
    assert sum(user.held for user in users) == process.held == sum(held)
    assert users[0].held == sum(held[i] for i in range(4) if i % 2 == 0 or i == mover)
    sessions[mover].move(None)
    assert process.held == sum(held) - held[mover]


def test_it_is_full_where_any_bound_is_reached() -> None:
    process = Backlog(30)
    user = Backlog(20, process)
    one, other = Backlog(10, user), Backlog(10, user)
    one.add(9)
    assert not one.full
    one.add(1)
    assert (one.full, one.spent, other.full) == (True, False, False)
    other.add(10)
    assert (one.spent, user.full, process.full) == (True, True, False)
    stranger = Backlog(100, process)
    stranger.add(10)
    assert (stranger.full, stranger.spent, process.full) == (True, True, True)
    one.remove(1)
    assert not stranger.full

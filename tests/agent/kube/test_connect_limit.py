"""How many connections to the API server a user and the process hold and make."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.agent.kube.connect_limit import FEW_PER_USER, LONGEST_WAIT, ConnectLimit, ConnectLimits
from arcbridge.agent.kube.status import RequestRefusal

LIMITS = ConnectLimits(connections=10, connections_per_user=4, connects_per_second=20, connects_per_second_per_user=5)


def test_l32_a_user_holds_only_so_many() -> None:
    limit = ConnectLimit(LIMITS)
    for _ in range(4):
        limit.enter("a")
    with pytest.raises(RequestRefusal, match="you have 4 requests at the API server and may have no more") as caught:
        limit.enter("a")
    assert (caught.value.status_code, caught.value.retry_after, limit.held, limit.refused) == (429, 1, 4, 1)
    limit.enter("b")
    limit.leave("a")
    limit.enter("a")


def test_l32_the_process_holds_only_so_many() -> None:
    limit = ConnectLimit(LIMITS)
    for number in range(10):
        limit.enter(f"user {number}")
    with pytest.raises(RequestRefusal, match="the agent has as many connections") as caught:
        limit.enter("another")
    assert caught.value.status_code == 429
    limit.leave("user 3")
    limit.enter("another")


def test_l32_a_user_who_connects_often_waits_and_then_is_refused() -> None:
    limit = ConnectLimit(LIMITS)
    assert [limit.user_turn("a", 100.0) for _ in range(20)] == [0.0] * 20, "a burst of four seconds' worth"
    waits = [limit.user_turn("a", 100.0) for _ in range(50)]
    assert waits == pytest.approx([n / 5 for n in range(1, 51)]), "then in turn"
    assert max(waits) <= LONGEST_WAIT
    with pytest.raises(RequestRefusal, match=r"more connections .* try again in 6 s") as caught:
        limit.user_turn("a", 100.0)
    assert caught.value.retry_after == 6
    assert (limit.user_turn("b", 100.0), limit.turn(100.0)) == (0.0, 0.0), "others do not wait for that user's turns"
    assert limit.user_turn("a", 200.0) == 0.0


def test_l32_the_processes_rate_is_shared_and_a_refusal_costs_nothing() -> None:
    limit = ConnectLimit(LIMITS)
    assert [limit.turn(0.0) for _ in range(40)] == [0.0] * 40
    assert [limit.turn(0.0) for _ in range(200)] == pytest.approx([n / 20 for n in range(1, 201)])
    with pytest.raises(RequestRefusal):
        limit.turn(0.0)
    assert limit.turn(1.0) == pytest.approx(LONGEST_WAIT - 1 + 1 / 20)


def test_many_connections_get_little_of_the_kernels_memory() -> None:
    limit = ConnectLimit()
    for _ in range(FEW_PER_USER):
        limit.enter("a")
        assert not limit.crowded("a")
    limit.enter("a")
    assert limit.crowded("a")
    assert not limit.crowded("b")
    for number in range(limit.limits.connections // 16):
        limit.enter(f"user {number}")
    assert limit.crowded("b")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=80))
def test_what_is_held_is_what_entered_and_did_not_leave(steps: list[tuple[str, bool]]) -> None:
    limit = ConnectLimit(LIMITS)
    held: dict[str, int] = dict.fromkeys("abc", 0)
    for user, enters in steps:
        if enters:
            try:
                limit.enter(user)
            except RequestRefusal:
                assert held[user] == 4 or sum(held.values()) == 10
            else:
                held[user] += 1
        elif held[user]:
            limit.leave(user)
            held[user] -= 1
        assert limit.held == sum(held.values()) <= 10
        assert max(held.values()) <= 4

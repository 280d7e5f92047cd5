"""How often connections to the API server are made for a user and for all of them."""

from __future__ import annotations

import itertools

import pytest

from arcbridge.agent.accounts import Account, Accounts, Limit
from arcbridge.agent.kube.connect_limit import FEW, FEW_PER_USER, LONGEST_WAIT, ConnectLimit
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.identity.claims import Identity
from arcbridge.settings.config import AgentLimitsConfig
from tests.agent.kube.bench import Member

_accounts = itertools.count()


def account(connects_per_second: int = 5) -> Account:
    accounts = Accounts(AgentLimitsConfig(connects_per_second=connects_per_second), monotonic=lambda: 0.0)
    name = f"user-{next(_accounts)}"
    return accounts.enter(Identity(name, "", (), name, "i", 4e9), Member())


def test_l32_a_user_who_connects_often_waits_and_then_is_refused() -> None:
    limit, a, b = ConnectLimit(20), account(), account()
    assert [limit.user_turn(a, 100.0) for _ in range(20)] == [0.0] * 20, "a burst of four seconds' worth"
    waits = [limit.user_turn(a, 100.0) for _ in range(50)]
    assert waits == pytest.approx([n / 5 for n in range(1, 51)]), "then in turn"
    assert max(waits) <= LONGEST_WAIT
    assert limit.delayed == 50
    with pytest.raises(RequestRefusal, match=r"need more than the 5 connections a second to the API") as caught:
        limit.user_turn(a, 100.0)
    assert (caught.value.status_code, caught.value.retry_after) == (429, 1)
    assert caught.value.limit == Limit.CONNECTS_PER_SECOND
    assert (limit.user_turn(b, 100.0), limit.turn(b, 100.0)) == (0.0, 0.0), "others do not wait for that user's turns"
    assert limit.user_turn(a, 200.0) == 0.0


def test_l32_the_rate_of_all_users_is_shared_and_a_refusal_costs_nothing() -> None:
    limit, a = ConnectLimit(20), account()
    assert [limit.turn(a, 0.0) for _ in range(40)] == [0.0] * 40
    assert [limit.turn(a, 0.0) for _ in range(200)] == pytest.approx([n / 20 for n in range(1, 201)])
    with pytest.raises(RequestRefusal, match="as many connections to the API server as it may") as caught:
        limit.turn(a, 0.0)
    assert (caught.value.status_code, caught.value.retry_after) == (429, 1)
    assert limit.turn(a, 1.0) == pytest.approx(LONGEST_WAIT - 1 + 1 / 20)


def test_l51_a_connection_that_nothing_waits_for_takes_turns_that_are_free_and_no_others() -> None:
    limit, a, b = ConnectLimit(1), account(1), account(100)
    assert [limit.has_turn(a, 0.0), limit.has_turn(a, 0.0), limit.has_turn(b, 0.0)] == [True, True, False]
    assert limit.user_turn(b, 0.0) == limit.user_turn(a, 0.0) == 0.0, "what was not free cost the user nothing"
    assert limit.turn(a, 0.0) == 1.0
    assert ConnectLimit().has_turn(b, 0.0)
    assert limit.delayed == 1


def test_without_a_limit_no_user_waits() -> None:
    limit, a = ConnectLimit(), account(0)
    assert {limit.user_turn(a, 0.0) + limit.turn(a, 0.0) for _ in range(5000)} == {0.0}


def test_many_connections_get_little_of_the_kernels_memory() -> None:
    limit, a, b = ConnectLimit(), account(), account()
    for _ in range(FEW_PER_USER):
        limit.enter(a)
        assert not limit.crowded(a)
    limit.enter(a)
    assert (limit.crowded(a), limit.crowded(b)) == (True, False)
    for _ in range(FEW):
        limit.enter(account())
    assert limit.crowded(b)
    for _ in range(FEW_PER_USER + 1):
        limit.leave(a)
    assert (limit.crowded(a), limit.held, a.connections) == (False, FEW, 0)

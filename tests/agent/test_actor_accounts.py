"""What one actor may take over all users: an account of its own that outlives its sessions (docs/threats.md#L52)."""

from __future__ import annotations

from arcbridge.agent.accounts import Accounts, Limit
from arcbridge.agent.actor_accounts import BURST, MAX_REMEMBERED, ActorAccount, ActorAccounts
from arcbridge.settings.config import ActorLimitsConfig, AgentLimitsConfig

from .kube.bench import Member


def entered(name: str = "bot", **tables: ActorLimitsConfig) -> tuple[ActorAccounts, ActorAccount]:
    accounts = Accounts(AgentLimitsConfig(actors=tables), monotonic=lambda: 1.0)
    assert accounts.actors is None, "made with the first actor"
    account = accounts.enter_actor(name, Member())
    assert accounts.actors is not None
    return accounts.actors, account


def test_requests_under_way_and_a_second() -> None:
    _, account = entered(bot=ActorLimitsConfig(requests_per_second=2, concurrent_requests=3))
    assert [account.admit_request(1.0) for _ in range(4)] == [None] * 3 + [Limit.ACTOR_CONCURRENT_REQUESTS]
    for _ in range(3):
        account.end_request()
    found = []
    for _ in range(2 * BURST):
        found.append(account.admit_request(1.0))
        if found[-1] is None:
            account.end_request()
    assert found == [None] * (2 * BURST - 3) + [Limit.ACTOR_REQUESTS_PER_SECOND] * 3
    assert account.in_flight == 0
    assert account.admit_request(1.5) is None


def test_without_a_table_nothing_is_limited_and_an_own_table_counts_before_that_of_all() -> None:
    _, account = entered(other=ActorLimitsConfig(1, 1, 1))
    assert [account.admit_request(1.0) for _ in range(100)] == [None] * 100
    assert not account.has_too_many_sessions()
    _, account = entered(**{"*": ActorLimitsConfig(sessions=5), "bot": ActorLimitsConfig(sessions=2)})
    assert account.limits.sessions == 2
    _, account = entered("ci", **{"*": ActorLimitsConfig(sessions=5), "bot": ActorLimitsConfig(sessions=2)})
    assert account.limits.sessions == 5


def test_the_sessions_of_all_users_count_and_an_actor_that_comes_back_finds_what_it_took() -> None:
    actors, account = entered(bot=ActorLimitsConfig(sessions=2, requests_per_second=1))
    others = [Member(), Member()]
    assert [actors.enter("bot", one) is account for one in others] == [True, True]
    assert account.has_too_many_sessions()
    account.leave(others[0])
    account.leave(others[0])
    assert not account.has_too_many_sessions()
    for _ in range(BURST):
        assert account.admit_request(1.0) is None
        account.end_request()
    for member in list(account.members):
        account.leave(member)
    assert actors.enter("bot", others[0]) is account
    assert account.admit_request(1.0) is Limit.ACTOR_REQUESTS_PER_SECOND


def test_changed_limits_count_at_once_and_give_nothing_back() -> None:
    actors, account = entered(bot=ActorLimitsConfig(requests_per_second=1))
    for _ in range(BURST):
        assert account.admit_request(1.0) is None
    assert account.admit_request(1.0) is Limit.ACTOR_REQUESTS_PER_SECOND
    actors.change({"bot": ActorLimitsConfig(requests_per_second=2)})
    assert [account.admit_request(1.0) for _ in range(BURST + 1)][-1] is Limit.ACTOR_REQUESTS_PER_SECOND
    actors.change({})
    assert account.admit_request(1.0) is None


def test_actors_without_sessions_are_forgotten_beyond_a_number() -> None:
    actors, _ = entered()
    for number in range(2 * MAX_REMEMBERED):
        member = Member()
        actors.enter(f"bot-{number}", member).leave(member)
    assert len(actors) == MAX_REMEMBERED + 1

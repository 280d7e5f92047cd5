"""An account is one user's over all sessions, its limits are its groups', and what is kept of users is bounded."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from arcbridge.agent import accounts as module
from arcbridge.agent.accounts import (
    DAY,
    HOLD,
    MAX_PACE,
    PROMPT_REFUSALS,
    Account,
    Accounts,
    Limit,
    check_limits,
    limits_of,
)
from arcbridge.errors import ConfigError
from arcbridge.identity.claims import Identity
from arcbridge.settings.config import AgentLimitsConfig, LimitsOverrideConfig
from tests.support.clock import Clock

from .kube.bench import Member
from .pair import FakeAuthenticator, joined, make_sessions

ALICE = Identity("alice", "", ("dev",), "i#alice", "i", 2000.0)
BOB = replace(ALICE, username="bob", subject="i#bob")


def account_with(identity: Identity = ALICE, **limits: object) -> Account:
    accounts = Accounts(AgentLimitsConfig(**limits), clock=Clock(), monotonic=Clock())
    return accounts.enter(identity, Member())


def admitted(account: Account, now: float, count: int) -> list[Limit | None]:
    found = [account.admit_request(now) for _ in range(count)]
    for limit in found:
        if limit is None:
            account.end_request()
    return found


def test_two_sessions_of_one_user_share_an_account_and_two_users_do_not() -> None:
    accounts = Accounts()
    first = accounts.enter(ALICE, Member(3))
    assert accounts.enter(replace(ALICE, groups=("ops",), issued_at=1.0), Member(4)) is first
    assert accounts.enter(BOB, Member(5)) is not first
    assert (len(accounts), first.streams, first.identity.groups) == (2, 7, ("ops",))


def test_an_account_outlives_the_last_session_and_is_found_again() -> None:
    accounts, laptop, pipeline = Accounts(), Member(), Member()
    account = accounts.enter(ALICE, laptop)
    accounts.enter(ALICE, pipeline)
    account.waiting = 7
    account.leave(laptop)
    assert (len(accounts), len(accounts._retired)) == (1, 0)
    account.leave(pipeline)
    account.leave(pipeline)
    assert (len(accounts), len(accounts._retired)) == (0, 1)
    again = accounts.enter(ALICE, laptop)
    assert (again is account, again.waiting, len(accounts), len(accounts._retired)) == (True, 7, 1, 0)


def test_the_accounts_of_users_who_left_are_bounded() -> None:
    accounts, member = Accounts(), Member()
    for number in range(module.MAX_REMEMBERED + 10):
        accounts.enter(replace(ALICE, subject=f"i#{number}"), member).leave(member)
    assert len(accounts._retired) == module.MAX_REMEMBERED
    newest = accounts.enter(replace(ALICE, subject=f"i#{module.MAX_REMEMBERED}"), member)
    assert (newest.subject, len(accounts._retired)) == (f"i#{module.MAX_REMEMBERED}", module.MAX_REMEMBERED - 1)


async def test_a_session_enters_its_users_account_and_leaves_it_at_its_end() -> None:
    authenticator = FakeAuthenticator()
    authenticator.add("t", "alice", "dev")
    sessions, _ = make_sessions(authenticator, Clock())
    async with joined(sessions):
        assert len(sessions.accounts) == 1
        async with joined(sessions, join_id="k" * 16):
            assert len(sessions.accounts) == 1
    assert (len(sessions.accounts), len(sessions.accounts._retired)) == (0, 1)


# -- which limits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("username", "groups", "streams", "sessions"),
    [
        ("carol", (), 10, 4),
        ("carol", ("ci",), 50, 4),
        ("carol", ("guests",), 2, 1),
        ("carol", ("guests", "ci"), 50, 1),
        ("carol", ("guests", "ci", "machines"), 0, 1),
        ("robot", ("guests", "ci", "machines"), 7, 1),
    ],
)
def test_a_users_own_limit_counts_then_the_largest_of_the_groups_then_that_of_all(
    username: str, groups: tuple[str, ...], streams: int, sessions: int
) -> None:
    config = AgentLimitsConfig(
        streams=10,
        sessions=4,
        groups={
            "ci": LimitsOverrideConfig(streams=50),
            "guests": LimitsOverrideConfig(streams=2, sessions=1),
            "machines": LimitsOverrideConfig(streams=0),
        },
        users={"robot": LimitsOverrideConfig(streams=7)},
    )
    found = limits_of(config, replace(ALICE, username=username, groups=groups))
    assert (found.streams, found.sessions) == (streams, sessions)
    assert found.bytes_per_day == config.bytes_per_day


def test_each_setting_of_all_users_can_be_overridden() -> None:
    names = [field.name for field in fields(LimitsOverrideConfig)]
    of_all = ["agent_connects_per_second", "agent_warm_connections", "agent_waiting_bytes"]
    assert [field.name for field in fields(AgentLimitsConfig)] == [*names, *of_all, "groups", "users", "actors"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AgentLimitsConfig(streams=-1), r"limits\.streams: must be 0"),
        (AgentLimitsConfig(request_burst=0), r"limits\.request_burst: must be at least 1"),
        (AgentLimitsConfig(agent_warm_connections=-1), r"limits\.agent_warm_connections: must be 0, for none"),
        (AgentLimitsConfig(bytes_per_second_to_user=1000), r"limits\.bytes_per_second_to_user: .* at least 65536"),
        (
            AgentLimitsConfig(groups={"oidc:ci": LimitsOverrideConfig(sessions=-2)}),
            r'limits\.groups\."oidc:ci"\.sessions: must be 0',
        ),
        (AgentLimitsConfig(users={"a": LimitsOverrideConfig(request_burst=0)}), r'limits\.users\."a"\.request_burst'),
    ],
)
def test_values_that_cannot_work_are_named(config: AgentLimitsConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_limits(config)


# -- requests -------------------------------------------------------------------------------------------------------


def test_requests_a_second_with_a_burst_and_a_refused_one_costs_nothing() -> None:
    account = account_with(requests_per_second=2, request_burst=3)
    over = Limit.REQUESTS_PER_SECOND
    assert admitted(account, 10.0, 5) == [None, None, None, over, over]
    assert admitted(account, 10.5, 2) == [None, over]
    assert admitted(account, 12.0, 4) == [None, None, None, over]


def test_requests_under_way() -> None:
    account = account_with(concurrent_requests=2)
    assert [account.admit_request(1.0) for _ in range(3)] == [None, None, Limit.CONCURRENT_REQUESTS]
    account.end_request()
    assert (account.admit_request(1.0), account.in_flight) == (None, 2)


def test_upgrades_under_way() -> None:
    account = account_with(upgraded_streams=1)
    assert [account.admit_upgrade() for _ in range(2)] == [None, Limit.UPGRADED_STREAMS]
    account.end_upgrade()
    assert account.admit_upgrade() is None


def test_one_user_over_the_limit_takes_nothing_from_another() -> None:
    accounts = Accounts(AgentLimitsConfig(request_burst=1), monotonic=Clock())
    alice, bob = accounts.enter(ALICE, Member()), accounts.enter(BOB, Member())
    assert admitted(alice, 1.0, 2) == [None, Limit.REQUESTS_PER_SECOND]
    assert admitted(bob, 1.0, 1) == [None]


def test_zero_is_no_limit() -> None:
    none = dict.fromkeys((field.name for field in fields(LimitsOverrideConfig) if field.name != "request_burst"), 0)
    account = account_with(**none)
    for member in range(100):
        account.members.add(Member(1000))
        assert not account.has_too_many_sessions(), member
    assert admitted(account, 1.0, 10_000) == [None] * 10_000
    assert account.refuses_stream(1.0, plain=True) is None
    assert account.admit_upgrade() is None
    assert account.bytes_sent(2**50, 1.0) == account.bytes_received(2**50, 1.0) == 0.0


def test_a_renewal_with_other_groups_changes_the_limits_and_forgives_nothing() -> None:
    fast = {"fast": LimitsOverrideConfig(requests_per_second=100, request_burst=10)}
    account = account_with(requests_per_second=1, request_burst=2, groups=fast)
    over = Limit.REQUESTS_PER_SECOND
    assert admitted(account, 1000.0, 3) == [None, None, over]
    account.adopt(replace(ALICE, groups=("fast",), issued_at=1.0))
    assert admitted(account, 1000.0, 9) == [*[None] * 8, over], "of ten two are spent"
    assert admitted(account, 1000.1, 11) == [*[None] * 10, over]
    account.adopt(ALICE)
    assert admitted(account, 1000.2, 11) == [*[None] * 10, over], "an older token changes nothing"
    account.adopt(replace(ALICE, issued_at=2.0))
    assert admitted(account, 1000.2, 1) == [over]
    assert admitted(account, 1020.0, 3) == [None, None, over]


def test_a_user_who_comes_back_has_the_limits_of_the_token_at_hand() -> None:
    accounts = Accounts(AgentLimitsConfig(groups={"ops": LimitsOverrideConfig(streams=7)}), monotonic=Clock())
    member = Member()
    accounts.enter(replace(ALICE, issued_at=5.0), member).leave(member)
    assert accounts.enter(replace(ALICE, groups=("ops",)), member).limits.streams == 7


def test_a_user_who_reconnects_finds_the_same_bucket() -> None:
    accounts, member = Accounts(AgentLimitsConfig(request_burst=2), monotonic=Clock()), Member()
    account = accounts.enter(ALICE, member)
    assert admitted(account, 1.0, 3)[-1] is Limit.REQUESTS_PER_SECOND
    account.leave(member)
    assert admitted(accounts.enter(ALICE, member), 1.0, 1) == [Limit.REQUESTS_PER_SECOND]


# -- streams and sessions -------------------------------------------------------------------------------------------


def test_streams_are_those_of_all_sessions() -> None:
    account = account_with(streams=5)
    account.members = {Member(2), Member(3)}
    assert account.refuses_stream(1.0, plain=False) is None
    account.members.add(Member(1))
    assert account.refuses_stream(1.0, plain=False) is account.refuses_stream(1.0, plain=True) is Limit.STREAMS


def test_sessions() -> None:
    account = account_with(sessions=2)
    account.members = {Member(), Member()}
    assert not account.has_too_many_sessions()
    account.members.add(Member())
    assert account.has_too_many_sessions()


# -- bytes ----------------------------------------------------------------------------------------------------------


def test_bytes_a_second_are_paced_each_way() -> None:
    account = account_with(bytes_per_second_to_cluster=1_000_000, bytes_per_second_to_user=100_000)
    assert account.bytes_received(1_000_000, 50.0) == 0.0
    assert account.bytes_received(500_000, 50.0) == pytest.approx(0.5)
    assert account.bytes_received(0, 50.25) == pytest.approx(0.25)
    assert account.bytes_received(0, 50.5) == 0.0
    assert account.bytes_sent(100_000, 50.0) == 0.0
    assert account.bytes_sent(100_000, 50.0) == pytest.approx(1.0)
    assert account.bytes_sent(10_000_000, 50.0) == MAX_PACE, "a pause is shorter than the other end's patience"
    assert account.bytes_sent(0, 50.0 + MAX_PACE) == pytest.approx(0.0), "and no more than that is owed"


def test_what_was_paced_is_counted() -> None:
    accounts = Accounts(AgentLimitsConfig(bytes_per_second_to_user=100_000), monotonic=Clock())
    account = accounts.enter(ALICE, Member())
    account.bytes_sent(100_000, 50.0)
    assert accounts.paced_seconds == {"to_cluster": 0.0, "to_user": 0.0}
    account.bytes_sent(50_000, 50.0)
    account.bytes_sent(0, 50.1)
    assert accounts.paced_seconds == {"to_cluster": 0.0, "to_user": pytest.approx(0.5)}


def test_bytes_of_a_day_end_with_it() -> None:
    clock, member = Clock(DAY * 100 + DAY / 4), Member()
    accounts = Accounts(AgentLimitsConfig(bytes_per_day=1000), clock=clock, monotonic=Clock())
    account = accounts.enter(ALICE, member)
    account.bytes_sent(600, 500.0)
    assert (admitted(account, 500.0, 1), member.ended) == ([None], 0)
    account.bytes_received(400, 500.0)
    account.bytes_received(400, 500.0)
    assert (account.moved_today, member.ended) == (1400, 1), "what runs is ended once"
    spent = Limit.BYTES_PER_DAY
    assert admitted(account, 500.0, 1) == [spent]
    assert account.refuses_stream(500.0, plain=True) is spent
    assert account.refuses_stream(500.0, plain=False) is None, "its requests are answered in words"
    evening = 500.0 + DAY * 3 / 4
    assert admitted(account, evening - 1, 1) == [spent]
    clock.now += DAY * 3 / 4
    assert admitted(account, evening, 1) == [None]
    assert account.refuses_stream(evening, plain=True) is None
    assert account.moved_today == 0


def test_a_day_outlives_the_users_last_session() -> None:
    accounts = Accounts(AgentLimitsConfig(bytes_per_day=1000), clock=Clock(), monotonic=Clock())
    member = Member()
    account = accounts.enter(ALICE, member)
    account.bytes_sent(1000, 500.0)
    account.leave(member)
    assert admitted(accounts.enter(ALICE, member), 600.0, 1) == [Limit.BYTES_PER_DAY]


def test_more_bytes_a_day_by_a_renewal() -> None:
    more = {"more": LimitsOverrideConfig(bytes_per_day=5000)}
    account = account_with(bytes_per_day=1000, groups=more)
    account.bytes_sent(1000, 500.0)
    account.adopt(replace(ALICE, groups=("more",), issued_at=1.0))
    assert admitted(account, 500.0, 1) == [None]
    (member,) = account.members
    assert isinstance(member, Member)
    assert member.ended == 1
    account.adopt(replace(ALICE, issued_at=2.0))
    assert admitted(account, 500.0, 1) == [Limit.BYTES_PER_DAY]
    assert member.ended == 2, "what runs ends as well"


# -- refusals -------------------------------------------------------------------------------------------------------


def test_one_refusal_of_a_burst_is_reported_and_the_next_one_says_how_many_were_not() -> None:
    account, limit = account_with(), Limit.STREAMS
    assert [account.refuse(limit, 100.0 + n) for n in range(4)] == [0, None, None, None]
    assert account.refuse(Limit.SESSIONS, 103.0) == 0, "each limit has bursts of its own"
    assert account.refuse(limit, 113.0) == 3, "ten seconds without one end a burst"
    assert [account.refuse(limit, 113.0 + n) for n in range(61)].count(None) == 60, "and so does a minute of it"
    assert account.refuse(limit, 1000.0) == 0
    account.refuse(limit, 1000.0)
    assert account.take_omitted() == {limit: 1}
    assert account.take_omitted() == {}


def test_a_flood_is_answered_slowly() -> None:
    account = account_with()
    held = [account.hold(100.0) for _ in range(PROMPT_REFUSALS + 2)]
    assert held == [*[0.0] * PROMPT_REFUSALS, HOLD, HOLD]
    assert account.hold(100.5) == 0.0


@pytest.mark.parametrize("limit", Limit)
def test_each_limit_is_one_sentence_with_what_happened_and_what_to_do(limit: Limit) -> None:
    reached = account_with(bytes_per_day=3 * 1024**4).explain(limit)
    happened, _, to_do = reached.message.partition("; ")
    assert happened
    assert to_do
    assert "." not in reached.message
    if limit is Limit.BYTES_PER_DAY:
        assert reached.message.startswith("you moved 3 TiB today")
        assert (reached.retry_after, reached.retry_at) == (None, DAY)
    else:
        assert (reached.retry_after, reached.retry_at) == (1, 0.0)

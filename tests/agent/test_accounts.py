"""An account is one user's over all sessions, and what is kept of users who left is bounded."""

from __future__ import annotations

from dataclasses import replace

from arcbridge.agent import accounts as module
from arcbridge.agent.accounts import Accounts
from arcbridge.identity.claims import Identity

from .kube.bench import Member
from .pair import Clock, FakeAuthenticator, joined, make_sessions

ALICE = Identity("alice", "", ("dev",), "i#alice", "i", 2000.0)
BOB = replace(ALICE, username="bob", subject="i#bob")


def test_two_sessions_of_one_user_share_an_account_and_two_users_do_not() -> None:
    accounts = Accounts()
    first = accounts.enter(ALICE, Member(3))
    assert accounts.enter(replace(ALICE, groups=("ops",)), Member(4)) is first
    assert accounts.enter(BOB, Member(5)) is not first
    assert (len(accounts), first.streams, first.identity.groups) == (2, 7, ("ops",))


def test_an_account_outlives_the_last_session_and_is_found_again() -> None:
    accounts, laptop, pipeline = Accounts(), Member(), Member()
    account = accounts.enter(ALICE, laptop)
    accounts.enter(ALICE, pipeline)
    account.waiting = 7
    account.leave(laptop)
    assert (len(accounts), accounts.remembered) == (1, 0)
    account.leave(pipeline)
    account.leave(pipeline)
    assert (len(accounts), accounts.remembered) == (0, 1)
    again = accounts.enter(ALICE, laptop)
    assert (again is account, again.waiting, len(accounts), accounts.remembered) == (True, 7, 1, 0)


def test_the_accounts_of_users_who_left_are_bounded() -> None:
    accounts, member = Accounts(), Member()
    for number in range(module.MAX_REMEMBERED + 10):
        accounts.enter(replace(ALICE, subject=f"i#{number}"), member).leave(member)
    assert accounts.remembered == module.MAX_REMEMBERED
    newest = accounts.enter(replace(ALICE, subject=f"i#{module.MAX_REMEMBERED}"), member)
    assert (newest.subject, accounts.remembered) == (f"i#{module.MAX_REMEMBERED}", module.MAX_REMEMBERED - 1)


async def test_a_session_enters_its_users_account_and_leaves_it_at_its_end() -> None:
    authenticator = FakeAuthenticator()
    authenticator.add("t", "alice", "dev")
    sessions, _ = make_sessions(authenticator, Clock())
    async with joined(sessions) as (client, _):
        await client.wait_established()
        assert len(sessions.accounts) == 1
        async with joined(sessions, join_id="k" * 16) as (second, _):
            await second.wait_established()
            assert len(sessions.accounts) == 1
    assert (len(sessions.accounts), sessions.accounts.remembered) == (0, 1)

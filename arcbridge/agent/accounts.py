"""Accounts: what each verified user holds at this agent, over all of that user's sessions.

An account begins with a user's first session and is kept for a while after the last one, in a bounded table, so that
a user who comes back finds the same counters. It decides nothing about rights and knows no request. Invariant: an
account is one verified subject's, and its counters never mix with another's.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from arcbridge.identity.claims import Identity

MAX_REMEMBERED = 2000
"""Accounts without a session that are kept; beyond it the one that ended first is forgotten."""


class Member(Protocol):
    """A session as its account sees it."""

    @property
    def streams(self) -> int:
        """Streams that are open."""


class Account:
    """What one verified user holds at this agent. Made by `Accounts.enter`."""

    __slots__ = ("_accounts", "identity", "members", "waiting")

    def __init__(self, accounts: Accounts, identity: Identity) -> None:
        self._accounts = accounts
        self.identity = identity
        """The identity of the user's newest token."""
        self.members: set[Member] = set()
        """The user's sessions, detached ones included."""
        self.waiting = 0
        """Bytes that wait at this agent towards the user's callers."""

    @property
    def subject(self) -> str:
        """Whose account it is: `Identity.subject`."""
        return self.identity.subject

    @property
    def streams(self) -> int:
        """Streams that are open, of all the user's sessions."""
        return sum(member.streams for member in self.members)

    def adopt(self, identity: Identity) -> None:
        """Take over a newer identity of the same subject: its groups count from now on."""
        assert identity.subject == self.subject
        self.identity = identity

    def leave(self, member: Member) -> None:
        """End a session's membership; the last one's end retires the account. A second call changes nothing."""
        if member in self.members:
            self.members.remove(member)
            if not self.members:
                self._accounts.retire(self)


class Accounts:
    """The accounts of one agent: one for each user with a session, and those that ended lately."""

    def __init__(self) -> None:
        self._present: dict[str, Account] = {}
        self._retired: OrderedDict[str, Account] = OrderedDict()
        """Accounts without a session, by subject, in the order in which they ended."""

    def __len__(self) -> int:
        """Users with at least one session."""
        return len(self._present)

    @property
    def remembered(self) -> int:
        """Accounts without a session that are kept."""
        return len(self._retired)

    def enter(self, identity: Identity, member: Member) -> Account:
        """Return the account of the identity's subject with `member` in it; each `enter` needs one `leave`."""
        subject = identity.subject
        account = self._present.get(subject)
        if account is None:
            account = self._retired.pop(subject, None) or Account(self, identity)
            self._present[subject] = account
        account.adopt(identity)
        account.members.add(member)
        return account

    def retire(self, account: Account) -> None:
        """Keep an account whose last session has ended (called by `Account.leave`)."""
        del self._present[account.subject]
        self._retired[account.subject] = account
        while len(self._retired) > MAX_REMEMBERED:
            self._retired.popitem(last=False)

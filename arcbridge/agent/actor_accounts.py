"""Counts what each actor takes of this agent, over all users for whom it acts.

It is one more bound beside those of the users (`accounts`): a program that acts for a hundred users has a hundred times
the limits of one, and may have fewer here. The module is imported with the first session that has an actor. Invariant:
the number of accounts is bounded, and an actor that leaves and comes back finds the same counters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from arcbridge.agent.accounts import AccountSession, Limit
from arcbridge.identity.actor import ANY
from arcbridge.limiters import TokenBucket
from arcbridge.settings.config import ActorLimitsConfig

MAX_REMEMBERED = 500
"""Actors without a session that are remembered; beyond it the one that ended first is forgotten."""
BURST = 5
"""Seconds' worth of requests that may come at once after a pause."""
NO_LIMITS = ActorLimitsConfig()


class ActorAccount:
    """What one actor takes. Made by `ActorAccounts.enter`."""

    def __init__(self, accounts: ActorAccounts, name: str) -> None:
        self._accounts = accounts
        self.name = name
        self.members: set[AccountSession] = set()
        """Its sessions, those without a connection included."""
        self.in_flight = 0
        """Its requests under way, upgraded ones included."""
        self.limits = NO_LIMITS
        self._requests: TokenBucket | None = None

    def change_limits(self, limits: ActorLimitsConfig, now: float) -> None:
        """Count by these limits from now on; what was taken stays taken."""
        rate, self.limits = limits.requests_per_second, limits
        if not rate:
            self._requests = None
        elif self._requests is None:
            self._requests = TokenBucket(BURST * rate, rate)
        else:
            self._requests.change(now, BURST * rate, rate)

    def leave(self, member: AccountSession) -> None:
        """End a session's membership; a second call changes nothing."""
        if member in self.members:
            self.members.remove(member)
            if not self.members:
                self._accounts.retire(self)

    def has_too_many_sessions(self) -> bool:
        """Return whether more sessions have entered than may."""
        return bool(self.limits.sessions) and len(self.members) > self.limits.sessions

    def admit_request(self, now: float) -> Limit | None:
        """Count a request that begins, or return the limit that it is over; `end_request` ends one that was counted."""
        most = self.limits.concurrent_requests
        if most and self.in_flight >= most:
            return Limit.ACTOR_CONCURRENT_REQUESTS
        if self._requests is not None and self._requests.reserve(now) is None:
            return Limit.ACTOR_REQUESTS_PER_SECOND
        self.in_flight += 1
        return None

    def end_request(self) -> None:
        """A request that was counted is over."""
        self.in_flight -= 1


class ActorAccounts:
    """The accounts of the actors that have sessions, and of those that had some lately."""

    def __init__(self, limits: Mapping[str, ActorLimitsConfig], monotonic: Callable[[], float]) -> None:
        """`limits`: `limits.actors` of the settings."""
        self._limits = limits
        self._monotonic = monotonic
        self._present: dict[str, ActorAccount] = {}
        self._retired: OrderedDict[str, ActorAccount] = OrderedDict()
        """Accounts without a session, in the order in which they ended."""

    def __len__(self) -> int:
        """Accounts, of actors with and without a session."""
        return len(self._present) + len(self._retired)

    def enter(self, name: str, member: AccountSession) -> ActorAccount:
        """Return the account of an actor with `member` in it; each `enter` needs one `leave`."""
        account = self._present.get(name) or self._retired.pop(name, None)
        if account is None:
            account = ActorAccount(self, name)
            self._apply(account)
        self._present[name] = account
        account.members.add(member)
        return account

    def retire(self, account: ActorAccount) -> None:
        """Keep an account whose last session has ended (called by `ActorAccount.leave`)."""
        del self._present[account.name]
        self._retired[account.name] = account
        while len(self._retired) > MAX_REMEMBERED:
            self._retired.popitem(last=False)

    def change(self, limits: Mapping[str, ActorLimitsConfig]) -> None:
        """Count by these limits from now on; what was taken stays taken."""
        self._limits = limits
        for account in (*self._present.values(), *self._retired.values()):
            self._apply(account)

    def _apply(self, account: ActorAccount) -> None:
        limits = self._limits.get(account.name) or self._limits.get(ANY) or NO_LIMITS
        account.change_limits(limits, self._monotonic())

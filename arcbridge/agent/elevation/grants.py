"""Decides which AccessRequests are grants now, and for whom: pure, time is an argument.

A request is a grant from the time at which an agent has begun it until it expires, and only for as long as its rule
would still allow it: a rule that is deleted or narrower, a withdrawal, a denial or the deletion of the request ends it.
The groups of the requester are those of the user's present token. Invariant: no group is lent that the agent's settings
do not name, whatever the objects of the cluster say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from arcbridge.agent.elevation.objects import AccessRequest, AccessRule
from arcbridge.identity.claims import Identity

LAPSES: Final = 24 * 3600.0
"""Seconds after its creation in which a request may begin: an approval that no agent has seen until then counts no
more."""
MOST_KEPT: Final = 2000
"""Requests that are kept, those that lend first, then the oldest: about a kilobyte each."""
MOST_KEPT_OF_USER: Final = 32
"""Of these the requests of one user, so that no user keeps out others'."""
MOST_OF_USER: Final = 8
"""Grants of one user at a time: each is in every request and record of that user."""
SLACK: Final = 2.0
"""Seconds by which two agents may read the API server's clock differently: one begins what the other has written."""
ENDINGS: Final = ("expired", "withdrawn", "denied", "deleted", "rule")
"""Why a grant ended; `rule`: its rule is gone, or would not allow it any more."""


class GrantBook:
    """Rules and requests of a cluster, by name."""

    def __init__(self, lendable: Iterable[str]) -> None:
        """`lendable`: the groups that may be lent at all."""
        self._lendable = frozenset(lendable)
        self.rules: dict[str, AccessRule] = {}
        self.requests: dict[str, AccessRequest] = {}
        self.left_out = 0
        """Requests that were not kept, because there are too many."""

    def bounded(self, found: Iterable[AccessRequest], now: float) -> list[AccessRequest]:
        """Return what is kept of some requests: those that lend longest, then the oldest."""
        kept: list[AccessRequest] = []
        of_user = Counter[str]()
        for request in sorted(found, key=lambda one: (not one.begins, -one.until, one.created, one.name)):
            if self._is_over(request, now):
                continue
            if len(kept) >= MOST_KEPT or of_user[request.user] >= MOST_KEPT_OF_USER:
                self.left_out += 1
                continue
            of_user[request.user] += 1
            kept.append(request)
        return kept

    def replace_requests(self, found: Iterable[AccessRequest], now: float) -> None:
        """Take a list of all requests in place of those that are known."""
        self.requests = {one.name: one for one in self.bounded(found, now)}

    def keep(self, request: AccessRequest, now: float) -> None:
        """Take a request that is new or was changed; one that can be no grant any more is forgotten."""
        self.requests.pop(request.name, None)
        if self._is_over(request, now):
            return
        of_user = sum(one.user == request.user for one in self.requests.values())
        if len(self.requests) >= MOST_KEPT or of_user >= MOST_KEPT_OF_USER:
            self.left_out += 1
            return
        self.requests[request.name] = request

    def forget_past(self, now: float) -> None:
        """Forget what has expired or lapsed."""
        for request in [one for one in self.requests.values() if self._is_past(one, now)]:
            del self.requests[request.name]

    def grants(self, now: float) -> dict[str, AccessRequest]:
        """Return, by uid, the requests that lend groups now; whom, their users' tokens decide."""
        return {
            one.uid: one
            for one in self.requests.values()
            if one.begins - SLACK <= now < one.until and self._allowed(one)
        }

    def may_begin(self, now: float) -> list[AccessRequest]:
        """Return the requests that an agent may begin: approved as their rules want it.

        The API server asked of none that is older than its rule whether its reason is one of the rule's form.
        """
        return [
            one
            for one in self.requests.values()
            if not (one.until or self._is_past(one, now))
            and self._allowed(one)
            and one.created >= self.rules[one.rule].created
        ]

    def next_end(self, now: float) -> float:
        """Return the unix seconds at which the next grant expires; infinity where there is none."""
        return min((one.until for one in self.requests.values() if one.until > now), default=float("inf"))

    def rule_gives(self, request: AccessRequest, identity: Identity) -> bool:
        """Return whether the rule of a request names this identity among those who may ask."""
        rule = self.rules.get(request.rule)
        if rule is None or identity.username != request.user:
            return False
        return identity.username in rule.users or not rule.user_groups.isdisjoint(identity.groups)

    def unknown_groups(self) -> dict[str, list[str]]:
        """Return, by rule, the groups that it names and that are never lent."""
        lacking = {name: sorted(rule.groups - self._lendable) for name, rule in self.rules.items()}
        return {name: groups for name, groups in lacking.items() if groups}

    def _allowed(self, request: AccessRequest) -> bool:
        rule = self.rules.get(request.rule)
        if rule is None or request.seconds > rule.most_seconds or request.denied or request.withdrawn:
            return False
        if not request.groups or not rule.groups.intersection(self._lendable).issuperset(request.groups):
            return False
        # Each approval names the group by which its writer may approve, which the API server's policies have checked.
        good = [user for user, group in request.approvals if group in rule.approver_groups and user != request.user]
        return len(good) >= rule.approvals

    def _is_over(self, request: AccessRequest, now: float) -> bool:
        return request.denied or request.withdrawn or self._is_past(request, now)

    @staticmethod
    def _is_past(request: AccessRequest, now: float) -> bool:
        if request.until:
            return request.until <= now
        return request.created + LAPSES <= now


def by_user(grants: Mapping[str, AccessRequest]) -> dict[str, list[AccessRequest]]:
    """Return the grants of each user; of too many those that last longest."""
    found: dict[str, list[AccessRequest]] = {}
    for grant in sorted(grants.values(), key=lambda one: (-one.until, one.uid)):
        found.setdefault(grant.user, []).append(grant)
    return {user: some[:MOST_OF_USER] for user, some in found.items()}

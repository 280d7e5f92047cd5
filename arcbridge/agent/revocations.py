"""The users who may no longer be served: what each relay and the cluster's own denylist say.

There is one list per relay, kept while that relay is away, and one of the denylist; a user is revoked whom any of them
names. It decides about identities and ends no session: `sessions` asks when a token is shown, and is told when there is
news. Invariant: a relay writes its own list alone, so no relay gives back what another one or the denylist has taken.

A revocation names a time; tokens that were issued before it count no more, and a token that does not say when it was
issued is older than any time. A revocation that is taken back at once still ends the sessions that it covers: that is
how a relay ends sessions to which its policy no longer entitles a user, and leaves nothing behind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from arcbridge.errors import PermissionRefused
from arcbridge.identity.claims import Identity
from arcbridge.observe.untrusted_text import clean
from arcbridge.units import rfc3339
from arcbridge.wire.records import Revoke

CLOCK_SKEW = 10.0
"""Seconds by which the clocks of an issuer and of a relay may differ, as `identity.verifier` forgives them: a token
that was issued so shortly after a revocation's time may have been issued before it, and counts as older."""
MAX_LIST = 16 * 1024 * 1024
"""Bytes that one relay may make this agent keep, roughly: 50 000 users with their reasons."""
ENTRY = 256
"""Bytes of an entry without its texts: a list of short names is no smaller in memory."""
MAX_REASON = 200
"""Bytes of a reason as users see it."""
RELAY, CLUSTER = "relay", "cluster"
"""Who has revoked, as `Revocation.by` says it."""


@dataclass(frozen=True, slots=True)
class Revocation:
    """One user's revocation."""

    user: str
    """A username as this agent maps it, or a subject."""
    before: float = math.inf
    """Unix seconds: tokens issued before it count no more; infinity for every token."""
    reason: str = ""
    """Why, in the words of who has revoked."""
    by: str = CLUSTER
    """`RELAY` or `CLUSTER`: whose operator has revoked."""

    def covers(self, identity: Identity) -> bool:
        """Return whether a token of this identity counts no more; `identity` is of the user."""
        return identity.issued_at < self.before + CLOCK_SKEW

    def sentence(self, now: float) -> str:
        """Return what the user is told; `now` is unix seconds. The reason is marked as another's words."""
        said = f'the {self.by}\'s operator says "{clean(self.reason, MAX_REASON)}"; ' if self.reason else ""
        said = f"access was revoked: {said}"
        if self.before > now + CLOCK_SKEW:
            return f"{said}ask the {self.by}'s operator for access"
        return f"{said}logins from before {rfc3339(self.before)} count no more: log in again"


class AccessRevoked(PermissionRefused):
    """The user, or the token by its age, is revoked; `identity` is the token's."""

    def __init__(self, identity: Identity, message: str) -> None:
        super().__init__(message)
        self.identity = identity


class Revocations:
    """All lists of one agent."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._relays: dict[str, dict[str, Revocation]] = {}
        self._sizes: dict[str, int] = {}
        """Bytes that each relay's list takes, roughly."""
        self._denied: Mapping[str, Revocation] = {}
        self._news: dict[str, Revocation] = {}
        self.on_news: Callable[[], None] = lambda: None
        """Called after each change that may end sessions; then `take_news` says which users it is about."""
        self.left_out = 0
        """Revocations that a relay sent beyond what is kept of one."""

    def __len__(self) -> int:
        """Users on the lists; one who is on several counts several times."""
        return sum(map(len, self._relays.values())) + len(self._denied)

    def hear(self, relay: str, revoke: Revoke) -> bool:
        """Change the list of `relay` by its REVOKE; False where its list is longer than what is kept."""
        if revoke.first:
            self._relays[relay], self._sizes[relay] = {}, 0
        if not revoke.user:
            return True
        users = self._relays.setdefault(relay, {})
        former = users.pop(revoke.user, None)
        size = self._sizes.get(relay, 0) - (_size(former) if former is not None else 0)
        kept = True
        if revoke.before:
            revocation = Revocation(revoke.user, float(revoke.before), revoke.reason[: 4 * MAX_REASON], RELAY)
            if size + _size(revocation) <= MAX_LIST:
                users[revoke.user] = revocation
                size += _size(revocation)
            else:
                self.left_out += 1
                kept = False
            self._note(revocation)
            self.on_news()
        self._sizes[relay] = size
        return kept

    def deny(self, listed: Mapping[str, Revocation]) -> None:
        """Put another denylist in place of the present one."""
        self._denied = dict(listed)
        for revocation in listed.values():
            self._note(revocation)
        if listed:
            self.on_news()

    def take_news(self) -> dict[str, Revocation]:
        """Return the revocations since the last call, by user."""
        news, self._news = self._news, {}
        return news

    def find(self, identity: Identity) -> Revocation | None:
        """Return the revocation by which a token of this identity counts no more; of several the one of longest
        effect."""
        found: Revocation | None = None
        for users in (self._denied, *self._relays.values()):
            one = covering(users, identity)
            if one is not None and (found is None or one.before > found.before):
                found = one
        return found

    def check(self, identity: Identity) -> None:
        """Raise AccessRevoked where a token of this identity counts no more."""
        found = self.find(identity)
        if found is not None:
            raise AccessRevoked(identity, found.sentence(self._clock()))

    def _note(self, revocation: Revocation) -> None:
        known = self._news.get(revocation.user)
        if known is None or revocation.before >= known.before:
            self._news[revocation.user] = revocation


def covering(users: Mapping[str, Revocation], identity: Identity) -> Revocation | None:
    """Return the revocation among `users` that covers this identity, by either of its names."""
    for name in identity.names:
        found = users.get(name)
        if found is not None and found.covers(identity):
            return found
    return None


def _size(revocation: Revocation) -> int:
    return ENTRY + len(revocation.user) + len(revocation.reason)

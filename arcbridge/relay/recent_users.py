"""Remembers which groups came with the last token of each user who joined lately, for an operator's questions.

It decides nothing. Of a user's groups it keeps those that the policy named at that time, which the policy holds anyway,
and the number of the others; of users the newest `MOST_USERS`. So no token makes it grow.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from arcbridge.identity.claims import Identity
from arcbridge.identity.policy import KnownGroups
from arcbridge.pki.pins import is_pin

Row = dict[str, Any]

MOST_USERS: Final = 1000
MOST_GROUPS: Final = 100
"""Groups of a user that are kept by name."""


def token_row(identity: Identity, groups: KnownGroups, source: str, at: float) -> Row:
    """Return what came with a user's token, as operators read it: the first of the groups by name, and the others by
    their number. `source`: `session` or `join`; `at`: unix seconds. `cut`: groups that the policy of that hash names
    and the row does not."""
    names = groups.names[:MOST_GROUPS]
    more = groups.more + len(groups.names) - len(names)
    return {"from": source, "at": at, "groups": names, "more": more, "missing_claim": identity.missing_groups_claim,
            "policy": groups.policy, "cut": len(groups.names) - len(names)}  # fmt: skip


class RecentUsers:
    """See the module's docstring. `clock` returns unix seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._seen: OrderedDict[str, Row] = OrderedDict()
        self._cas: dict[str, str] = {}
        """By user, of those in `_seen`: pin of the newest of the relay's CAs that the client of the last join keeps."""

    def note(self, identity: Identity, groups: KnownGroups, relay_ca: str = "") -> None:
        """Remember what came with a token that was verified; `relay_ca`: as the client's `JoinRequest` has it."""
        self._seen[identity.username] = token_row(identity, groups, "join", self._clock())
        self._seen.move_to_end(identity.username)
        self._cas[identity.username] = relay_ca if is_pin(relay_ca) else ""
        if len(self._seen) > MOST_USERS:
            del self._cas[self._seen.popitem(last=False)[0]]

    def rows(self, user: str) -> list[Row]:
        """Return the row of this user; none where that is not remembered."""
        return [self._seen[user]] if user in self._seen else []

    def followers(self) -> list[Row]:
        """Return which of the relay's CAs the client of each user's last join keeps; an empty pin: it follows none."""
        return [{"user": user, "at": row["at"], "relay_ca": self._cas[user]} for user, row in self._seen.items()]

"""Remembers which users were refused which cluster lately, and why, for an operator's questions.

It decides nothing. Of each user, who has shown a good token, it keeps the newest `OWN` refusals that differ, each with
how often it came, and of users the newest `MOST_USERS`: one user who tries every name pushes out no other user's.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final

from arcbridge.identity.policy_rules import covers
from arcbridge.observe.untrusted_text import clean

Row = dict[str, Any]

MOST_USERS: Final = 100
OWN: Final = 20
"""Refusals of one user that are kept."""
MOST_REASON: Final = 300
"""Bytes of a reason."""


class RecentRefusals:
    """See the module's docstring. `clock` returns unix seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._users: OrderedDict[str, OrderedDict[tuple[str, str, str], Row]] = OrderedDict()

    def note(self, user: str, cluster: str, code: str, rule: str, reason: str, session: str) -> None:
        """Remember a refusal. `cluster` is what the user asked for, known or not."""
        own = self._users.setdefault(user, OrderedDict())
        self._users.move_to_end(user)
        key = cluster, code, rule
        times = own[key]["times"] + 1 if key in own else 1
        own[key] = {
            "at": self._clock(), "user": user, "cluster": clean(cluster, 253), "code": code, "rule": rule,
            "reason": clean(reason, MOST_REASON), "times": times, "session": session,
        }  # fmt: skip
        own.move_to_end(key)
        if len(own) > OWN:
            own.popitem(last=False)
        if len(self._users) > MOST_USERS:
            self._users.popitem(last=False)

    def rows(self, clusters: Iterable[str]) -> list[Row]:
        """Return the refusals for these clusters (names and patterns), the oldest first."""
        named = list(clusters)
        found = [row for own in self._users.values() for row in own.values() if covers(named, row["cluster"])]
        return sorted(found, key=lambda row: float(row["at"]))

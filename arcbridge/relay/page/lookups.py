"""Answers what the administrators' page is asked of one user or one cluster: which rule lets the user reach which
clusters, which sessions run, and who was refused lately.

Everything is of the caller's own clusters alone: a rule's other clusters, its other names and the rules that do not
name the user are not shown, nor what is known of a user's token where none of it concerns these clusters. The policy is
that of this process, and the groups are those of the user's last token, as for `policy explain`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from arcbridge.identity.policy import Policy
from arcbridge.identity.policy_rules import EVERY_USER, Rule, Verdict, covers, explain, named
from arcbridge.relay.admin import Administered, list_users
from arcbridge.relay.operations import Row

MOST_SESSIONS: Final = 50
MOST_REFUSALS: Final = 20
MOST_RULES: Final = 20
MOST_CLUSTERS: Final = 50
"""Clusters of one rule that are named."""
MOST_COMPARED: Final = 500_000
"""Comparisons of a cluster with a pattern of a rule for one answer, half a second in short turns of the loop: fifty
patterns for 10 000 clusters."""
TOGETHER: Final = 1000
"""Comparisons in one turn of the loop: a millisecond."""


class RuleReach(NamedTuple):
    """A rule that names the user."""

    rule: str
    """`allow[2] (line 14)`."""
    by: str
    """How it names the user."""
    clusters: tuple[str, ...]
    more: int


@dataclass(frozen=True, slots=True)
class UserReach:
    """What is known of one user, within the caller's clusters."""

    user: str
    token: Row | None
    """What came with the user's last token: `at`, and of its `groups` those of `rules`; for a caller who administers
    every cluster all that the policy names, and the number of those that are `more`. None: no token of the user's is
    known here, or it is not for this caller."""
    rules: tuple[RuleReach, ...]
    complete: bool
    """False where there was too much to compare."""
    sessions: tuple[Row, ...]
    refusals: tuple[Row, ...]
    whole: bool
    """Whether the caller administers every cluster."""
    revoked: Row | None
    """Since when the user's former logins are refused; None also for a caller who does not administer every cluster."""


async def reach_of(
    user: str,
    relay: Administered,
    policy: Policy,
    clusters: Sequence[str],
    patterns: Sequence[str],
    comparing: asyncio.Lock,
    *,
    whole: bool,
) -> UserReach:
    """Return what is known of `user`. `clusters`: the caller's, by name, covered by `patterns`; `whole`: the caller
    administers every cluster; `comparing`: held while turns of the loop are used. Raises `ArcbridgeError`."""
    rows = await relay.ask({"ask": "user", "user": user}) or []
    token = max(rows, key=lambda row: (row.get("from") == "session", row.get("at", 0.0)), default=None)
    identity = named(user, tuple((token or {}).get("groups", ())))
    rules, complete, leading, left = list[RuleReach](), True, set[str](), MOST_COMPARED
    async with comparing:
        for rule in (one for one in policy.rules if one.names_any(identity.username, identity.groups)):
            reached, left = await _reached(rule, clusters, left)
            if reached is None:
                complete = False
                continue
            if reached and len(rules) == MOST_RULES:
                complete = False
                break
            if reached:
                actor = min(rule.actors, default="")
                verdict: Verdict = explain((rule,), replace(identity, actor=actor), reached[0])
                at = f"{rule.path} (line {rule.line})"
                leading |= rule.groups
                rules.append(
                    RuleReach(at, verdict.by, tuple(reached[:MOST_CLUSTERS]), max(len(reached) - MOST_CLUSTERS, 0))
                )
    question = {"ask": "sessions", "clusters": list(patterns), "user": user, "most": MOST_SESSIONS}
    sessions = [
        row
        for row in await relay.ask(question) or []
        if row.get("user") == user and covers(patterns, str(row.get("cluster")))
    ]
    refusals = [row for row in await refusals_of(relay, patterns) if row.get("user") == user]
    revoked = next((row for row in await list_users(relay) if row["user"] == user), None) if whole else None
    if token is not None and not whole:
        # A rule for every user says of none that the relay knows this one.
        known = sessions or refusals or any(not rule.by.startswith(EVERY_USER) for rule in rules)
        groups = [group for group in token.get("groups", ()) if group in leading]
        token = {"at": token.get("at", 0.0), "groups": groups} if known else None
    return UserReach(
        user, token, tuple(rules), complete, tuple(sessions[:MOST_SESSIONS]),
        tuple(refusals[:MOST_REFUSALS]), whole, revoked,
    )  # fmt: skip


async def _reached(rule: Rule, clusters: Sequence[str], left: int) -> tuple[list[str] | None, int]:
    """Return which clusters a rule covers, and how many comparisons are left of `left` then; None: it has more."""
    names = frozenset(rule.clusters)
    patterns = [name for name in rule.clusters if "*" in name]
    cost = max(len(patterns), 1)
    if cost * len(clusters) > left:
        return None, left
    found, step = list[str](), max(TOGETHER // cost, 1)
    for begin in range(0, len(clusters), step):
        found += (name for name in clusters[begin : begin + step] if name in names or covers(patterns, name))
        await asyncio.sleep(0)
    return sorted(found), left - cost * len(clusters)


async def refusals_of(relay: Administered, patterns: Sequence[str]) -> list[Row]:
    """Return who was refused these clusters lately, the newest first."""
    rows = await relay.ask({"ask": "refusals", "clusters": list(patterns)}) or []
    own = [row for row in rows if covers(patterns, str(row.get("cluster")))]
    return sorted(own, key=lambda row: -float(row.get("at", 0.0)))

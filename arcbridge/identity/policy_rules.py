"""One rule of a policy, and which of several lets a user reach a cluster, or is nearest to that and what it lacks.

Nearest is a rule for the cluster, before one for the user, before any other; of several the one with a name that
differs from one of the user's by its prefix or by upper and lower case alone, which is the commonest mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from arcbridge.identity.actor import admits
from arcbridge.identity.claims import Identity
from arcbridge.settings.suggest import nearest

MOST_NAMES: Final = 5
"""Names that a sentence has of each kind."""
MOST_COMPARED: Final = 1000
"""Names of a rule among which a cluster's is looked for that was mistyped."""
EVERY_USER: Final = 'user "*"'
"""How a rule names a user whom it names by nothing else (`Verdict.by`)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One `[[allow]]` table. Where it stands does not count where two are compared."""

    users: frozenset[str]
    groups: frozenset[str]
    clusters: tuple[str, ...]
    """Names and patterns, as they are written."""
    path: str = field(default="", compare=False)
    """Its name for people: `allow[0]` is the first one."""
    line: int = field(default=0, compare=False)
    actors: frozenset[str] = frozenset()
    """Actors through which it lets these users in; none: the users alone (`identity.actor.admits`)."""
    patterns: tuple[re.Pattern[str], ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", tuple(_compiled(cluster) for cluster in self.clusters))

    def covers(self, cluster: str) -> bool:
        """Return whether this rule is for `cluster`."""
        return any(pattern.fullmatch(cluster) for pattern in self.patterns)

    def names(self, identity: Identity) -> bool:
        """Return whether this rule is for `identity`, its actor included."""
        return admits(self.actors, identity.actor) and self.names_any(identity.username, identity.groups)

    def names_any(self, user: str, groups: Iterable[str]) -> bool:
        """Return whether this rule names a user, or one of these groups. Of a set that is larger than the rule's
        groups none is looked at but those."""
        return user in self.users or "*" in self.users or not self.groups.isdisjoint(groups)

    @property
    def callers(self) -> tuple[frozenset[str], frozenset[str]]:
        """The users and groups together."""
        return self.users, self.groups

    def matches(self, identity: Identity, cluster: str) -> bool:
        """Return whether this rule lets `identity` reach `cluster`."""
        return self.covers(cluster) and self.names(identity)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules decide, and by which of them."""

    allowed: bool
    rule: Rule | None = None
    """The rule that allows it, else the nearest; None where there is no rule."""
    by: str = ""
    """How the rule names the user, `user "…"`, `user "*"` or `group "…"`, and then the actors that it is for; empty
    where it is not allowed."""
    lacks: tuple[str, ...] = ()
    """What the nearest rule lacks, of `group`, `user`, `actor` and `cluster`."""
    near: str = ""
    """The name in that rule which may have been meant, or was mistyped."""

    def sentence(self) -> str:
        """Return it for people."""
        rule = self.rule
        if rule is None:
            return "the policy has no rule"
        at = f"{rule.path} (line {rule.line})" if rule.line else rule.path
        if self.allowed:
            return f"{at} allows it, by the {self.by}"
        words = []
        if "cluster" in self.lacks:
            words.append(f"is for the clusters {quoted(rule.clusters)}")
        kinds = [("group", rule.groups), ("user", rule.users)]
        if whom := [f"the {kind}s {quoted(names)}" for kind, names in kinds if kind in self.lacks]:
            words.append(f"is for {' and '.join(whom)}")
        if "actor" in self.lacks:
            words.append(f"is for the actors {quoted(rule.actors)}" if rule.actors else "is for users without an actor")
        meant = f'; did you mean "{self.near}"?' if self.near else ""
        return f"no rule allows it, and the nearest, {at}, {' and '.join(words)}{meant}"


def explain(rules: Sequence[Rule], identity: Identity, cluster: str) -> Verdict:
    """Return what `rules` decide about `identity` and `cluster`."""
    for rule in rules:
        if rule.matches(identity, cluster):
            through = f" through the actors {quoted(rule.actors)}" if rule.actors else ""
            return Verdict(True, rule, _by(rule, identity) + through)
    if not rules:
        return Verdict(False)
    own = {_bare(name) for name in (identity.username, *identity.groups)} - {""}

    def nearness(rule: Rule) -> tuple[bool, ...]:
        return (
            rule.covers(cluster),
            rule.names_any(identity.username, identity.groups),
            admits(rule.actors, identity.actor),
            bool(_resembling(rule, own)),
        )

    rule = max(rules, key=nearness)  # the first one of equals
    covers, names = rule.covers(cluster), rule.names_any(identity.username, identity.groups)
    kinds = () if names else (*(["group"] if rule.groups else ()), *(["user"] if rule.users else ()))
    near = "" if names else _resembling(rule, own)
    if not covers:
        near = near or nearest(cluster, rule.clusters[:MOST_COMPARED])
    actor = () if admits(rule.actors, identity.actor) else ("actor",)
    return Verdict(False, rule, "", (*kinds, *actor, *(() if covers else ("cluster",))), near)


def named(user: str = "", groups: Iterable[str] = (), actor: str = "") -> Identity:
    """Return an identity of which no more than the name, the groups and the actor are known."""
    return Identity(user, "", tuple(groups), "", "", 0.0, actor=actor)


def who(identity: Identity) -> str:
    """Return a user, the groups and the actor in few words: `user "anna" in the groups "a", "b" through the actor
    "c"`."""
    groups = f" in the groups {quoted(identity.groups)}" if identity.groups else ""
    user = f'user "{identity.username}"' if identity.username else "a user"
    actor = f' through the actor "{identity.actor}"' if identity.actor else ""
    return f"{user}{groups}{actor}"


def quoted(names: Iterable[str]) -> str:
    """Return names in quotes, the first few of them by the alphabet."""
    ordered = sorted(names)
    more = len(ordered) - MOST_NAMES
    return ", ".join(f'"{name}"' for name in ordered[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def covers(clusters: Iterable[str], name: str) -> bool:
    """Return whether the cluster `name` is one of these names and patterns."""
    return any(_compiled(cluster).fullmatch(name) for cluster in clusters)


@lru_cache(maxsize=1024)
def _compiled(cluster: str) -> re.Pattern[str]:
    """Return the expression of a name or pattern. Between two `*` the first place that fits is taken and never another
    one (an atomic group): where the rest fits behind a later one, it does so behind this one."""
    first, *others = (re.escape(part) for part in re.split(r"\*+", cluster))
    if not others:
        return re.compile(first)
    middle = "".join(f"(?>.*?{part})" for part in others[:-1])
    return re.compile(f"{first}{middle}.*{others[-1]}")


def _by(rule: Rule, identity: Identity) -> str:
    if identity.username in rule.users:
        return f'user "{identity.username}"'
    group = next((group for group in identity.groups if group in rule.groups), "")
    return f'group "{group}"' if group else EVERY_USER


def _resembling(rule: Rule, own: set[str]) -> str:
    """Return a name of the rule that is one of a user's but for its prefix and case; empty: there is none."""
    return min((name for name in (*rule.groups, *rule.users) if _bare(name) in own), default="")


def _bare(name: str) -> str:
    return name.rpartition(":")[2].rpartition("/")[2].casefold()

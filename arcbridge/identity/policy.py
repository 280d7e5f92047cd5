"""Reads the policy: a short TOML file of users, groups and the clusters that they may reach; deny by default.

    [[allow]]
    users = ["alice@example.com"]
    groups = ["platform"]
    clusters = ["prod-*", "staging"]

    [[test]]
    groups = ["platform"]
    accept = ["prod-1"]
    deny = ["lab"]

    [[admin]]
    groups = ["shop-operators"]
    clusters = ["shop-*"]
    what = ["tokens", "sessions", "revocations"]

A rule allows when its clusters match *and* the caller is one of its users or in one of its groups. Users and groups
are compared exactly, after claim mapping (so with their prefix); `"*"` alone means everyone who is authenticated.
`*` in a cluster pattern stands for any run of characters; nothing else is special. Where a program acts for the user
(`identity.actor`), a rule allows only if its `actors` name that program, `"*"` every one: a rule without them is for
users alone, and so is each `[[admin]]`. A caller who is allowed nowhere gets the same answer as for a cluster that does
not exist.

A test says what the rules have to decide (the model: tests of Tailscale's access rules). A file with a test that fails
is a file with a mistake: no version of it is taken over.

An `[[admin]]` says who administers which clusters through the relay's HTTP API, and what of them (`WHAT`); it lets no
user reach a cluster, and none administers without one. `clusters = ["*"]` is the whole relay, which `"*-*"` is not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from arcbridge.errors import ConfigError
from arcbridge.identity.actor import admits
from arcbridge.identity.claims import Identity
from arcbridge.identity.policy_rules import Rule, explain, named, who
from arcbridge.settings.problems import Place, Problem
from arcbridge.settings.suggest import unknown
from arcbridge.settings.toml_lines import locator, parts, syntax_place

WHAT = ("tokens", "sessions", "revocations", "read")
"""What an `[[admin]]` may give: join tokens; sessions; clusters and users that are shut out, restored and forgotten; to
see all of that. Each of the first three lets its own be seen."""
EVERY_CLUSTER = "*"

_KEYS = {
    "allow": ("users", "groups", "actors", "clusters"),
    "test": ("user", "groups", "actor", "accept", "deny"),
    "admin": ("users", "groups", "clusters", "what"),
}
_CLUSTER = re.compile(r"[a-z0-9.-]{1,63}")
_PATTERN = re.compile(r"[a-z0-9.*-]{1,63}")
CHECK_INTERVAL = 1.0
"""Seconds between two checks of the file's date: a revocation by an edited policy counts after at most this."""

MAX_TESTS = 500
MAX_COMPARISONS = 200_000
"""Comparisons of a cluster with a pattern that the tests of a file may ask for, a quarter of a second at most: a relay
reads a changed file between two turns of its loop."""

MOST_FAILURES = 20
"""Clusters of failing tests that are explained, which takes longer than to find them."""

ACCEPTED_FOR = 600.0
"""Seconds for which a version counts as accepted where it has not come yet."""


@dataclass(frozen=True, slots=True)
class PolicyTest:
    """One `[[test]]` table: which of these clusters a user has to reach, and which not."""

    identity: Identity
    accept: tuple[str, ...]
    deny: tuple[str, ...]
    path: str
    line: int


class KnownGroups(NamedTuple):
    """The groups of a user as they may be logged and sent: those that the policy names, and how many there are
    more."""

    names: tuple[str, ...]
    more: int
    policy: str = ""
    """Hash of that policy: one that was mended since may name others of them."""


@dataclass(frozen=True, slots=True)
class AdminRule:
    """One `[[admin]]` table."""

    rule: Rule
    """For whom it is, and for which clusters."""
    what: frozenset[str]
    """Some of `WHAT`."""


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules of a file; no rule, no access."""

    rules: tuple[Rule, ...]
    hash: str = ""
    """What names this version for people: 12 digits, of its rules alone. Another comment is no other version. Empty
    where a rule or a test cannot be read."""
    tests: tuple[PolicyTest, ...] = field(default=(), compare=False)
    admins: tuple[AdminRule, ...] = ()
    groups: frozenset[str] = field(init=False, compare=False, repr=False)
    """The groups that any rule names."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", frozenset().union(*(rule.groups for rule in self.rules)))

    @classmethod
    def of(
        cls, rules: tuple[Rule, ...], tests: tuple[PolicyTest, ...] = (), admins: tuple[AdminRule, ...] = ()
    ) -> Policy:
        """Return the policy of these rules, with its hash."""
        # Actors stand only where there are some: the hash of a policy without them is that of earlier versions.
        words = json.dumps(
            [
                [sorted(one.users), sorted(one.groups), one.clusters, *([sorted(one.actors)] * bool(one.actors))]
                for one in rules
            ]
        )
        for one in admins:
            words += json.dumps([sorted(one.rule.users), sorted(one.rule.groups), one.rule.clusters, sorted(one.what)])
        return cls(rules, hashlib.sha256(words.encode()).hexdigest()[:12], tests, admins)

    @classmethod
    def load(cls, toml_text: str, *, source: str = "policy") -> Policy:
        """Parse a policy. Raises ConfigError `source, line N: path: what is wrong`, also for unknown keys and for
        tests that fail."""
        policy, problems = cls.inspect(toml_text, source=source)
        if problems:
            raise ConfigError(str(problems[0]))
        return policy

    @classmethod
    def inspect(cls, toml_text: str, *, source: str = "policy") -> tuple[Policy, list[Problem]]:
        """Parse a policy, and return every mistake in it: the very ones of which `load` raises the first."""
        try:
            document = tomllib.loads(toml_text)
        except (ValueError, RecursionError) as error:
            _, line, column = syntax_place(str(error), toml_text)
            return cls(()), [Problem("policy", f"not valid TOML: {error}", place=Place(source, line, column))]
        line_at = locator(toml_text)
        errors = [f"{key}: unknown key (known: allow, test, admin)" for key in document if key not in _KEYS]
        entries: dict[str, list[Any]] = {}
        for kind in _KEYS:
            entries[kind] = document.get(kind, [])
            if not isinstance(entries[kind], list):
                errors.append(f"{kind}: write [[{kind}]], with two brackets")
                entries[kind] = []
        rules = tuple(
            _rule(entry, f"allow[{n}]", line_at(("allow", n)), errors) for n, entry in enumerate(entries["allow"])
        )
        if len(entries["test"]) > MAX_TESTS:
            errors.append(f"test: {len(entries['test'])} are too many; at most {MAX_TESTS}")
        tests = tuple(
            _test(entry, f"test[{n}]", line_at(("test", n)), errors)
            for n, entry in enumerate(entries["test"][:MAX_TESTS])
        )
        admins = tuple(
            _admin(entry, f"admin[{n}]", line_at(("admin", n)), errors) for n, entry in enumerate(entries["admin"])
        )
        policy = cls.of(rules, tests, admins)
        if errors:
            policy = replace(policy, hash="")
        else:
            errors = _failures(policy)
        found = []
        for message in errors:
            found.append(Problem("policy", message, place=Place(source, line_at(parts(message.partition(":")[0])))))
        return policy, found

    def allows(self, identity: Identity, cluster: str) -> bool:
        """Return whether any rule lets `identity` reach `cluster` (a canonical name)."""
        return any(rule.matches(identity, cluster) for rule in self.rules)

    def administered(self, identity: Identity, *what: str) -> tuple[str, ...]:
        """Return the names and patterns of the clusters of which `identity` administers any of `what`."""
        rules = [one.rule for one in self.admins if one.rule.names(identity) and not one.what.isdisjoint(what)]
        return tuple(dict.fromkeys(cluster for rule in rules for cluster in rule.clusters))

    def known_groups(self, identity: Identity) -> KnownGroups:
        """Return which of the groups of `identity` a rule names, and how many none does."""
        known = tuple(group for group in identity.groups if group in self.groups)
        return KnownGroups(known, len(identity.groups) - len(known), self.hash)


class AdminChange(NamedTuple):
    """What a version of the policy gives to an administrator, and takes away."""

    who: str
    """`user NAME` or `group NAME`."""
    gains: list[str]
    """Each as `tokens of shop-*`, sorted."""
    loses: list[str]


def admin_changes(old: Policy, new: Policy) -> list[AdminChange]:
    """Return what the `[[admin]]` of two versions give otherwise, by user or group."""
    before, after = (_admin_rights(policy.admins) for policy in (old, new))
    changes = (
        AdminChange(name, sorted(after[name] - before[name]), sorted(before[name] - after[name]))
        for name in sorted({*before, *after})
    )
    return [change for change in changes if change.gains or change.loses]


def _admin_rights(admins: Iterable[AdminRule]) -> defaultdict[str, set[str]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for rule, what in ((one.rule, one.what) for one in admins):
        rights = {f"{word} of {cluster}" for word in what for cluster in rule.clusters}
        for name in (*(f"user {one}" for one in rule.users), *(f"group {one}" for one in rule.groups)):
            found[name] |= rights
    return found


def _entry(entry: Any, path: str, errors: list[str]) -> dict[str, Any]:
    """Return a table's keys and values; none, with a mistake more, where it is no table."""
    if not isinstance(entry, dict):
        errors.append(f"{path}: must be a table")
        return {}
    known = _KEYS[path.partition("[")[0]]
    errors += [f"{path}.{key}: unknown key (known: {', '.join(known)})" for key in entry if key not in known]
    return entry


def _rule(entry: Any, path: str, line: int, errors: list[str]) -> Rule:
    """Read one `[[allow]]`; adds what is wrong with it to `errors`, each as `path: what is wrong`."""
    table = _entry(entry, path, errors)
    users, groups = _strings(table, "users", path, errors), _strings(table, "groups", path, errors)
    clusters = _strings(table, "clusters", path, errors)
    if not table.get("users") and not table.get("groups"):
        errors.append(f"{path}: needs users or groups, else it allows no user")
    if not table.get("clusters"):
        errors.append(f"{path}.clusters: needs at least one name or pattern")
    actors = _strings(table, "actors", path, errors)
    if table.get("actors") == []:
        errors.append(f"{path}.actors: names no actor; for users without one leave it out")
    if "*" in groups:
        errors.append(f'{path}.groups: "*" means nothing here; for everyone write users = ["*"]')
    for n, cluster in enumerate(clusters):
        if not _PATTERN.fullmatch(cluster):
            errors.append(f"{path}.clusters[{n}]: only lower-case letters, digits, '-', '.' and '*'")
    return Rule(frozenset(users), frozenset(groups), tuple(clusters), path, line, frozenset(actors))


def _admin(entry: Any, path: str, line: int, errors: list[str]) -> AdminRule:
    """Read one `[[admin]]` as `_rule` does."""
    rule = _rule(entry, path, line, errors)
    if "*" in rule.users:
        errors.append(f'{path}.users: "*" would make an administrator of everyone; name users or groups')
    table = entry if isinstance(entry, dict) else {}
    what = _strings(table, "what", path, errors)
    if not table.get("what"):
        errors.append(f"{path}.what: needs at least one of {', '.join(WHAT)}")
    errors += [unknown(f"{path}.what", word, WHAT) for word in what if word not in WHAT]
    return AdminRule(rule, frozenset(what))


def _test(entry: Any, path: str, line: int, errors: list[str]) -> PolicyTest:
    """Read one `[[test]]` as `_rule` does."""
    table = _entry(entry, path, errors)
    user, groups = _string(table, "user", path, errors), _strings(table, "groups", path, errors)
    actor = _string(table, "actor", path, errors)
    accept, deny = _strings(table, "accept", path, errors), _strings(table, "deny", path, errors)
    if not user and not table.get("groups"):
        errors.append(f"{path}: needs user or groups: whom it is about")
    if not table.get("accept") and not table.get("deny"):
        errors.append(f"{path}: needs accept or deny: the clusters that it is about")
    for key, clusters in (("accept", accept), ("deny", deny)):
        for n, cluster in enumerate(clusters):
            if not _CLUSTER.fullmatch(cluster):
                errors.append(f"{path}.{key}[{n}]: the name of one cluster; a test has no patterns")
    return PolicyTest(named(user, groups, actor), tuple(accept), tuple(deny), path, line)


def _failures(policy: Policy) -> list[str]:
    """Run the tests; return those that fail, each as `path: what was expected, and which rule decided`."""
    asked = sum(len(one.accept) + len(one.deny) for one in policy.tests)
    comparisons = asked * sum(len(rule.patterns) for rule in policy.rules)
    if comparisons > MAX_COMPARISONS:
        return [
            f"test: {asked} clusters in tests are {comparisons} comparisons with the patterns of all rules, and at "
            f"most {MAX_COMPARISONS} are made; take some tests out"
        ]
    failed = []
    for test in policy.tests:
        # Once a test, and not once a cluster: a test may have as many groups as the file has room for.
        groups = frozenset(test.identity.groups)
        user, actor = test.identity.username, test.identity.actor
        rules = [rule for rule in policy.rules if admits(rule.actors, actor) and rule.names_any(user, groups)]
        failed += [
            (test, cluster, accepted)
            for accepted, clusters in ((True, test.accept), (False, test.deny))
            for cluster in clusters
            if any(rule.covers(cluster) for rule in rules) is not accepted
        ]
    failures = []
    for test, cluster, accepted in failed[:MOST_FAILURES]:
        word = "has to reach" if accepted else "must not reach"
        verdict = explain(policy.rules, test.identity, cluster).sentence()
        failures.append(f'{test.path}: {who(test.identity)} {word} "{cluster}": {verdict}')
    if more := len(failed) - len(failures):
        failures.append(f"test: {more} more clusters in tests are decided otherwise than they say")
    return failures


def _string(entry: dict[str, Any], key: str, path: str, errors: list[str]) -> str:
    value = entry.get(key, "")
    if isinstance(value, str):
        return value
    errors.append(f"{path}.{key}: must be a string")
    return ""


def _strings(entry: dict[str, Any], key: str, path: str, errors: list[str]) -> list[str]:
    value = entry.get(key, [])
    if not isinstance(value, list):
        errors.append(f"{path}.{key}: must be a list of strings")
        return []
    wrong = [n for n, item in enumerate(value) if not isinstance(item, str) or not item]
    errors += [f"{path}.{key}[{n}]: must be a string that is not empty" for n in wrong]
    return [item for n, item in enumerate(value) if n not in wrong]


class PolicyFile:
    """The policy of a file, read again when the file changes.

    A changed file that cannot be read or parsed leaves the last good policy in force and its message in `error`, so
    that a typing mistake neither opens nor closes a fleet; the role logs `error` when it appears. Where the relay's
    guard judges changes (`judged`), one is `pending` until it is taken over or held back (`relay.policy_guard`).
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file at once; raises ConfigError when this first reading fails."""
        self.path = path
        self._clock = clock
        self._stamp = self._stat()
        self._policy = Policy.load(self._read(), source=str(path))
        self._checked_at = clock()
        self.error = ""
        self.judged = False
        """Whether `relay.policy_guard` decides what becomes of a changed version."""
        self.pending: Policy | None = None
        """The version of the file that is to be judged."""
        self.held: tuple[Policy, str] | None = None
        """The version of the file that is held back, and why."""
        self._held_since = 0.0
        self._accepted, self._accepted_at = "", 0.0
        """The hash of the version that an operator has accepted last, and when: here it may come later."""
        self.share, self.hold = 0, math.inf
        """See `hold_back`."""

    def current(self) -> Policy:
        """Return the policy in force; looks at the file's date once a second at most."""
        now = self._clock()
        if now - self._checked_at >= CHECK_INTERVAL:
            self._checked_at = now
            self._reload()
        return self._policy

    def allows(self, identity: Identity, cluster: str) -> bool:
        """Return whether the policy in force lets `identity` reach `cluster`."""
        return self.current().allows(identity, cluster)

    def take(self, path: Path, policy: Policy) -> None:
        """Take over, or leave to the guard, what was just read from `path`; from now on that file is looked at."""
        # No file has this stamp: it is read once more, so that no change since then is missed.
        self.path, self._stamp = path, (0, 0, 0)
        self._checked_at = self._clock()
        self._consider(policy)

    def hold_back(self, share: int, seconds: float) -> None:
        """Hold versions back that take their right from more than `share` per cent of the users, 0: none; for `seconds`
        at most, 0: until they are accepted. By another share a version that is held already is judged again."""
        if self.held is not None and share != self.share:
            self.pending, self.held = self.held[0], None
        self.share, self.hold = share, seconds or math.inf

    def accept(self, hash: str) -> bool:
        """Take the version with this hash over, now or when it comes; return whether it is held back."""
        self._accepted, self._accepted_at = hash, self._clock()
        if self.held is None or self.held[0].hash != hash:
            return False
        self.pending, self.held = self.held[0], None
        return True

    def is_accepted(self, policy: Policy) -> bool:
        """Return whether an operator has accepted this version lately, for this once."""
        return policy.hash == self._accepted and self._clock() - self._accepted_at < ACCEPTED_FOR

    def decide(self, policy: Policy, objection: str) -> None:
        """Hold the version that was pending back, or take it over where there is no objection."""
        if self.pending is policy:  # else the file has changed meanwhile
            self.pending = None
            if objection:
                self.held, self._held_since = (policy, objection), self._clock()
            else:
                self._policy, self.held, self._accepted = policy, None, ""

    def waited(self) -> bool:
        """Return whether the version that is held back has waited for long enough; it is pending then."""
        if self.held is None or self._clock() - self._held_since < self.hold:
            return False
        return self.accept(self.held[0].hash)

    def _reload(self) -> None:
        try:
            stamp = self._stat()
            if stamp == self._stamp:
                return
            policy = Policy.load(self._read(), source=str(self.path))
        except ConfigError as error:
            # What was held back is not in the file any more.
            self.error, self.held, self.pending, self._stamp = error.message, None, None, (0, 0, 0)
            return
        # Only now: a file that was half written when we looked is looked at again.
        self._stamp = stamp
        self._consider(policy)

    def _consider(self, policy: Policy) -> None:
        """Take a version over, or leave it to be judged; one that is held already waits on."""
        self.error = ""
        if policy.hash == self._policy.hash:
            # Another comment or date, or what was held back is undone; its rules may stand on other lines.
            self._policy, self.held, self.pending = policy, None, None
        elif not self.judged:
            self._policy = policy
        elif self.held is None or self.held[0].hash != policy.hash:
            self.pending, self.held = policy, None

    def _stat(self) -> tuple[int, int, int]:
        try:
            stat = os.stat(self.path)
        except OSError as error:
            raise ConfigError(f"{self.path}: the policy cannot be read: {error.strerror}") from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> str:
        try:
            return self.path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path}: the policy cannot be read: {error}") from error

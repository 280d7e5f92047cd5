"""Reads the policy: a short TOML file of users, groups and the clusters that they may reach; deny by default.

    [[allow]]
    users = ["alice@example.com"]
    groups = ["platform"]
    clusters = ["prod-*", "staging"]

A rule allows when its clusters match *and* the caller is one of its users or in one of its groups. Users and groups
are compared exactly, after claim mapping (so with their prefix); `"*"` alone means everyone who is authenticated.
`*` in a cluster pattern stands for any run of characters; nothing else is special. A caller who is allowed nowhere
gets the same answer as for a cluster that does not exist.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcbridge.errors import ConfigError
from arcbridge.identity.claims import Identity
from arcbridge.settings.problems import Place, Problem
from arcbridge.settings.toml_lines import line_of, parts, syntax_place

_PATTERN = re.compile(r"[a-z0-9.*-]{1,63}")
CHECK_INTERVAL = 1.0
"""Seconds between two checks of the file's date: a revocation by an edited policy counts after at most this."""

ACCEPTED_FOR = 600.0
"""Seconds for which a version counts as accepted where it has not come yet."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One `[[allow]]` table."""

    users: frozenset[str]
    groups: frozenset[str]
    clusters: tuple[re.Pattern[str], ...]

    def matches(self, identity: Identity, cluster: str) -> bool:
        """Return whether this rule lets `identity` reach `cluster`."""
        if not any(pattern.fullmatch(cluster) for pattern in self.clusters):
            return False
        if "*" in self.users or identity.username in self.users:
            return True
        return not self.groups.isdisjoint(identity.groups)


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules of a file; no rule, no access."""

    rules: tuple[Rule, ...]
    hash: str = ""
    """What names this version for people: 12 digits, of its rules alone. Another comment is no other version."""

    @classmethod
    def load(cls, toml_text: str, *, source: str = "policy") -> Policy:
        """Parse a policy. Raises ConfigError `source: path: what is wrong`, also for unknown keys."""
        policy, problems = cls.inspect(toml_text, source=source)
        if problems:
            raise ConfigError(f"{source}: {problems[0].message}")
        return policy

    @classmethod
    def inspect(cls, toml_text: str, *, source: str = "policy") -> tuple[Policy, list[Problem]]:
        """Parse a policy, and return every mistake in it: the very ones of which `load` raises the first."""
        try:
            document = tomllib.loads(toml_text)
        except (ValueError, RecursionError) as error:  # also a number too long for Python, or nesting
            _, line, column = syntax_place(str(error), toml_text)
            return cls(()), [Problem("policy", f"not valid TOML: {error}", place=Place(source, line, column))]
        errors: list[str] = [f"{key}: unknown key (the only one is allow)" for key in document if key != "allow"]
        entries = document.get("allow", [])
        if not isinstance(entries, list):
            errors.append("allow: write [[allow]], with two brackets")
            entries = []
        rules = tuple(_rule(entry, f"allow[{n}]", errors) for n, entry in enumerate(entries))
        found = []
        for message in errors:
            line = line_of(parts(message.partition(":")[0]), toml_text)
            found.append(Problem("policy", message, place=Place(source, line)))
        words = json.dumps(
            [[sorted(one.users), sorted(one.groups), [pattern.pattern for pattern in one.clusters]] for one in rules]
        )
        return cls(rules, hashlib.sha256(words.encode()).hexdigest()[:12]), found

    def allows(self, identity: Identity, cluster: str) -> bool:
        """Return whether any rule lets `identity` reach `cluster` (a canonical name)."""
        return any(rule.matches(identity, cluster) for rule in self.rules)


def _rule(entry: Any, path: str, errors: list[str]) -> Rule:
    """Read one `[[allow]]`; adds what is wrong with it to `errors`, each as `path: what is wrong`."""
    if not isinstance(entry, dict):
        errors.append(f"{path}: must be a table")
        return Rule(frozenset(), frozenset(), ())
    for key in entry:
        if key not in ("users", "groups", "clusters"):
            errors.append(f"{path}.{key}: unknown key (known: users, groups, clusters)")
    users, groups = _strings(entry, "users", path, errors), _strings(entry, "groups", path, errors)
    clusters = _strings(entry, "clusters", path, errors)
    if not entry.get("users") and not entry.get("groups"):
        errors.append(f"{path}: needs users or groups, else it allows no user")
    if not entry.get("clusters"):
        errors.append(f"{path}.clusters: needs at least one name or pattern")
    if "*" in groups:
        errors.append(f'{path}.groups: "*" means nothing here; for everyone write users = ["*"]')
    patterns = []
    for n, cluster in enumerate(clusters):
        if not _PATTERN.fullmatch(cluster):
            errors.append(f"{path}.clusters[{n}]: only lower-case letters, digits, '-', '.' and '*'")
        patterns.append(re.compile(".*".join(re.escape(part) for part in re.split(r"\*+", cluster))))
    return Rule(frozenset(users), frozenset(groups), tuple(patterns))


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

    __slots__ = (
        "_accepted",
        "_accepted_at",
        "_checked_at",
        "_clock",
        "_held_since",
        "_policy",
        "_stamp",
        "error",
        "held",
        "hold",
        "judged",
        "path",
        "pending",
        "share",
    )  # fmt: skip

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
            # Another comment or date, or what was held back is undone.
            self.held = self.pending = None
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

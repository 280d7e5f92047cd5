"""Judges a version of the policy that is about to be taken over by what it takes from those who are connected.

A policy may be valid and not meant: an emptied file cuts everybody. Such a version is held back, and the former one
counts, until an operator accepts it by its hash or the file has stayed as it is for a time (`identity.policy`). It
judges by the sessions of this process, and holds nothing back that only gives rights.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

import structlog

from arcbridge.identity.claims import Identity
from arcbridge.identity.policy import Policy, admin_changes
from arcbridge.observe.untrusted_text import clean
from arcbridge.relay.parts import Basis
from arcbridge.relay.settings import CheckedRelay, check_policy
from arcbridge.settings.problems import Problems

LEAST_USERS: Final = 3
"""Users who lose a right, below which a change is taken to be meant: it takes persons out."""
MOST_NAMED: Final = 20
"""Users, and administrators, who are named in a line of the log."""
MOST_OF_ADMIN: Final = 250
"""Bytes of what one administrator gains or loses, as a record has them of each text of a list."""

MOST_WARNINGS: Final = 10
SLICE: Final = 32
"""Sessions that are looked at in one turn of the loop, as `relay.enforcement` does."""

log = structlog.get_logger("arcbridge.relay")

_WAITED, _ACCEPTED, _CHANGED = "it was held back for long enough", "an operator has accepted it", "the file has changed"

Session = tuple[Identity, str]
"""Whose session it is, and with which cluster."""


@dataclass(frozen=True, slots=True)
class PolicyEffect:
    """What a new version takes from those who are connected."""

    users: tuple[str, ...]
    """Names of the users who lose the right to a cluster that they have a session with, sorted."""
    sessions: int
    """Their sessions that end."""
    connected: int
    """Users who are connected."""

    def fields(self) -> dict[str, object]:
        """Return the fields of the line that says who loses what."""
        named = ", ".join(self.users[:MOST_NAMED])
        more = len(self.users) - MOST_NAMED
        shown = {"users": f"{named} and {more} more" if more > 0 else named} if self.users else {}
        return {"users_lost": len(self.users), "sessions_lost": self.sessions, **shown}

    def facts(self) -> dict[str, object]:
        """Return the same for a record."""
        return {"users_lost": len(self.users), "sessions_lost": self.sessions, "users": self.users}


def admin_facts(former: Policy, policy: Policy) -> dict[str, object]:
    """Return for a line and for a record who gains and who loses rights to administer, bounded; empty where none do."""
    changes = admin_changes(former, policy)
    sides = {
        "admins_gain": [f"{one.who}: {', '.join(one.gains)}" for one in changes if one.gains],
        "admins_lose": [f"{one.who}: {', '.join(one.loses)}" for one in changes if one.loses],
    }
    return {
        side: [clean(text, MOST_OF_ADMIN) for text in texts[:MOST_NAMED]]
        + [f"{len(texts) - MOST_NAMED} more"] * (len(texts) > MOST_NAMED)
        for side, texts in sides.items()
        if texts
    }


async def effect_of(policy: Policy, sessions: Iterable[Session]) -> PolicyEffect:
    """Return what `policy` takes from these sessions, which the policy in force allows; the loop has its turns."""
    lost: set[str] = set()
    connected: set[str] = set()
    count = 0
    for number, (identity, cluster) in enumerate(list(sessions)):
        if number % SLICE == SLICE - 1:
            await asyncio.sleep(0)
        connected.add(identity.username)
        if not policy.allows(identity, cluster):
            lost.add(identity.username)
            count += 1
    return PolicyEffect(tuple(sorted(lost)), count, len(connected))


class PolicyWatch:
    """Judges each version that the policy's file has, and logs what becomes of it and who loses what.

    No version is taken over but by `look`, which the relay calls each second.
    """

    def __init__(
        self, basis: Basis, sessions: Callable[[], Iterable[Session]], clusters: Callable[[], Iterable[str]]
    ) -> None:
        """`sessions`: those of this process. `clusters`: the names that the registry has."""
        self._file = basis.policy
        self._file.judged = True
        self._sessions = sessions
        self._clusters = clusters
        self._held = self._error = ""
        self.checked: Callable[[], CheckedRelay] = lambda: basis.checked
        """The settings in force, whose issuers say which names there can be."""
        self.on_news: Callable[[], None] = lambda: None
        """Called when a version is held back or is so no more, and when one cannot be read or can again."""
        self.record: Callable[..., None] = lambda *_, **__: None
        """Records what becomes of a version, as `relay.audit.log.RelayAudit.note` does."""

    async def look(self) -> None:
        """Read the file if it has changed, decide about a new version, and log what has changed."""
        file = self._file
        former = file.current()
        if file.error != self._error:
            self._error = file.error
            self.on_news()
            if self._error:
                log.error("policy not taken over", reason=self._error, effect="the last good one stays")
                self.record("policy change", {"former": former.hash}, outcome="refused", reason=self._error)
            else:
                log.info("policy can be read again", hash=former.hash)
        waited = file.waited()
        while (policy := file.pending) is not None:
            effect = await effect_of(policy, self._sessions())
            if file.pending is not policy:
                continue  # the file has changed meanwhile, or another look has decided
            accepted = file.is_accepted(policy)
            reason = "" if accepted else self._objection(policy, effect)
            file.decide(policy, reason)
            version = {"hash": policy.hash, "former": former.hash, "rules": len(policy.rules),
                       "admins": len(policy.admins)}  # fmt: skip
            admins = admin_facts(former, policy)
            if reason:
                log.error(
                    "policy held back",
                    hash=policy.hash,
                    former=former.hash,
                    reason=reason,
                    advice=f"correct the file, or accept it: arcbridge --role relay policy accept {policy.hash}",
                    seconds=file.hold if file.hold < math.inf else 0,
                    **effect.fields(),
                    **admins,
                )
                self.record("policy change", version, outcome="held", reason=reason, result=effect.facts() | admins)
            elif file.current().hash == policy.hash:
                why = _WAITED if waited else _ACCEPTED if accepted else _CHANGED
                log.info("policy taken over", **version, reason=why, **effect.fields(), **admins)
                self.record("policy change", version, reason=why, result=effect.facts() | admins)
                self.warn()
        held = "" if file.held is None else file.held[0].hash
        if held != self._held:
            if self._held and not held and file.current().hash == former.hash:
                log.info("policy held back no more", hash=self._held, effect=f"version {former.hash} counts on")
                self.record("policy change", {"hash": self._held, "former": former.hash}, outcome="withdrawn")
            self._held = held
            self.on_news()

    def _objection(self, policy: Policy, effect: PolicyEffect) -> str:
        """Return why `policy` is held back, or nothing."""
        share, lost = self._file.share, len(effect.users)
        if not share:
            return ""
        if not policy.rules:
            return "it has no rule, so no user could reach any cluster"
        clusters = list(self._clusters())
        if clusters and not any(rule.covers(name) for rule in policy.rules for name in clusters):
            return "none of its rules is for a cluster that is enrolled"
        if lost >= LEAST_USERS and lost * 100 > effect.connected * share:
            return f"{lost} of {effect.connected} users who are connected would lose the cluster that they use"
        return ""

    def warn(self) -> None:
        """Log what may not be meant, as `config check` says it."""
        checked, problems = self.checked(), Problems()
        check_policy(replace(checked.config, policy=self._file.path), problems, checked.issuers, self._clusters())
        for problem in problems.warnings[:MOST_WARNINGS]:
            log.warning("settings", setting=problem.setting, reason=str(problem))

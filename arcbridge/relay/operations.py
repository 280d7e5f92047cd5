"""Answers an operator of a relay that runs: its sessions and agents, its self-checks, the end of one session.

A question is a small JSON object, an answer a list of rows. Each process of a relay (one, or each worker), and each
relay of a fleet, answers for what it holds itself; the process that asks joins the rows. So one form serves the admin
socket, the channels between processes and NATS. Nothing of a session's content is known here. Ending one takes what the
policy takes: the agent is asked to end it, then both its connections are cut.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final

import structlog

from arcbridge import __version__
from arcbridge.checks.diagnosis import Finding
from arcbridge.identity.policy import PolicyFile
from arcbridge.identity.policy_rules import covers
from arcbridge.observe.untrusted_text import clean
from arcbridge.pki.authority import Authority
from arcbridge.relay.fleet.base import Fleet, Lost
from arcbridge.relay.pump import Pump, Pumps
from arcbridge.relay.recent_refusals import RecentRefusals
from arcbridge.relay.recent_users import RecentUsers, token_row
from arcbridge.tasks import TaskSet, cancel_and_wait
from arcbridge.untrusted_json import read_json

Row = dict[str, Any]
Question = Mapping[str, Any]

GRACE: Final = 1.0
"""Seconds between the word to the agent and the cut, as in `relay.enforcement`."""
PART: Final = 64 * 1024
"""Bytes of rows in one message: half of what a channel between two processes takes."""
MAX_REASON: Final = 200
ENDED: Final = "no reason is given"
"""The reason that a user is told whose session was ended, unless the operator gives one."""

log = structlog.get_logger("arcbridge.relay")


@dataclass(eq=False, repr=False)
class Operations:
    """Answers for one process."""

    pumps: Pumps
    fleet: Fleet
    tell: Callable[[Lost], None]
    """Has the agents of a cluster end a session, wherever they are connected."""
    policy: PolicyFile
    recent: RecentUsers
    _: KW_ONLY
    relay: str
    """This relay's public address."""
    worker: int | None = None
    """Which of the relay's processes this is."""
    authority: Authority | None = None
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self.findings: Callable[[], list[Finding]] = list
        """What the self-checks found last; set once they are made."""
        self.certificate_expires: Callable[[], float] = lambda: 0.0
        """When the certificate that peers are shown ends, unix seconds; set once there is one."""
        self.refusals = RecentRefusals()
        """Who was refused which cluster lately; those of the joins, once these are made."""
        self._origin: Row = {"relay": self.relay, "worker": self.worker}
        self._cuts = TaskSet()

    def answer(self, question: Question) -> list[Row]:
        """Answer a question; one that is not known has no rows, because an older process may be asked."""
        match question.get("ask"):
            case "sessions":
                return [self._session(pump) for pump in self._asked_for(question)]
            case "agents":
                if isinstance(wanted := question.get("clusters"), list):
                    # Another relay counts the agents of these clusters.
                    named = {name for name in wanted if isinstance(name, str)}
                    counted = [link for name in named for link in self.fleet.links(name)]
                    return [{"cluster": one.cluster, "agent": one.instance} for one in counted if not one.draining]
                # A relay of an earlier version answers with all.
                asked = question.get("patterns")
                patterns = [one for one in asked if isinstance(one, str)] if isinstance(asked, list) else ["*"]
                return [
                    {"cluster": link.cluster, "agent": link.instance, "version": link.version, "since": link.since,
                     "ready": link.report.ready, "failing": link.report.failing,
                     "sessions": link.report.sessions, "round_trip": link.report.round_trip,
                     "relay_ca": link.report.relay_ca, "certificate_ca": link.report.certificate_ca,
                     "cluster_ca": link.report.cluster_ca, "newest": link.report.relay_ca == self._newest_ca,
                     **self._origin}
                    for link in self.fleet.links()
                    if not link.draining and covers(patterns, link.cluster)
                ]  # fmt: skip
            case "checks":
                return [
                    {"hop": one.hop, "state": str(one.state), "detail": one.detail, "remedy": one.remedy,
                     "code": one.code, **self._origin}
                    for one in self.findings()
                ]  # fmt: skip
            case "ca":
                if self.authority is None:
                    return []
                known = self.authority.succession
                return [{"pins": list(known.pins), "present": known.present, "since": known.since, **self._origin}]
            case "users":
                return self.recent.followers()
            case "policy":
                return [self._policy_row()]
            case "policy_rules":
                asked = {"relay": question.get("relay"), "worker": question.get("worker")}
                return self._policy_rules() if asked == self._origin else []
            case "user":
                return self._user(str(question.get("user", "")))
            case "refusals":
                about = question.get("clusters")
                clusters = [one for one in about if isinstance(one, str)] if isinstance(about, list) else ["*"]
                return [row | self._origin for row in self.refusals.rows(clusters)]
            case "connected":
                names = question.get("groups")
                return self._connected(frozenset(names) if isinstance(names, list) else frozenset())
            case "accept_policy":
                hash = clean(str(question.get("hash", "")), MAX_REASON)
                held = self.policy.accept(hash)
                log.warning("policy is accepted by an operator", hash=hash, held=held)
                return [self._policy_row()] if held else []
            case "end":
                return self._end(str(question.get("session", "")), str(question.get("reason", "")))
            case _:
                return []

    async def close(self) -> None:
        """End what waits for its cut; the relay stops, and cuts all."""
        await cancel_and_wait(*self._cuts)

    # -- inside ----------------------------------------------------------------------------------------------------

    @property
    def _newest_ca(self) -> str | None:
        return None if self.authority is None else self.authority.succession.pins[-1]

    def _held(self) -> list[Pump]:
        """Return the sessions whose client is connected here. Where a join was passed on, another relay lists it."""
        return sorted((pump for pump in self.pumps if pump.identity is not None), key=lambda pump: pump.started_at)

    def _asked_for(self, question: Question) -> list[Pump]:
        """Return the sessions of these `clusters` (names and patterns), of this user, with this id, the oldest `most`.

        A relay of an earlier version answers with all: the caller looks once more.
        """
        found = self._held()
        if isinstance(clusters := question.get("clusters"), list):
            named = [one for one in clusters if isinstance(one, str)]
            found = [pump for pump in found if covers(named, pump.cluster)]
        if user := question.get("user"):
            found = [pump for pump in found if pump.identity and pump.identity.username == user]
        if session := question.get("session"):
            found = [pump for pump in found if session in (pump.join_id, pump.first_session)]
        most = question.get("most")
        return found[:most] if isinstance(most, int) else found

    def _session(self, pump: Pump) -> Row:
        lasted = asyncio.get_running_loop().time() - pump.started_at
        return {
            "session": pump.join_id,
            "first_session": pump.first_session,
            "user": "" if pump.identity is None else pump.identity.username,
            "actor": "" if pump.identity is None else pump.identity.actor,
            "cluster": pump.cluster,
            "agent": pump.agent,
            "source": pump.source,
            "restricted": pump.restricted,
            "since": self.clock() - lasted,
            "bytes_to_agent": pump.bytes_to_agent,
            "bytes_to_client": pump.bytes_to_client,
            "round_trip": pump.round_trip,
            **self._origin,
        }

    def _policy_row(self) -> Row:
        """Return what this process serves by: its policy, its version, its certificate."""
        policy, held = self.policy.current(), self.policy.held
        return {
            "hash": policy.hash,
            "rules": len(policy.rules),
            "admins": len(policy.admins),
            "held": "" if held is None else held[0].hash,
            "reason": "" if held is None else held[1],
            "version": __version__,
            "certificate_expires": self.certificate_expires(),
            **self._origin,
        }

    def _policy_rules(self) -> list[Row]:
        """Return the rules in force, then each `[[admin]]`, a name in each row: a rule of many may be larger than a
        message."""
        policy = self.policy.current()
        rules = [("rule", n, rule, frozenset[str]()) for n, rule in enumerate(policy.rules)]
        rules += [("admin", n, one.rule, one.what) for n, one in enumerate(policy.admins)]
        return [
            {key: n, "line": rule.line, "kind": kind, "name": name}
            for key, n, rule, what in rules
            for kind, names in (
                ("users", rule.users), ("groups", rule.groups), ("actors", rule.actors), ("clusters", rule.clusters),
                ("what", what),
            )
            for name in names
        ]  # fmt: skip

    def _user(self, name: str) -> list[Row]:
        """Return the groups of the user's last token that the policy names, of a session or of a join."""
        found = (pump.identity for pump in self.pumps if pump.identity and pump.identity.username == name)
        newest = max(found, key=lambda one: one.issued_at, default=None)
        if newest is None:
            return self.recent.rows(name)
        return [token_row(newest, self.policy.current().known_groups(newest), "session", newest.issued_at)]

    def _connected(self, groups: frozenset[str]) -> list[Row]:
        """Return the sessions, each with those of these groups that its user has."""
        return [
            {"session": pump.join_id, "user": pump.identity.username, "actor": pump.identity.actor,
             "cluster": pump.cluster,
             "groups": [group for group in pump.identity.groups if group in groups], **self._origin}
            for pump in self.pumps if pump.identity is not None
        ]  # fmt: skip

    def _end(self, session: str, reason: str) -> list[Row]:
        found = [one for one in self._held() if session and session in (one.join_id, one.first_session)]
        words = clean(reason, MAX_REASON)
        for pump in found:
            identity = pump.identity
            assert identity is not None, "`_held` has none without"
            log.warning(
                "session is ended by an operator",
                session=pump.join_id,
                first_session=pump.first_session,
                cluster=pump.cluster,
                user=identity.username,
                reason=words,
            )
            # By both ids: after a resumption the agent knows the session by its first one as well.
            self.tell(Lost(pump.cluster, *identity.names, 0, words or ENDED, pump.join_id))
            self._cuts.start(self._cut(pump), f"cut-{pump.join_id}")
        return [self._session(pump) for pump in found]

    async def _cut(self, pump: Pump) -> None:
        await asyncio.sleep(GRACE)
        if not pump.closed:
            pump.abort("ended by an operator")


def parts(rows: Sequence[Row]) -> Iterator[tuple[bytes, bool]]:
    """Yield rows as JSON in parts that fit into a message each; the second value says which is the last. One at
    least."""
    part: list[str] = []
    size = 0
    for row in rows:
        text = json.dumps(row, separators=(",", ":"))
        if part and size + len(text) > PART:
            yield f"[{','.join(part)}]".encode(), False
            part, size = [], 0
        part.append(text)
        size += len(text) + 1
    yield f"[{','.join(part)}]".encode(), True


def rows_of(data: bytes) -> list[Row]:
    """Return the rows of one part; none where it is no such thing."""
    try:
        found = read_json(data)
    except ValueError:
        return []
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []

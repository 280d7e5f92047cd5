"""Computes what the administrators' page shows, once for all pages, and only while a page is open.

`FactBook.get` gives the facts of the last seconds; however many pages ask, one computation is under way, and the next
one begins no sooner than `EVERY` after it, later where there are thousands of clusters. The numbers are those of
`cluster list` and `policy list`, by the same functions. Where they cannot be read, the former facts stay, with the
reason. Invariant: nothing runs here while no page asks.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import structlog

from arcbridge.errors import ArcbridgeError
from arcbridge.identity.policy import EVERY_CLUSTER
from arcbridge.identity.policy_rules import covers
from arcbridge.relay import admin
from arcbridge.relay.admin import Administered
from arcbridge.relay.operations import Question, Row
from arcbridge.relay.page.changes import ChangeList, Changes
from arcbridge.relay.page.words import REVOKED, STATES, Judgement, judge
from arcbridge.tasks import cancel_and_wait
from arcbridge.units import rfc3339

EVERY: Final = 5.0
"""Seconds between two computations, at least."""
CLUSTERS_A_SECOND: Final = 500
"""By so many clusters another second is added, which keeps the cost at a hundredth or so of the loop's time."""
DAY: Final = 86400.0
TOGETHER: Final = 500
"""Clusters that are compared with patterns in one turn of the loop: 2 ms with ten patterns."""
MOST_KEPT: Final = 100
"""Entries of each of the caches of `Facts`: as many as there are live pages."""
_LOGGED: Final = "the relay's log has the cause"

log = structlog.get_logger("arcbridge.relay")


class ClusterFact(NamedTuple):
    """One cluster."""

    name: str
    judged: Judgement
    revoked: bool
    ready: int
    agents: int
    version: str
    expires: float
    """Unix seconds; 0: no certificate was issued."""
    round_trip: float | None
    """Seconds."""
    sessions: int

    @property
    def rank(self) -> tuple[bool, int, str]:
        """What the list is sorted by: the worst first; those that an operator has revoked last."""
        return self.revoked, STATES.index(self.judged.state), self.name


class RelayFact(NamedTuple):
    """One relay of the fleet."""

    address: str
    processes: int
    connections: int
    """Control connections of agents."""
    policies: tuple[str, ...]
    """Hashes in force; more than one while its processes differ."""
    held: str
    """Hash of the version of the policy that is held back; empty: none is."""
    versions: tuple[str, ...] = ()
    """Of its processes; empty where a relay of an earlier version does not say."""
    certificate_expires: float = 0.0
    """When the first of its processes' certificates ends, unix seconds; 0 where it does not say."""


@dataclass(slots=True)
class Caches:
    """What was made of the facts of one time."""

    views: dict[object, str] = field(default_factory=dict)
    """What was rendered, by rights and question."""
    parts: dict[object, str] = field(default_factory=dict)
    """What was rendered by rights, whatever the question."""
    chosen: dict[tuple[str, ...], tuple[ClusterFact, ...]] = field(default_factory=dict)
    """Clusters by the names and patterns that cover them."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is true at one time."""

    at: float = 0.0
    clusters: tuple[ClusterFact, ...] = ()
    """The worst first."""
    relays: tuple[RelayFact, ...] = ()
    findings: tuple[Row, ...] = ()
    """What this relay's self-checks find wrong, each once, with its `workers`; those that have failed first."""
    changes: ChangeList | None = field(default_factory=ChangeList)
    """Of the last day; None: the audit log is no file, or cannot be read."""
    missing: str = ""
    """What is the matter where revocations may be missing; else empty."""
    failure: str = ""
    """Why these facts are old; empty where they are not."""
    made: Caches = field(default_factory=Caches, init=False, compare=False, repr=False)
    """For the next page with the same rights; a copy of the facts has none of it."""

    async def choose(self, patterns: Sequence[str]) -> tuple[ClusterFact, ...]:
        """Return the clusters that these names and patterns cover, found once and in short turns of the loop."""
        if EVERY_CLUSTER in patterns:
            return self.clusters
        if (key := tuple(patterns)) not in self.made.chosen:
            own = list[ClusterFact]()
            for begin in range(0, len(self.clusters), TOGETHER):
                own += _covered(patterns, self.clusters[begin : begin + TOGETHER])
                await asyncio.sleep(0)
            make_room(self.made.chosen)
            self.made.chosen[key] = tuple(own)
        return self.made.chosen[key]

    def of(self, patterns: Sequence[str]) -> tuple[ClusterFact, ...]:
        """Return the same at once."""
        if EVERY_CLUSTER in patterns:
            return self.clusters
        found = self.made.chosen.get(tuple(patterns))
        return tuple(_covered(patterns, self.clusters)) if found is None else found


def make_room(kept: dict[Any, Any]) -> None:
    """Drop everything that is kept where it is as much as it may be."""
    if len(kept) >= MOST_KEPT:
        kept.clear()


def _covered(patterns: Sequence[str], clusters: Sequence[ClusterFact]) -> list[ClusterFact]:
    return [one for one in clusters if covers(patterns, one.name)]


class FactBook:
    """Keeps the newest facts of one process."""

    def __init__(
        self,
        relay: Callable[[], Administered],
        audit_file: str,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`relay`: asked at each computation, because a reload replaces it. `audit_file`: empty or `-`: no file."""
        self._relay = relay
        self._changes = Changes(Path(audit_file)) if audit_file not in ("", "-") else None
        self._clock = clock
        self._monotonic = monotonic
        self._facts: Facts | None = None
        self._fresh_until = 0.0
        self._computing: asyncio.Task[Facts] | None = None
        self.computed = 0
        """How often facts were computed."""

    @property
    def relay(self) -> Administered:
        """The relay that the facts are of."""
        return self._relay()

    async def get(self) -> Facts:
        """Return the facts of now, give or take `EVERY`."""
        if self._facts is not None and self._monotonic() < self._fresh_until:
            return self._facts
        if self._computing is None:
            self._computing = asyncio.create_task(self._compute())
            self._computing.add_done_callback(self._done)
        return await asyncio.shield(self._computing)

    async def after(self, seen: Facts) -> Facts:
        """Return the facts that follow `seen`, once it is time for them."""
        if seen is self._facts:
            await asyncio.sleep(max(self._fresh_until - self._monotonic(), 0.0))
        return await self.get()

    async def close(self) -> None:
        """End the computation that is under way."""
        if self._computing is not None:
            await cancel_and_wait(self._computing)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _done(self, task: asyncio.Task[Facts]) -> None:
        self._computing = None
        if not task.cancelled():
            task.exception()  # retrieved, also where each page has left

    async def _compute(self) -> Facts:
        self.computed += 1
        former = self._facts or Facts()
        try:
            facts = await self._found()
        except ArcbridgeError as error:
            # One with a cause is about this machine: its paths are for the log and for `doctor`.
            said = error.message if error.__cause__ is None else _LOGGED
            facts = _old(former, said)
        except Exception as error:
            # A mistake of ours is no reason to compute more often.
            log.error("page facts not computed", reason=type(error).__name__, exc_info=True)
            facts = _old(former, _LOGGED)
        self._facts = facts
        self._fresh_until = self._monotonic() + EVERY + len(facts.clusters) / CLUSTERS_A_SECOND
        return facts

    async def _found(self) -> Facts:
        relay, agents = self.relay, list[Row]()

        async def ask(question: Question) -> list[Row] | None:
            rows = await relay.ask(question)
            if question.get("ask") == "agents":
                agents.extend(rows or ())
            return rows

        listed, policies, checks = await asyncio.gather(
            admin.list_clusters(replace(relay, ask=ask)), relay.ask({"ask": "policy"}), relay.ask({"ask": "checks"})
        )
        now = self._clock()
        clusters = []
        for number, row in enumerate(listed.rows):
            if number % 100 == 99:
                await asyncio.sleep(0)
            clusters.append(_cluster_fact(row))
        return Facts(
            now, tuple(sorted(clusters, key=lambda one: one.rank)), _relay_facts(policies or [], agents),
            _findings(checks or []), await self._changed(now), listed.missing,
        )  # fmt: skip

    async def _changed(self, now: float) -> ChangeList | None:
        if self._changes is None:
            return None
        try:
            return await asyncio.to_thread(self._changes.since, rfc3339(now - DAY))
        except OSError:
            return None


def _old(former: Facts, reason: str) -> Facts:
    return replace(former, failure=f"the relay cannot read its own state: {reason}")


def _findings(checks: Sequence[Row]) -> tuple[Row, ...]:
    found: dict[tuple[object, ...], Row] = {}
    for row in checks:
        if row.get("state") in ("failed", "warning"):
            key = row["state"], row.get("hop"), row.get("detail")
            found.setdefault(key, row | {"workers": []})["workers"].append(row.get("worker"))
    return tuple(sorted(found.values(), key=lambda row: str(row["state"])))


def _cluster_fact(row: Row) -> ClusterFact:
    return ClusterFact(
        row["name"], judge(row), row["state"] == REVOKED, row["ready"] or 0, row["agents"] or 0, row["version"],
        row["certificate_expires"], row["round_trip"], row["sessions"],
    )  # fmt: skip


def _is_time(value: object) -> bool:
    """Return whether another relay's answer is a time that can be written."""
    return isinstance(value, float) and 0.0 < value < 1e11


def _relay_facts(policies: Sequence[Row], agents: Sequence[Row]) -> tuple[RelayFact, ...]:
    """Return the relays whose processes have sent their policy, by address."""
    connections = Counter(str(row.get("relay")) for row in agents)
    found: dict[str, list[Row]] = {}
    for row in policies:
        found.setdefault(str(row.get("relay")), []).append(row)
    return tuple(
        RelayFact(
            address, len(rows), connections[address], tuple(sorted({str(row.get("hash")) for row in rows})),
            next((str(row["held"]) for row in rows if row.get("held")), ""),
            tuple(sorted({str(row["version"]) for row in rows if row.get("version")})),
            min((row["certificate_expires"] for row in rows if _is_time(row.get("certificate_expires"))), default=0.0),
        )
        for address, rows in sorted(found.items())
    )  # fmt: skip

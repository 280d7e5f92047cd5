"""Shows how each cluster is: from what its agents report over their control connections, and from what was refused.

Agents behind firewalls cannot be scraped, so that their relay is, for them. `read_report` reads what an agent sends;
`ClusterReports` exposes metrics with the name of a cluster, for the clusters that the registry knows and that are not
revoked: at most as many as the settings say. Invariant: of an agent's words those become labels that are names of
self-checks of this version.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from arcbridge.checks.self_checks import AGENT_CHECKS
from arcbridge.observe.metrics import Metrics
from arcbridge.pki.pins import is_pin
from arcbridge.relay.counters import Counters
from arcbridge.relay.fleet.base import AgentReport
from arcbridge.relay.registry.base import ClusterRecord
from arcbridge.wire.records import Status

MAX_CHECKS: Final = 16
"""Words of one report that are read; an agent has nine self-checks."""
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_WORD: Final = re.compile(r"([a-z][a-z0-9_]{0,31})(?::([a-z][a-z0-9_]{0,47}))?")


def read_report(status: Status) -> AgentReport:
    """Return what a STATUS without a token reports; words that are no checks are left out."""
    words = [_WORD.fullmatch(word) for word in status.checks.split(" ", MAX_CHECKS)[:MAX_CHECKS]]
    found = [word for word in words if word and word[1] in AGENT_CHECKS]
    return AgentReport(
        ready=status.ready,
        unready=" ".join(word for word in status.unready.split(" ", MAX_CHECKS)[:MAX_CHECKS] if _NAME.fullmatch(word)),
        checks={one[1]: one[2] or "" for one in found} if status.checks else None,
        sessions=status.sessions,
        round_trip=status.round_trip / 1e6,
        relay_ca=status.relay_ca if is_pin(status.relay_ca) else "",
        certificate_ca=status.certificate_ca if is_pin(status.certificate_ca) else "",
        cluster_ca=status.cluster_ca if is_pin(status.cluster_ca) else "",
    )


@dataclass(eq=False, repr=False)
class ClusterReports:
    """The metrics of clusters in one process. `learn` gives it the clusters that there are."""

    reports: Callable[[], Iterable[tuple[str, AgentReport]]]
    """Cluster and report of each agent that is connected here."""
    counters: Counters
    most: int
    """Clusters with metrics of their own; 0: none."""
    relay_ca: Callable[[], str] = lambda: ""
    """Pin of the newest of the relay's CAs."""

    def __post_init__(self) -> None:
        self._expires: dict[str, float] = {}
        """When the agents' newest certificate of each cluster lapses, unix seconds."""
        self._cas: dict[str, tuple[int, str]] = {}
        """The pin of each cluster's newest CA, with the hash of the record's text that it was read from."""
        self._clusters: list[tuple[str, float]] = []
        """The clusters that are not revoked, by name, with that time."""
        self._known: frozenset[str] = frozenset()
        self._unknown: frozenset[str] = frozenset()
        """Clusters with an agent here that the registry did not have."""

    def learn(self, records: Iterable[ClusterRecord]) -> None:
        """Show these clusters from now on, those that are revoked excepted; the first ones by name."""
        records = list(records)
        self._known = frozenset(one.name for one in records)
        self._unknown = frozenset(name for name, _ in self.reports()) - self._known
        self._clusters = sorted((one.name, one.certificate_expires) for one in records if not one.revoked)
        known = self._cas
        self._cas = {
            one.name: known[one.name] if known.get(one.name, (0,))[0] == key else (key, one.newest_ca_pin)
            for one in records
            if (key := hash((one.ca_pin, one.cas)))
        }
        self.change(self.most)
        for counts in (self.counters.cluster_joins, self.counters.cluster_joins_failed):
            for gone in counts.keys() - self._known:
                del counts[gone]

    def change(self, most: int) -> None:
        """Show at most so many clusters."""
        self.most = most
        self._expires = dict(self._clusters[:most])

    @property
    def known(self) -> frozenset[str]:
        """The clusters of the registry."""
        return self._known

    def misses_cluster(self) -> bool:
        """Return whether an agent is here of a cluster that has come since the clusters were learnt."""
        return any(name not in self._known and name not in self._unknown for name, _ in self.reports())

    def register(self, metrics: Metrics) -> None:
        """Tell `metrics` where to read. Every cluster has a series at every relay: 0 is what an alert looks for."""
        each, most = {"cluster": lambda: self._expires}, math.inf  # `change` bounds them
        metrics.gauge("cluster_agents", "Agents of a cluster that are connected to this relay.", each,
                      lambda: self._count(lambda report: True), most=most)  # fmt: skip
        metrics.gauge("cluster_agents_ready", "Those of them that report to be ready.", each,
                      lambda: self._count(lambda report: report.ready), most=most)  # fmt: skip
        metrics.gauge("cluster_agents_newest_ca", "Those of them that know the newest CA, the relay's or their own.",
                      {**each, "ca": ("relay", "cluster")}, self._newest_cas, most=most)  # fmt: skip
        metrics.gauge("cluster_check_ok", "0 while a self-check of an agent of this cluster fails.",
                      {**each, "check": AGENT_CHECKS}, self._checks, most=most)  # fmt: skip
        metrics.gauge("cluster_certificate_expires_timestamp_seconds",
                      "When the newest certificate of a cluster's agents lapses, unix time.", each,
                      lambda: {name: when for name, when in self._expires.items() if when}, most=most)  # fmt: skip
        metrics.counter("cluster_joins_total", "Joins of users to a cluster that were theirs to make.", each,
                        lambda: self._shown_of(self.counters.cluster_joins), most=most)  # fmt: skip
        metrics.counter("cluster_joins_failed_total", "Those of them that failed, for no fault of the user's.", each,
                        lambda: self._shown_of(self.counters.cluster_joins_failed), most=most)  # fmt: skip
        metrics.gauge("clusters_without_metrics", "Clusters beyond `limits.clusters_with_metrics`.", None,
                      lambda: len(self._clusters) - len(self._expires))  # fmt: skip

    # -- inside ----------------------------------------------------------------------------------------------------

    def _shown(self) -> list[tuple[str, AgentReport]]:
        return [(name, report) for name, report in self.reports() if name in self._expires]

    def _shown_of(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        return {name: counts.get(name, 0) for name in self._expires}

    def _count(self, counts: Callable[[AgentReport], bool]) -> Mapping[str, int]:
        found = dict.fromkeys(self._expires, 0)
        for name, report in self._shown():
            found[name] += counts(report)
        return found

    def _newest_cas(self) -> Mapping[tuple[str, str], int]:
        newest, found = self.relay_ca(), {(name, ca): 0 for name in self._expires for ca in ("relay", "cluster")}
        for name, report in self._shown():
            found[name, "relay"] += report.relay_ca == newest
            found[name, "cluster"] += report.cluster_ca == self._cas[name][1]
        return found

    def _checks(self) -> Mapping[tuple[str, str], int]:
        found: dict[tuple[str, str], int] = {}
        for cluster, report in self._shown():
            for name, code in (report.checks or {}).items():
                found[cluster, name] = min(found.get((cluster, name), 1), int(not code))
        return found

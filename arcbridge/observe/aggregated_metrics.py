"""Metrics of several processes that act as one: what each counts, added up.

A process gives a `snapshot` of its metrics as plain data; `AggregatedMetrics` shows, in one exposition, the sum of its
own and of those it is given. Gauges are added up, too, unless a rule says otherwise. Counters never go back: what a
process had counted when it was last asked stays in the sum after its death (`keep`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from .metrics import Buckets, Metrics, Number, family

Entry = dict[str, Any]
"""`name` (in full), `kind`, `help`, `labels` (names), `series`: [[label values], number or [bounds, counts, sum]]."""
Snapshot = list[Entry]

Rule = Callable[[Sequence[Number]], Number]

_PROCESS_RULES: Final[dict[str, Rule]] = {"process_start_time_seconds": min}


def snapshot(metrics: Metrics) -> Snapshot:
    """Return what these metrics and this process' own (CPU, memory, descriptors) read now."""
    return [*_own(metrics), *_process()]


def merge(snapshots: Iterable[Snapshot], rules: Mapping[str, Rule]) -> Snapshot:
    """Return one snapshot that adds them up; `rules` by full name for gauges that are not to be added."""
    merged: dict[str, Entry] = {}
    values: dict[str, dict[tuple[str, ...], list[Any]]] = {}
    for entry in (entry for one in snapshots for entry in one):
        name = entry["name"]
        merged.setdefault(name, entry)
        series = values.setdefault(name, {})
        for labels, value in entry["series"]:
            series.setdefault(tuple(labels), []).append(value)
    return [
        {**entry, "series": [[list(key), _total(found, rules.get(name, sum))] for key, found in values[name].items()]}
        for name, entry in merged.items()
    ]


class AggregatedMetrics(Metrics):
    """`sources` gives the snapshots of the other processes; names in `own` (in full) are this process' alone."""

    shows_process = False

    def __init__(
        self,
        role: str,
        sources: Callable[[], Iterable[Snapshot]],
        *,
        rules: Mapping[str, Rule] | None = None,
        own: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(role)
        self._sources = sources
        self._rules = {**_PROCESS_RULES, **(rules or {})}
        self._own = own
        self._kept: Snapshot = []

    def keep(self, last: Snapshot) -> None:
        """Go on counting what a process had counted that is gone now."""
        counted = [entry for entry in last if entry["kind"] != "gauge" and entry["name"] not in self._own]
        self._kept = merge([self._kept, counted], {})

    def collect(self) -> Iterator[Any]:
        yield self.build_info()
        others = [[entry for entry in one if entry["name"] not in self._own] for one in self._sources()]
        for entry in merge([snapshot(self), *others, self._kept], self._rules):
            series = {tuple(key): _counted(value) for key, value in entry["series"]}
            yield family(entry["name"], entry["kind"], entry["help"], entry["labels"], series)


def _own(metrics: Metrics) -> Iterator[Entry]:
    for name, kind, help, labels, series in metrics.read():
        yield _entry(name, kind, help, labels, [[list(key), _plain(value)] for key, value in series.items()])


def _process() -> Iterator[Entry]:
    from prometheus_client import CollectorRegistry, ProcessCollector

    for found in ProcessCollector(registry=CollectorRegistry()).collect():
        for sample in found.samples:
            yield _entry(sample.name, found.type, found.documentation, [], [[[], sample.value]])


def _entry(name: str, kind: str, help: str, labels: list[str], series: list[Any]) -> Entry:
    return {"name": name, "kind": kind, "help": help, "labels": labels, "series": series}


def _plain(value: Any) -> Any:
    return [list(value.bounds), value.counts, value.total] if isinstance(value, Buckets) else value


def _total(values: list[Any], rule: Rule) -> Any:
    if not isinstance(values[0], list):
        return rule(values)
    return _plain(functools.reduce(operator.add, map(_counted, values)))


def _counted(value: Any) -> Any:
    """Return what `_plain` was given."""
    if not isinstance(value, list):
        return value
    found = Buckets(value[0])
    found.counts, found.total = list(value[1]), value[2]
    return found

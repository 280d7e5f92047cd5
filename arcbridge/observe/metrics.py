"""Metrics in Prometheus' text format, pulled from plain counters at scrape time.

The data path counts with integers on its own slotted objects and knows nothing of this module. A role registers,
once, a function per metric that reads them:

    metrics = Metrics("relay")
    metrics.counter("joins_total", "Joins by result.", {"result": ("paired", "refused")}, lambda: joins.by_result)

Two rules keep the number of series constant whatever peers send (CVE-2022-21698 was the opposite):

1. each label has a closed set of values, given when the metric is registered; any other value is counted under
   `other`. Where the registry bounds the set (cluster names) it may be a function;
2. a metric has at most `MAX_SERIES` series, or as many as it was registered with; the rest is folded into `other` too.

Never labels: user, pod, path, session, stream, address.
"""

from __future__ import annotations

import bisect
import logging
import math
import platform
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from arcbridge import __version__

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

Number = int | float
Labels = Mapping[str, Collection[str] | Callable[[], Collection[str]]]
NumberReader = Callable[[], Number | Mapping[Any, Number]]
BucketsReader = Callable[[], "Buckets | Mapping[Any, Buckets]"]

OTHER: Final = "other"
MAX_SERIES: Final = 1000

LATENCY_BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0)
"""Seconds: from a join on one machine (5 ms) to the deadlines (15 s to join, 30 s to reach a peer)."""

log = logging.getLogger("arcbridge.observe")

_FAILURES: Final = "metric_read_failures_total"
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*\Z")
_FORBIDDEN_LABELS: Final = frozenset({"user", "username", "pod", "path", "session", "stream", "address", "group", "le"})


class Buckets:
    """A histogram's counters: how many values lay at or under each bound. Used by the roles; costs a bisection."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = LATENCY_BOUNDS) -> None:
        if list(bounds) != sorted(set(bounds)) or not bounds:
            raise ValueError("histogram bounds must be given, distinct and rising")
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in base units (seconds, bytes)."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, int]]:
        """Prometheus' buckets are cumulative: at or under each bound, the last one infinite."""
        running = 0
        found: list[tuple[str, int]] = []
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            running += count
            found.append(("+Inf" if bound == math.inf else repr(float(bound)), running))
        return found

    def __add__(self, other: Buckets) -> Buckets:
        if self.bounds != other.bounds:
            raise ValueError("histograms with different bounds cannot be added")
        merged = Buckets(self.bounds)
        merged.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        merged.total = self.total + other.total
        return merged


class Metrics:
    """The metrics of one role. `render` is called by the scrape; nothing here runs otherwise."""

    shows_process = True
    """Whether CPU, memory and descriptors of this process are exposed, too."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.read_failures = 0
        """Reads that raised: the scrape went on without that metric."""
        self._metrics: dict[str, _Metric] = {}
        self._registry: CollectorRegistry | None = None
        self.counter(_FAILURES, "Metrics left out of a scrape because reading them failed.", None,
                     lambda: self.read_failures)  # fmt: skip

    def counter(
        self, name: str, help: str, labels: Labels | None, read: NumberReader, *, most: float = MAX_SERIES
    ) -> None:
        """Register a counter; `name` without prefix, ending in `_total`.

        `labels` maps each label's name to its values. `read` returns a number, or with labels a mapping from label
        value (a tuple of them where there are several labels, in the order of `labels`) to number.
        `most`: series that it may have. Raises ValueError for a name or label that breaks the rules.
        """
        if not name.endswith("_total"):
            raise ValueError(f"counter {name!r} must end in _total")
        self._add(_Metric("counter", name, help, labels or {}, read, most))

    def gauge(
        self, name: str, help: str, labels: Labels | None, read: NumberReader, *, most: float = MAX_SERIES
    ) -> None:
        """Register a gauge; arguments as for `counter`."""
        self._add(_Metric("gauge", name, help, labels or {}, read, most))

    def histogram(self, name: str, help: str, labels: Labels | None, read: BucketsReader) -> None:
        """Register a histogram; `read` returns `Buckets`, or with labels a mapping to them. Name in base units."""
        if not name.endswith(("_seconds", "_bytes")):
            raise ValueError(f"histogram {name!r} must end in its base unit")
        self._add(_Metric("histogram", name, help, labels or {}, read, MAX_SERIES))

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the exposition and its content type, chosen by the scraper's `Accept` header."""
        from prometheus_client.exposition import choose_encoder

        encoder, content_type = choose_encoder(accept)
        return encoder(self._collectors()), content_type

    def _add(self, metric: _Metric) -> None:
        if not _NAME.match(metric.name):
            raise ValueError(f"metric name {metric.name!r} is not lower case words joined by underscores")
        if metric.name in self._metrics:
            raise ValueError(f"metric {metric.name!r} is registered twice")
        bad = _FORBIDDEN_LABELS & set(metric.labels)
        if bad:
            raise ValueError(f"metric {metric.name!r} has label {min(bad)!r}, whose values are not bounded")
        self._metrics[metric.name] = metric

    def _collectors(self) -> CollectorRegistry:
        if self._registry is None:
            from prometheus_client import CollectorRegistry, ProcessCollector

            self._registry = CollectorRegistry(auto_describe=False)
            self._registry.register(self)
            if self.shows_process:
                ProcessCollector(registry=self._registry)
        return self._registry

    def collect(self) -> Iterator[Any]:
        """Read every metric; called by the exposition (prometheus_client's collector protocol)."""
        yield self.build_info()
        for entry in self.read():
            yield family(*entry)

    def build_info(self) -> Any:
        """Return the family that says what this process is."""
        from prometheus_client.core import GaugeMetricFamily

        names = ["role", "version", "python"]
        info = GaugeMetricFamily("arcbridge_build_info", "Version of this process.", labels=names)
        info.add_metric([self.role, __version__, platform.python_version()], 1)
        return info

    def read(self) -> Iterator[tuple[str, str, str, list[str], Mapping[tuple[str, ...], Any]]]:
        """Yield each metric as (full name, kind, help, label names, values by label values), as plain data."""
        # The failures come last, so that they count those of this very scrape.
        for metric in sorted(self._metrics.values(), key=lambda metric: metric.name == _FAILURES):
            try:
                series = metric.series()
            except Exception:  # one role's broken reader must not hide all other metrics; it is counted and alerted on
                self.read_failures += 1
                log.error("metric %s cannot be read", metric.name, exc_info=True)
                continue
            yield f"arcbridge_{self.role}_{metric.name}", metric.kind, metric.help, list(metric.labels), series


def family(name: str, kind: str, help: str, labels: list[str], series: Mapping[tuple[str, ...], Any]) -> Any:
    """Return a metric as prometheus_client exposes it; arguments as of `Metrics.read`."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    kinds: dict[str, Any] = {
        "counter": CounterMetricFamily,
        "gauge": GaugeMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    made = kinds[kind](name, help, labels=labels)
    for key, value in series.items():
        made.add_metric(list(key), *((value.cumulative(), value.total) if isinstance(value, Buckets) else (value,)))
    return made


class _Metric(NamedTuple):
    kind: str
    name: str
    help: str
    labels: Labels
    read: Callable[[], Any]
    most: float
    """Series that it may have."""

    def series(self) -> dict[tuple[str, ...], Any]:
        """Read, and fold label values outside their sets into `other`."""
        value = self.read()
        if not self.labels:
            return {(): value}
        allowed = [frozenset(values() if callable(values) else values) for values in self.labels.values()]
        folded: dict[tuple[str, ...], Any] = {}
        for key, number in value.items():
            labels = (key,) if isinstance(key, str) or not isinstance(key, tuple) else key
            if len(labels) != len(allowed):
                raise ValueError(f"metric {self.name!r} has {len(allowed)} labels and got {len(labels)}")
            pairs = zip(map(str, labels), allowed, strict=True)
            known = tuple(label if label in values else OTHER for label, values in pairs)
            if known not in folded and len(folded) >= self.most:
                known = (OTHER,) * len(allowed)
            folded[known] = folded[known] + number if known in folded else number
        return folded

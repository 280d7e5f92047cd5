from __future__ import annotations

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from arcbridge.observe.aggregated_metrics import AggregatedMetrics, Snapshot, snapshot
from arcbridge.observe.metrics import Buckets, Metrics


def one(count: int, held: int, expires: float, *seconds: float) -> Snapshot:
    """What a process would send."""
    metrics, delays = Metrics("relay"), Buckets()
    for value in seconds:
        delays.observe(value)
    metrics.counter("joins_total", "Joins.", {"result": ("ok", "no")}, lambda: {"ok": count, "no": 1})
    metrics.gauge("held", "Held.", None, lambda: held)
    metrics.gauge("expires", "When.", None, lambda: expires)
    metrics.gauge("ready", "Ready.", None, lambda: 1)
    metrics.histogram("join_seconds", "How long.", None, lambda: delays)
    found: Snapshot = json.loads(json.dumps(snapshot(metrics)))
    return found


def samples(metrics: AggregatedMetrics) -> dict[str, float]:
    text, _ = metrics.render()
    return {
        sample.name + "".join(f"/{value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def gathered(*sources: Snapshot) -> AggregatedMetrics:
    made = AggregatedMetrics(
        "relay", lambda: sources, rules={"arcbridge_relay_expires": min}, own=frozenset({"arcbridge_relay_ready"})
    )
    made.gauge("ready", "Ready.", None, lambda: 0)
    return made


def test_processes_add_up() -> None:
    shown = samples(gathered(one(2, 5, 90.0, 0.002, 3.0), one(3, 7, 80.0, 0.002)))
    assert shown["arcbridge_relay_joins_total/ok"] == 5
    assert shown["arcbridge_relay_joins_total/no"] == 2
    assert shown["arcbridge_relay_held"] == 12
    assert shown["arcbridge_relay_expires"] == 80
    assert shown["arcbridge_relay_ready"] == 0, "the one of this process alone"
    assert shown["arcbridge_relay_join_seconds_count"] == 3
    assert shown["arcbridge_relay_join_seconds_bucket/0.0025"] == 2
    assert shown["arcbridge_relay_join_seconds_bucket/+Inf"] == 3
    assert shown["arcbridge_relay_join_seconds_sum"] == pytest.approx(3.004)
    own = samples(gathered())
    assert shown["process_resident_memory_bytes"] > 2 * own["process_resident_memory_bytes"]
    assert shown["process_start_time_seconds"] == own["process_start_time_seconds"]


def test_counters_never_go_back_when_a_process_dies() -> None:
    sources = [one(2, 5, 90.0, 0.002), one(3, 7, 80.0, 0.002)]
    metrics = AggregatedMetrics("relay", lambda: sources)
    metrics.keep(sources.pop())
    shown = samples(metrics)
    assert shown["arcbridge_relay_joins_total/ok"] == 5
    assert shown["arcbridge_relay_join_seconds_count"] == 2
    assert shown["arcbridge_relay_held"] == 5, "what it held is gone with it"
    metrics.keep(sources.pop())
    assert samples(metrics)["arcbridge_relay_joins_total/ok"] == 5

"""Metrics: pulled at scrape time, a constant number of series (docs/threats.md#O3)."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from arcbridge import __version__
from arcbridge.observe.metrics import MAX_SERIES, Buckets, Metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    body, _ = metrics.render()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_values_are_read_at_each_scrape() -> None:
    metrics = Metrics("relay")
    state = {"joins": 1, "open": 5}
    metrics.counter("joins_total", "Joins.", None, lambda: state["joins"])
    metrics.gauge("pumps_open", "Pumps.", None, lambda: state["open"])
    assert samples(metrics)["arcbridge_relay_joins_total", ()] == 1
    state.update(joins=7, open=0)
    found = samples(metrics)
    assert found["arcbridge_relay_joins_total", ()] == 7
    assert found["arcbridge_relay_pumps_open", ()] == 0


def test_build_info_and_process_metrics_are_there() -> None:
    found = samples(Metrics("agent"))
    (info,) = [labels for name, labels in found if name == "arcbridge_build_info"]
    assert dict(info)["role"] == "agent"
    assert dict(info)["version"] == __version__
    assert found["process_resident_memory_bytes", ()] > 0
    assert found["process_open_fds", ()] > 0


def test_labels_come_from_closed_sets() -> None:
    metrics = Metrics("relay")
    metrics.counter("joins_total", "Joins.", {"result": ("paired", "refused")},
                    lambda: {"paired": 3, "refused": 1, "rm -rf": 2, "x\ny": 5})  # fmt: skip
    metrics.gauge("held", "Held.", {"kind": ("a",), "state": ("up", "down")},
                  lambda: {("a", "up"): 1, ("b", "up"): 2, ("c", "up"): 4})  # fmt: skip
    found = samples(metrics)
    assert found["arcbridge_relay_joins_total", (("result", "paired"),)] == 3
    assert found["arcbridge_relay_joins_total", (("result", "other"),)] == 7
    assert found["arcbridge_relay_held", (("kind", "other"), ("state", "up"))] == 6


def test_a_hundred_thousand_strangers_add_no_series() -> None:
    metrics = Metrics("relay")
    names = [f"cluster-{n}" for n in range(100_000)]
    metrics.gauge("agents", "Agents.", {"cluster": lambda: names}, lambda: dict.fromkeys(names, 1))
    metrics.counter("requests_total", "Requests.", {"verb": ("get",)}, lambda: {f"VERB{n}": 1 for n in range(100_000)})
    found = samples(metrics)
    assert sum(name == "arcbridge_relay_agents" for name, _ in found) == MAX_SERIES + 1
    assert sum(value for (name, _), value in found.items() if name == "arcbridge_relay_agents") == 100_000
    assert found["arcbridge_relay_requests_total", (("verb", "other"),)] == 100_000


def test_histograms_are_cumulative() -> None:
    metrics = Metrics("relay")
    joins = Buckets((0.01, 0.1, 1.0))
    for seconds in (0.005, 0.01, 0.05, 5.0):
        joins.observe(seconds)
    metrics.histogram("join_seconds", "Joins.", None, lambda: joins)
    found = samples(metrics)
    shown = [found["arcbridge_relay_join_seconds_bucket", (("le", le),)] for le in ("0.01", "0.1", "1.0", "+Inf")]
    assert shown == [2, 3, 3, 4]
    assert found["arcbridge_relay_join_seconds_count", ()] == 4
    assert found["arcbridge_relay_join_seconds_sum", ()] == pytest.approx(5.065)


def test_histograms_with_labels_fold_into_other() -> None:
    metrics = Metrics("agent")
    one, two = Buckets((1.0,)), Buckets((1.0,))
    one.observe(0.5)
    two.observe(2.0)
    metrics.histogram("wait_seconds", "Waits.", {"verb": ("get",)}, lambda: {"get": one, "x": one, "y": two})
    found = samples(metrics)
    assert found["arcbridge_agent_wait_seconds_count", (("verb", "other"),)] == 2
    assert found["arcbridge_agent_wait_seconds_count", (("verb", "get"),)] == 1


def test_a_broken_reader_costs_its_own_metric_only() -> None:
    metrics = Metrics("relay")
    metrics.gauge("broken", "Broken.", None, lambda: 1 // 0)
    metrics.counter("confused_total", "Wrong labels.", {"a": ("x",), "b": ("y",)}, lambda: {"x": 1})
    metrics.gauge("sound", "Sound.", None, lambda: 1)
    found = samples(metrics)
    assert ("arcbridge_relay_broken", ()) not in found
    assert found["arcbridge_relay_sound", ()] == 1
    assert found["arcbridge_relay_metric_read_failures_total", ()] == 2


@pytest.mark.parametrize(
    ("kind", "name", "labels"),
    [
        ("counter", "joins", None), ("gauge", "Bad-Name", None), ("gauge", "x", {"user": ("a",)}),
        ("gauge", "x", {"path": ("a",)}), ("histogram", "wait", None), ("gauge", "taken", None),
    ],
)  # fmt: skip
def test_names_and_labels_that_break_the_rules(kind: str, name: str, labels: dict[str, tuple[str, ...]] | None) -> None:
    metrics = Metrics("relay")
    metrics.gauge("taken", "Taken.", None, lambda: 0)
    with pytest.raises(ValueError, match=r"metric|counter|histogram"):
        getattr(metrics, kind)(name, "Help.", labels, lambda: 0)


def test_bounds_must_rise() -> None:
    for bounds in ((), (1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="bounds"):
            Buckets(bounds)
    with pytest.raises(ValueError, match="bounds"):
        Buckets((1.0,)) + Buckets((2.0,))


def test_openmetrics_where_the_scraper_asks() -> None:
    metrics = Metrics("relay")
    body, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert metrics.render()[1].startswith("text/plain")

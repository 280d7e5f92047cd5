"""The goals' arithmetic, on a result that is kept in the repository, and on the same with other figures."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest

from bench.goals import Goal, goals
from bench.machine import REPOSITORY

KEPT = json.loads((REPOSITORY / "bench" / "results" / "2026-11-25-full.json").read_text())


def named(of: dict[str, Any]) -> dict[str, Goal]:
    return {goal.name: goal for goal in goals(of)}


def changed(place: str, value: float | None) -> dict[str, Any]:
    """The result with another figure at `scenario.system.metric` or `study.metric`, or without the figure."""
    result = deepcopy(KEPT)
    first, *rest = place.split(".")
    metric = rest.pop()
    found = result["scenarios"][first][rest[0]] if rest else result["studies"][first]["values"]
    if value is None:
        del found[metric]
    else:
        found[metric] = {"median": value} if rest else value
    return result


def test_every_goal_is_computed() -> None:
    verdicts = {goal.name: goal.met for goal in goals(KEPT)}
    assert list(verdicts) == [
        *("P1", "P2", "P3", "P4", "P5", "P6", "P7", "P7b", "P8", "P9", "P10", "P11", "P12", "P13", "P14", "P15")
    ]
    assert [name for name, met in verdicts.items() if met] == ["P7b", "P8", "P11", "P12", "P13"]


def test_who_is_compared_with_whom() -> None:
    found = named(KEPT)
    down = found["P1"].parts[1]
    assert (down.peer, down.peer_value, down.value) == ("openssh", 451.169, 601.866), (
        "neither the chain nor a yardstick"
    )
    assert down.ratio == pytest.approx(601.866 / 451.169)
    assert down.beside == "rathole-tls, which has no client: 502 MB/s"
    assert [part.peer for part in found["P2"].parts] == ["stunnel-haproxy"] * 2
    assert [part.peer for part in found["P3"].parts] == ["frp-no-mux", "rathole-stunnel", *["stunnel-haproxy"] * 2]
    assert found["P6"].parts[1].peer == "openssh", "of those that multiplex"
    assert {part.peer for part in found["P14"].parts} == {"rathole-stunnel", "frp-no-mux", "openssh"}


@pytest.mark.parametrize(
    ("goal", "place", "reached", "missed"),
    [
        ("P6", "bulk.arcbridge.relay_cpu_s_per_gb", 0.35, 0.36),
        ("P7", "keystroke.arcbridge.p99_us", 10_000, 10_001),
        ("P7b", "last_mile.arcbridge.echo_p99_ms", 100, 101),
        ("P7b", "last_mile.openssh.echo_p99_ms", 328, 327),
        ("P8", "long_path.arcbridge.percent_of_link", 90, 89.9),
        ("P8", "long_path.arcbridge.first_byte_round_trips", 1.1, 2),
        ("P12", "streams.arcbridge.n5000_cpu_us_per_request", 230, 300),
        ("P14", "transfer.arcbridge.up_10mb_mb_per_s", 440, 430),
        ("P9", "scale.sessions", 10_000, 9_999),
        ("P9", "scale.idle_percent_of_a_core", 10, 11),
        ("P10", "kubernetes.get_ratio", 0.5, 0.49),
        ("P10", "kubernetes.list_mb_per_s", 300, 299),
        ("P11", "start.version_ms", 60, 61),
        ("P11", "start.first_byte_beyond_5_round_trips_ms", 15, 16),
        ("P13", "workers.held_ratio", 1.6, 1.5),
        ("P15", "kubernetes.agent_cpu_us_per_request", 200, 201),
        ("P15", "kubernetes.agent_cpu_ms_per_exec", 4, 4.1),
    ],
)
def test_a_bound_decides(goal: str, place: str, reached: float, missed: float) -> None:
    good, bad = (named(changed(place, value))[goal] for value in (reached, missed))
    assert sum(part.met is True for part in good.parts) == sum(part.met is True for part in bad.parts) + 1
    assert bad.met is False
    if place.count(".") == 1 and place != "workers.held_ratio":
        part = next(part for part in named(changed(place, None))[goal].parts if part.met is None)
        study, metric = place.split(".")
        assert part.why == f"the study {study} has no {metric}"


def test_what_was_not_measured_says_why() -> None:
    nothing = named({"scenarios": {}, "studies": {}})
    assert all(goal.met is None for goal in nothing.values())
    assert nothing["P1"].parts[0].why == "the scenario bulk was not run"
    assert nothing["P10"].parts[0].why == "the study kubernetes was not run"

    alone = {name: {"arcbridge": found["arcbridge"]} for name, found in KEPT["scenarios"].items()}
    found = named({**KEPT, "scenarios": alone})
    assert found["P1"].parts[0].why == "the best peer: not measured in bulk"
    assert found["P1"].parts[0].value == 667.944, "the figure is told all the same"
    assert found["P2"].parts[0].why == "the chain: not measured in bulk"
    assert found["P8"].met is True

    others = {name: {"openssh": found["openssh"]} for name, found in KEPT["scenarios"].items() if "openssh" in found}
    left_out = {"arcbridge": "it did not start\nand more", "study scale": "needs root"}
    failures = ["study workers: it broke\nthere"]
    found = named({**KEPT, "scenarios": others, "studies": {}, "left_out": left_out, "failures": failures})
    assert found["P1"].parts[0].why == "arcbridge was left out: it did not start"
    assert found["P9"].parts[0].why == "left out: needs root"
    assert found["P13"].parts[0].why == "study workers: it broke"

"""The goals' arithmetic, on a made-up result."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from bench.goals import Goal, goals
from tests.bench.synthetic import SCENARIOS, STUDIES, result


def named(of: dict[str, Any]) -> dict[str, Goal]:
    return {goal.name: goal for goal in goals(of)}


def changed(scenario: str, system: str, **figures: float) -> dict[str, Any]:
    scenarios = deepcopy(SCENARIOS)
    scenarios[scenario].setdefault(system, {}).update(figures)
    return result(scenarios)


def test_every_goal_is_computed() -> None:
    found = goals(result())
    assert [goal.name for goal in found] == [
        *("P1", "P2", "P3", "P4", "P5", "P6", "P7", "P7b", "P8", "P9", "P10", "P11", "P12", "P13", "P14", "P15")
    ]
    assert [goal.name for goal in found if goal.met is not True] == ["P4"], "which the made-up figures miss"


def test_who_is_compared_with_whom() -> None:
    found = named(result())
    up = found["P1"].parts[0]
    assert (up.peer, up.peer_value, up.value) == ("rathole-stunnel", 600, 900), "neither the chain nor a yardstick"
    assert up.ratio == pytest.approx(1.5)
    assert up.beside == "rathole-tls, which has no client: 650 MB/s"
    assert up.met
    assert [part.peer for part in found["P2"].parts] == ["stunnel-haproxy"] * 2
    p50, p99, chain50, chain99 = found["P3"].parts
    assert (p50.peer, chain50.peer) == ("rathole-stunnel", "stunnel-haproxy")
    assert p99.ratio == pytest.approx(250 / 267)
    assert chain99.ratio == pytest.approx(250 / 198)
    relay = found["P6"].parts[1]
    assert (relay.peer, relay.ratio) == ("openssh", pytest.approx(0.3 / 1.35)), "of those that multiplex"


def test_a_goal_is_missed_by_one_part() -> None:
    found = named(result())
    first, second = found["P4"].parts
    assert (first.met, second.met, found["P4"].met) == (True, False, False)
    assert named(changed("bulk", "arcbridge", relay_cpu_s_per_gb=0.36))["P6"].met is False
    assert named(changed("keystroke", "arcbridge", p99_us=931.0))["P7"].met is False, "more than three times idle"
    slow = named(changed("keystroke", "arcbridge", p99_us=10_500.0, idle_p99_us=5_000.0))["P7"].parts
    assert [part.met for part in slow] == [True, False], "and 10 ms"
    assert named(changed("last_mile", "arcbridge", echo_p99_ms=101.0))["P7b"].met is False
    assert named(changed("last_mile", "openssh", echo_p99_ms=319.0))["P7b"].met is False, "a quarter of the best peer"
    assert named(changed("long_path", "arcbridge", percent_of_link=89.9))["P8"].met is False
    assert named(changed("long_path", "arcbridge", first_byte_round_trips=2.0))["P8"].met is False
    assert named(changed("streams", "arcbridge", n5000_cpu_us_per_request=61.0))["P12"].met is False


def test_a_copy_is_compared_with_the_best_peer() -> None:
    parts = named(result())["P14"].parts
    assert [part.peer for part in parts] == ["rathole-stunnel"] * 4 + ["openssh"] * 2, "not the chain, nor a yardstick"
    for metric in SCENARIOS["transfer"]["arcbridge"]:
        missed = named(changed("transfer", "arcbridge", **{metric: 300.0}))["P14"]
        assert missed.met is ("_1mb_" in metric), metric


@pytest.mark.parametrize(
    ("study", "metric", "value", "goal"),
    [
        ("scale", "sessions", 9_999, "P9"),
        ("scale", "idle_percent_of_a_core", 11, "P9"),
        ("kubernetes", "get_ratio", 0.49, "P10"),
        ("kubernetes", "list_mb_per_s", 299, "P10"),
        ("start", "version_ms", 61, "P11"),
        ("start", "first_byte_beyond_5_round_trips_ms", 16, "P11"),
        ("workers", "ratio", 1.5, "P13"),
        ("kubernetes", "agent_cpu_us_per_request", 201, "P15"),
        ("kubernetes", "agent_cpu_ms_per_exec", 4.1, "P15"),
    ],
)
def test_a_study_decides(study: str, metric: str, value: float, goal: str) -> None:
    assert named(result())[goal].met is True
    assert named(result(studies={**STUDIES, study: {**STUDIES[study], metric: value}}))[goal].met is False
    without = {name: figure for name, figure in STUDIES[study].items() if name != metric}
    part = next(part for part in named(result(studies={**STUDIES, study: without}))[goal].parts if part.met is None)
    assert part.why == f"the study {study} has no {metric}"


def test_what_was_not_measured_says_why() -> None:
    nothing = named(result({}, {}))
    assert all(goal.met is None for goal in nothing.values())
    assert nothing["P1"].parts[0].why == "the scenario bulk was not run"
    assert nothing["P10"].parts[0].why == "the study kubernetes was not run"

    alone = {name: {"arcbridge": found["arcbridge"]} for name, found in SCENARIOS.items()}
    found = named(result(alone))
    assert found["P1"].parts[0].why == "the best peer: not measured in bulk"
    assert found["P1"].parts[0].value == 900, "the figure is told all the same"
    assert found["P2"].parts[0].why == "the chain: not measured in bulk"
    assert found["P6"].met is None
    assert found["P7"].met is True

    others = {name: {"openssh": found["openssh"]} for name, found in SCENARIOS.items() if "openssh" in found}
    of = result(others)
    of["left_out"] = {"arcbridge": "it did not start\nand more", "study scale": "needs root"}
    of["studies"] = {}
    of["failures"] = ["study workers: it broke\nthere"]
    found = named(of)
    assert found["P1"].parts[0].why == "arcbridge was left out: it did not start"
    assert found["P9"].parts[0].why == "left out: needs root"
    assert found["P13"].parts[0].why == "study workers: it broke"

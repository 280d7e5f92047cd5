"""The runner, with systems and scenarios that are not real, and once with a real load and no proxy."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.address import Address
from bench.load.generator import Generator, LoadFailed
from bench.peers import WITHOUT_RESUMPTION
from bench.peers.base import Peer, Unavailable
from bench.report import report, resumption
from bench.result import resumption_costs, summary
from bench.run import PATIENCE, Plan, run
from bench.scenarios import Effort, Metrics, Scenario

pytestmark = pytest.mark.usefixtures("load")


class Fake(Peer):
    encrypts = "nothing"
    tuned = "not at all"

    def __init__(self, name: str, journal: list[str], missing: str = "") -> None:
        super().__init__()
        self.name = name
        self._journal = journal
        self._missing = missing

    def check(self) -> str:
        if self._missing:
            raise Unavailable(self._missing)
        return "1"

    def start(self, target: Address, directory: Path) -> None:
        self.endpoint = target
        self._journal.append(f"start {self.name}")

    def stop(self) -> None:
        self._journal.append(f"stop {self.name}")

    def roots(self) -> dict[str, int]:
        return {}


class Count(Scenario):
    name = "echo"
    title = "counting"
    primary = ("per_s",)

    def __init__(self, journal: list[str], broken: str = "") -> None:
        self._journal = journal
        self._broken = broken

    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        self._journal.append(peer.name)
        if peer.name == self._broken:
            raise LoadFailed("an echo came back changed")
        return {"per_s": float(len(self._journal)), "p50_us": 1.0}


def plan(peers: list[Fake], scenario: Count, rounds: int = 3) -> Plan:
    return Plan(tuple(peers), (scenario,), rounds, Effort(0.1, 0), "test")


def test_rounds_are_interleaved_and_no_system_is_always_first() -> None:
    journal: list[str] = []
    result = run(plan([Fake("a", journal), Fake("b", journal)], Count(journal)))
    assert journal == ["start a", "start b", "a", "b", "b", "a", "a", "b", "stop a", "stop b"]
    assert result["scenarios"]["echo"]["a"]["per_s"] == {"median": 6.0, "runs": [3.0, 6.0, 7.0]}
    order = [line.partition(": ")[2].partition(", took")[0] for line in result["log"]]
    assert order[:3] == ["round 1, echo, a", "round 1, echo, b", "round 2, echo, b"]
    assert result["complete"]
    assert {"commit", "machine", "command"} <= result.keys()
    assert {"cores", "cpu", "kernel", "python", "uvloop", "openssl", "date"} <= result["machine"].keys()


def test_what_is_missing_is_left_out_by_name() -> None:
    journal: list[str] = []
    result = run(plan([Fake("a", journal, "apt-get install a"), Fake("b", journal)], Count(journal), 1))
    assert result["left_out"] == {"a": "apt-get install a"}
    assert list(result["scenarios"]["echo"]) == ["b"]
    assert "a: apt-get install a" in report(result)


def test_a_broken_measurement_is_named_and_the_others_go_on() -> None:
    journal: list[str] = []
    result = run(plan([Fake("a", journal), Fake("b", journal)], Count(journal, broken="a"), 4))
    assert len(result["failures"]) == PATIENCE, "who fails again and again is not asked again"
    assert "an echo came back changed" in report(result)
    assert len(result["scenarios"]["echo"]["b"]["per_s"]["runs"]) == 4
    assert journal[2:5] == ["a", "stop a", "start a"], "it is started anew: it may be broken"
    assert journal[-2:] == ["stop a", "stop b"]


class Interrupted(Count):
    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        if len(self._journal) > 5:
            raise KeyboardInterrupt
        return super().measure(load, peer, effort)


def test_an_interrupted_run_ends_everything_and_keeps_what_it_has() -> None:
    journal: list[str] = []
    saved: list[dict[str, Any]] = []
    systems = (Fake("a", journal), Fake("b", journal))
    result = run(
        Plan(systems, (Interrupted(journal),), 3, Effort(1, 0), "t", save=lambda one: saved.append(deepcopy(one)))
    )
    assert journal == ["start a", "start b", "a", "b", "b", "a", "stop a", "stop b"]
    assert [len(one["log"]) for one in saved] == [2, 4, 4], "after each round, and at the end"
    assert not result["complete"]
    assert saved[-1] == result
    assert len(result["scenarios"]["echo"]["a"]["per_s"]["runs"]) == 2
    assert "interrupted" in report(result)


def turns(*rounds: tuple[float, float, float]) -> dict[str, dict[str, object]]:
    return summary([{"up_mb_per_s": up, "down_mb_per_s": down, "ends_cpu_s_per_gb": cpu} for up, down, cpu in rounds])


def test_what_resumption_costs_is_compared_turn_by_turn() -> None:
    systems = {
        "arcbridge": turns((90, 200, 1.1), (180, 220, 2.2), (95, 210, 1)),
        WITHOUT_RESUMPTION: turns((100, 200, 1), (200, 200, 2), (100, 200, 1)),
        "openssh": turns((1, 1, 1), (1, 1, 1), (1, 1, 1)),
    }
    costs = resumption_costs(systems)
    assert {what: found["median"] for what, found in costs.items()} == pytest.approx({"up": 10, "down": -5, "cpu": 10})
    assert costs["up"]["runs"] == pytest.approx([10, 10, 5])
    assert costs["down"]["runs"] == pytest.approx([0, -10, -5])
    assert costs["cpu"]["runs"] == pytest.approx([10, 10, 0])
    told = "resumption costs: up 10.0 %, down -5.0 %, CPU of client and agent per byte 10.0 %"
    assert resumption({"resumption_costs_percent": costs}) == told
    assert resumption_costs({"arcbridge": systems["arcbridge"]}) == {}
    assert resumption({}) == resumption({"resumption_costs_percent": {}}) == "", "not measured, or an older result"


def test_the_command_writes_a_result_and_prints_its_path_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    short = ["--rounds", "1", "--seconds", "0.3", "--peers", "direct", "--studies", "none"]
    assert main(["--quick", *short, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(out)
    result = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    scenarios = result["scenarios"]
    assert scenarios["bulk"]["direct"]["up_mb_per_s"]["median"] > 0
    assert scenarios["bulk"]["direct"]["down_mb_per_s"]["median"] > 0
    assert scenarios["echo"]["direct"]["p50_us"]["median"] <= scenarios["echo"]["direct"]["p99_us"]["median"]
    assert scenarios["concurrent"]["direct"]["per_s"]["median"] > 0
    assert scenarios["open"]["direct"]["per_s"]["median"] > 0
    assert main(["report", str(out)]) == 0
    assert "## bulk" in capsys.readouterr().out
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report/report.md\n"

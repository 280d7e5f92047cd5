"""The runner, with systems and scenarios that are not real, and once with a real load and no proxy."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from bench import peers, studies
from bench.__main__ import main
from bench.address import Address
from bench.load.build import NoCompiler, build
from bench.load.generator import Generator, LoadFailed
from bench.peers import WITHOUT_RESUMPTION
from bench.peers.base import Peer, Unavailable
from bench.peers.direct import Direct
from bench.report import report, resumption
from bench.result import resumption_costs, summary
from bench.run import PATIENCE, Plan, run
from bench.scenarios import Effort, Metrics, Scenario
from bench.studies import Study
from tests.support.processes import require_or_skip


@pytest.fixture(autouse=True)
def _compiler() -> None:
    try:
        build()
    except NoCompiler as error:
        require_or_skip("compiler", str(error))


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


class Way(NamedTuple):
    name: str
    round_trip_ms: float = 40.0
    mbit_per_s: float = 0.0


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


class Surprise(Fake):
    """A scenario that raises an unexpected error."""

    def start(self, target: Address, directory: Path) -> None:
        super().start(target, directory)
        raise ZeroDivisionError(f"not foreseen in {directory}")

    def stop(self) -> None:
        super().stop()
        raise OSError("gone")


def test_whatever_one_system_does_the_others_are_measured() -> None:
    journal: list[str] = []
    result = run(plan([Surprise("a", journal), Fake("b", journal)], Count(journal), 2))
    assert result["left_out"]["a"].startswith("ZeroDivisionError: not foreseen in DIR/"), "no path of this machine"
    assert result["failures"][0] == "a did not stop: OSError: gone"
    assert len(result["scenarios"]["echo"]["b"]["per_s"]["runs"]) == 2


class Far(Count):
    name = "far"
    path = Way("40 ms")
    rounds = 1
    seconds = 7.0

    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        self._journal.append(f"{peer.name} over {peer.endpoint.host} for {effort.seconds:g} s")
        return {"per_s": 1.0}


class Far2(Far):
    name = "far2"
    seconds = None


class Routed(Fake):
    def start(self, target: Address, directory: Path) -> None:
        super().start(target, directory)
        self.endpoint = self.through(target)


def links(journal: list[str]) -> Callable[[Any, Address], Any]:
    @contextmanager
    def link(path: Any, to: Address) -> Iterator[Any]:
        journal.append(f"link {path.name}")
        yield SimpleNamespace(address=Address("far away", to.port))
        journal.append("unlink")

    return link


def test_systems_are_started_once_per_path_and_the_straight_one_is_first() -> None:
    journal: list[str] = []
    systems = (Routed("a", journal), Routed("b", journal))
    scenarios = (Far(journal), Count(journal), Far2(journal))
    done = Plan(systems, scenarios, 2, Effort(1, 0), "t", link=links(journal), own_rounds=True, own_seconds=True)
    result = run(done)
    assert journal == [
        *("start a", "start b", "a", "b", "b", "a", "stop a", "stop b"),
        *("start a", "link 40 ms", "start b", "link 40 ms"),
        *("a over far away for 7 s", "b over far away for 7 s", "a over far away for 1 s", "b over far away for 1 s"),
        *("stop a", "stop b", "unlink", "unlink"),
    ]
    assert result["plan"]["far"] | {"primary": []} == {
        "title": "counting",
        "primary": [],
        "path": "40 ms",
        "rounds": 1,
        "seconds": 7.0,
    }
    journal.clear()
    result = run(Plan(systems, scenarios[:1], 2, Effort(1, 0), "t", link=links(journal)))
    assert journal.count("a over far away for 1 s") == 2, "what was asked for on the command line counts"


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


def test_the_command_ends_in_order_however_often_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped: list[str] = []

    class Slow(Fake):
        def __init__(self) -> None:
            super().__init__("slow", [])

        def start(self, target: Address, directory: Path) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        def stop(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            stopped.append("to the end")

    monkeypatch.setitem(peers.PEERS, "slow", Slow)
    out = tmp_path / "result.json"
    assert main(["--peers", "slow", "--scenarios", "echo", "--out", str(out)]) == 130
    assert stopped == ["to the end"]
    assert not json.loads(out.read_text())["complete"]
    assert "a moment" in capsys.readouterr().err


class Question(Study):
    title = "asked"

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name = name
        self._error = error

    def run(self, directory: Path, *, rounds: int, seconds: float) -> dict[str, Any]:
        assert list(directory.iterdir()) == []
        if self._error:
            raise self._error
        return {"values": {"a_ms": 1.5}, "runs": [rounds, seconds], "notes": ["a note"]}


def test_studies_follow_and_one_that_fails_loses_nothing() -> None:
    journal: list[str] = []
    studies = (Question("x", Unavailable("apt-get x")), Question("y", ZeroDivisionError("oh")), Question("z"))
    result = run(Plan((Fake("a", journal),), (Count(journal),), 1, Effort(2, 0), "t", studies=studies))
    assert result["left_out"] == {"study x": "apt-get x"}
    assert result["failures"] == ["study y: ZeroDivisionError: oh"]
    assert result["studies"]["z"]["values"] == {"a_ms": 1.5}
    assert result["studies"]["z"]["runs"] == [1, 2]
    assert "a note" in report(result)


class Pair(Count):
    name = "resumption"
    peers = ("a", "c")
    turns = 2


def test_who_is_special_is_measured_only_where_it_is_named() -> None:
    journal: list[str] = []
    systems = [Fake(name, journal) for name in ("a", "b", "c")]
    systems[2].special = True
    run(plan(systems, Count(journal), 1))
    assert journal == ["start a", "start b", "a", "b", "stop a", "stop b"]
    journal.clear()
    result = run(plan(systems, Pair(journal), 2))
    assert journal[2:-2] == ["a", "c", "c", "a", "a", "c", "c", "a"], "in turns, and no system is always the first"
    assert {name: len(found["per_s"]["runs"]) for name, found in result["scenarios"]["resumption"].items()} == {
        "a": 4,
        "c": 4,
    }


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


def test_the_cost_is_told_before_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Named(Direct):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    for name in ("arcbridge", WITHOUT_RESUMPTION):
        monkeypatch.setitem(peers.PEERS, name, lambda name=name: Named(name))
    out = tmp_path / "result.json"
    short = ["--rounds", "1", "--seconds", "0.3", "--scenarios", "resumption", "--out", str(out)]
    assert main([*short, "--peers", f"arcbridge,{WITHOUT_RESUMPTION}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(out)
    assert printed[-2].startswith("resumption costs: up ")
    assert any(line.startswith("Resumption costs: up ") for line in printed), "in the report, too"


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


def test_an_unknown_system_is_an_error_that_names_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick", "--peers", "teleport"])
    assert "openssh" in capsys.readouterr().err


def test_without_arcbridge_itself_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Fake):
        def __init__(self) -> None:
            super().__init__("arcbridge", [], "it did not start")

    monkeypatch.setitem(peers.PEERS, "arcbridge", Broken)
    short = ["--rounds", "1", "--seconds", "0.3", "--scenarios", "echo", "--out", str(tmp_path / "result.json")]
    assert main(["--quick", *short, "--peers", "direct"]) == 0
    assert main(["--quick", *short, "--peers", "arcbridge,direct"]) == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["left_out"] == {"arcbridge": "it did not start"}
    assert list(result["scenarios"]["echo"]) == ["direct"], "the others were measured"


def test_what_is_run_without_being_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def note(plan: Plan) -> dict[str, object]:
        plans.append(plan)
        raise NoCompiler("none")

    monkeypatch.setattr("bench.__main__.run", note)
    assert [main([mode]) for mode in ("--quick", "--full")] == [2, 2]
    assert "resumption" in [scenario.name for scenario in plans[0].scenarios]
    quick, full = [[peer.name for peer in plan.peers] for plan in plans]
    assert quick == ["arcbridge", "arcbridge-without-resumption", "openssh", "direct"]
    assert full == [name for name in peers.PEERS if name != "mux-chain"]
    assert [study.name for study in plans[0].studies] in ([], ["start"])
    assert [study.name for study in plans[1].studies] == list(studies.STUDIES)
    assert all(one.rounds_of(scenario) == 4 for one in plans[:1] for scenario in one.scenarios)
    with pytest.raises(SystemExit):
        main(["--quick", "--full"])

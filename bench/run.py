"""One interleaved run: A B C, B C A, …, round by round, so that a slow minute of the machine falls on all alike.

Systems are started once per path between client and relay, straight first; then the studies run, each by itself. What
was measured so far is saved after each round and each study, and whatever fails is named and loses nothing else.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from bench.address import Address
from bench.expectation import Expectation, minutes
from bench.load.generator import Generator, LoadFailed, Target
from bench.machine import Steal, commit, describe, load_average, neutral
from bench.peers import Peer, Unavailable
from bench.peers.base import straight
from bench.process import NotReady
from bench.result import ROLES, resumption_costs, summary
from bench.scenarios import Effort, Metrics, Scenario, Way
from bench.studies import Study
from bench.tap import Readable
from bench.usage import resident_bytes
from tests.support.processes import ProcessFailed
from tests.support.progress import StatusLine

PATIENCE = 2
"""Failures of one system in one scenario after which it is not measured there any more: each may take a minute."""

START_S = 2.5
"""About how long one system takes to start, be looked at, and stop."""

_TOLD = (LoadFailed, NotReady, ProcessFailed, Readable, Unavailable)
"""Errors whose message says it all."""


class Detour(Protocol):
    """The part of bench.path.link.Link that the runner uses."""

    @property
    def address(self) -> Address: ...


def open_link(path: Way, to: Address) -> AbstractContextManager[Detour]:
    """A link of this path that leads to an address."""
    link: AbstractContextManager[Detour] = importlib.import_module("bench.path.link").Link(path, to)
    return link


def _keep_nothing(result: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run does."""

    peers: tuple[Peer, ...]
    scenarios: tuple[Scenario, ...]
    rounds: int
    effort: Effort
    command: str
    studies: tuple[Study, ...] = ()
    own_rounds: bool = False
    """Whether a scenario's own `rounds` count."""
    own_seconds: bool = False
    """Whether a scenario's own `seconds` count."""
    save: Callable[[dict[str, Any]], None] = _keep_nothing
    """Given the result so far, after each round and each study."""
    link: Callable[[Way, Address], AbstractContextManager[Detour]] = open_link

    def rounds_of(self, scenario: Scenario) -> int:
        """How many rounds a scenario is measured."""
        return scenario.rounds if self.own_rounds and scenario.rounds is not None else self.rounds

    def effort_of(self, scenario: Scenario) -> Effort:
        """How long its measurements are."""
        if self.own_seconds and scenario.seconds is not None:
            return Effort(scenario.seconds, self.effort.warmup)
        return self.effort

    def takers(self, scenario: Scenario) -> list[Peer]:
        """The systems that it measures, of those that were asked for."""
        return [peer for peer in self.peers if scenario.takes(peer)]

    def groups(self) -> list[tuple[Way | None, list[Scenario]]]:
        """The scenarios of each path; the straight one first."""
        found: dict[Way | None, list[Scenario]] = {}
        for scenario in sorted(self.scenarios, key=lambda one: one.path is not None):
            found.setdefault(scenario.path, []).append(scenario)
        return list(found.items())

    def starts(self, scenarios: list[Scenario]) -> list[Peer]:
        """The systems that have to be started for some scenarios."""
        return [peer for peer in self.peers if any(scenario.takes(peer) for scenario in scenarios)]

    def scenario_s(self, scenario: Scenario) -> float:
        """About how long a scenario takes in all its rounds, seconds."""
        one = scenario.expected_s(self.effort_of(scenario))
        return one * scenario.turns * len(self.takers(scenario)) * self.rounds_of(scenario)

    def expected_s(self) -> float:
        """About how long the whole takes, seconds."""
        groups = sum(
            START_S * len(self.starts(scenarios)) + sum(map(self.scenario_s, scenarios))
            for _, scenarios in self.groups()
        )
        return groups + sum(study.expected_s for study in self.studies)

    def text(self) -> str:
        """The plan as it is told at the start."""
        lines = [
            f"plan: {len(self.peers)} systems, {len(self.scenarios)} scenarios, {len(self.studies)} studies; "
            f"about {minutes(self.expected_s())}"
        ]
        for path, scenarios in self.groups():
            names = ", ".join(peer.name for peer in self.starts(scenarios))
            lines.append(f"  {path.name if path else 'straight'}: {names}")
            for scenario in scenarios:
                effort = self.effort_of(scenario)
                lines.append(
                    f"    {scenario.name:<16} {self.rounds_of(scenario)} rounds of {effort.seconds:g} s, "
                    f"{len(self.takers(scenario))} systems, about {minutes(self.scenario_s(scenario))}"
                )
        lines += [f"  study {study.name}: about {minutes(study.expected_s)}" for study in self.studies]
        return "\n".join(lines)


def run(plan: Plan) -> dict[str, Any]:
    """Carry out the plan and return the result as it is written to JSON. Progress goes to stderr.

    A system that cannot be had or does not work is left out and named under `left_out`; a measurement that fails
    is named under `failures` and its system goes on. Interrupted, it ends every process and returns what there is,
    with `complete` false.
    """
    runner = _Runner(plan)
    say(plan.text())
    with tempfile.TemporaryDirectory(prefix="arcbridge-bench-") as scratch:
        try:
            runner.everything(Path(scratch))
            runner.complete = True
        except KeyboardInterrupt:
            say("INTERRUPTED: what was measured so far is kept, marked as not complete")
    result = runner.result()
    plan.save(result)
    return result


@dataclass
class _Runner:
    """What one run has so far."""

    plan: Plan
    load: Generator = field(default_factory=Generator)
    begun: float = field(default_factory=time.monotonic)
    machine: dict[str, Any] = field(default_factory=describe)
    steal: Steal = field(default_factory=Steal)
    commit: str = field(default_factory=commit)
    runs: dict[str, dict[str, list[Metrics]]] = field(default_factory=dict)
    systems: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    studies: dict[str, dict[str, Any]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    complete: bool = False

    def __post_init__(self) -> None:
        self.runs = {scenario.name: {} for scenario in self.plan.scenarios}
        self.expectation = Expectation(self.plan.expected_s())
        self._failed: dict[tuple[str, str], int] = {}

    # -- the order of things ----------------------------------------------------------------------------------------

    def everything(self, scratch: Path) -> None:
        """Run all groups of scenarios, then all studies."""
        self._scratch = scratch
        if self.plan.scenarios:
            with self.load.target() as target:
                for number, (path, scenarios) in enumerate(self.plan.groups()):
                    _Group(self, path, scenarios, target, scratch / f"path{number}").run()
        for study in self.plan.studies:
            self._study(study, scratch / f"study-{study.name}")
            self.plan.save(self.result())

    def _study(self, study: Study, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        say(f"study {study.name}: {study.title}; {self.expectation.left()}")
        begun = time.monotonic()
        try:
            found = study.run(directory, rounds=self.plan.rounds, seconds=self.plan.effort.seconds)
        except Unavailable as error:
            self.leave_out(f"study {study.name}", error)
        except Exception as error:
            self.fail(f"study {study.name}", error)
        else:
            took = round(time.monotonic() - begun, 1)
            self.studies[study.name] = {"title": study.title, "seconds_in_all": took, **found}
            shown = "  ".join(f"{key} {value:.6g}" for key, value in found["values"].items())
            say(f"study {study.name} took {took:g} s: {shown}")
        self.expectation.done(study.expected_s)

    # -- what went wrong --------------------------------------------------------------------------------------------

    def leave_out(self, name: str, error: Exception) -> None:
        """Record a system or study that the machine lacks, and say so in the progress."""
        self.left_out[name] = self._reason(error)
        say(f"LEFT OUT: {name}: {self.left_out[name]}")

    def fail(self, what: str, error: Exception) -> None:
        """Record a failure, and say so in the progress."""
        self.failures.append(f"{what}: {self._reason(error)}")
        say(f"FAILED: {self.failures[-1]}")

    def _reason(self, error: Exception) -> str:
        text = str(error) if isinstance(error, _TOLD) else f"{type(error).__name__}: {error}"
        return neutral(text, self._scratch)

    def fails(self, scenario: Scenario, peer: Peer) -> int:
        """Count a failure and return the new count."""
        key = (scenario.name, peer.name)
        self._failed[key] = self._failed.get(key, 0) + 1
        return self._failed[key]

    def given_up(self, scenario: Scenario, peer: Peer) -> bool:
        """Whether a system failed too often in a scenario."""
        return self._failed.get((scenario.name, peer.name), 0) >= PATIENCE

    # -- the result -------------------------------------------------------------------------------------------------

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.begun

    def result(self) -> dict[str, Any]:
        """Return the result so far, as it is written to JSON."""
        plan = self.plan
        scenarios = {
            scenario.name: {name: summary(found) for name, found in self.runs[scenario.name].items()}
            for scenario in plan.scenarios
        }
        return {
            "commit": self.commit,
            "complete": self.complete,
            "machine": {**self.machine, "load_average_after": load_average(), "steal_percent": self.steal.percent()},
            "command": plan.command,
            "rounds": plan.rounds,
            "seconds_per_measurement": plan.effort.seconds,
            "seconds_in_all": round(self.elapsed(), 1),
            "plan": {
                scenario.name: {
                    "title": scenario.title,
                    "primary": list(scenario.primary),
                    "path": scenario.path.name if scenario.path else "",
                    "rounds": plan.rounds_of(scenario),
                    "seconds": plan.effort_of(scenario).seconds,
                }
                for scenario in plan.scenarios
            },
            "systems": self.systems,
            "left_out": self.left_out,
            "failures": self.failures,
            "resumption_costs_percent": resumption_costs(scenarios.get("resumption", {})),
            "scenarios": scenarios,
            "studies": self.studies,
            "log": self.log,
        }


class _Group:
    """The scenarios of one path: it starts their systems, measures them in rounds, and stops them."""

    def __init__(
        self, runner: _Runner, path: Way | None, scenarios: list[Scenario], target: Target, scratch: Path
    ) -> None:
        self._runner = runner
        self._plan = runner.plan
        self._path = path
        self._where = path.name if path else "straight"
        self._scenarios = scenarios
        self._target = target
        self._scratch = scratch
        self._starts = 0
        self._links = ExitStack()
        self._running: list[Peer] = []

    def run(self) -> None:
        """Start, measure and stop the systems; they are stopped after a failure, too."""
        self._scratch.mkdir(mode=0o700)
        with self._links:
            try:
                for peer in self._plan.starts(self._scenarios):
                    if peer.name not in self._runner.left_out:
                        self._first_start(peer)
                    self._runner.expectation.done(START_S)
                for number in range(max(map(self._plan.rounds_of, self._scenarios))):
                    self._round(number)
                    self._plan.save(self._runner.result())
                for peer in self._running:
                    # Memory is compared with what it was at the start of the same process.
                    about = self._runner.systems[peer.name]
                    about.setdefault("resident_mb_after", _resident(peer))
            finally:
                for peer in self._plan.starts(self._scenarios):
                    self._stop(peer)

    def _round(self, number: int) -> None:
        for scenario in self._scenarios:
            if number >= self._plan.rounds_of(scenario):
                continue
            for turn in range(scenario.turns):
                chosen = [peer for peer in self._running if scenario.takes(peer)]
                if not chosen:
                    continue
                # No system is always the first after another's load.
                first = (number * scenario.turns + turn) % len(chosen)
                for peer in chosen[first:] + chosen[:first]:
                    if peer in self._running and not self._runner.given_up(scenario, peer):
                        self._measure(scenario, peer, number)
            expectation = self._runner.expectation
            expectation.done(self._plan.scenario_s(scenario) / self._plan.rounds_of(scenario))
            if number == 0 or scenario is self._scenarios[-1]:
                _STATUS.show(f"-- {self._where}, round {number + 1}, {scenario.name} done; {expectation.left()}")

    def _measure(self, scenario: Scenario, peer: Peer, number: int) -> None:
        """Measure once, or record the failure."""
        runner = self._runner
        rounds = self._plan.rounds_of(scenario)
        at = runner.elapsed()
        try:
            metrics = scenario.measure(runner.load, peer, self._plan.effort_of(scenario))
        except Exception as error:
            runner.fail(f"round {number + 1}, {scenario.name}, {peer.name}", error)
            if runner.fails(scenario, peer) >= PATIENCE and number + 1 < rounds:
                say(f"GIVEN UP: {peer.name} in {scenario.name}")
            self._again(peer)
            return
        runner.runs[scenario.name].setdefault(peer.name, []).append(metrics)
        took = runner.elapsed() - at
        runner.log.append(f"{at:.1f} s: round {number + 1}, {scenario.name}, {peer.name}, took {took:.1f} s")
        shown = "  ".join(f"{key} {metrics[key]:.6g}" for key in scenario.primary if key in metrics)
        left = runner.expectation.left()
        _STATUS.show(f"round {number + 1} of {rounds}, {left}: {scenario.name}, {peer.name}  {shown}")

    # -- systems ----------------------------------------------------------------------------------------------------

    def _first_start(self, peer: Peer) -> None:
        """Start one system and prove that it encrypts; record it as left out where that fails."""
        runner = self._runner
        known = peer.name in runner.systems
        try:
            version = peer.check()
            begun = time.monotonic()
            self._start(peer)
            took = time.monotonic() - begun
            if not known:
                proof = peer.prove_encryption(self._target.address)
                runner.systems[peer.name] = {
                    "version": version,
                    "standing": peer.standing,
                    "multiplexes": peer.multiplexes,
                    "roles": [role for role in ROLES if role in peer.roots()],
                    "encrypts": peer.encrypts,
                    "encryption_shown_by": proof,
                    "tuned": peer.tuned,
                    "seconds_to_start": round(took, 3),
                    "resident_mb_before": _resident(peer),
                }
        except Exception as error:
            self._stop(peer)
            if known:
                runner.fail(f"{peer.name} did not start over {self._where}", error)
            else:
                runner.leave_out(peer.name, error)
            return
        self._running.append(peer)

    def _start(self, peer: Peer) -> None:
        peer.through = straight if self._path is None else partial(self._detour, self._path)
        self._starts += 1
        directory = self._scratch / f"{self._starts}-{peer.name}"
        directory.mkdir(mode=0o700)
        peer.start(self._target.address, directory)

    def _detour(self, path: Way, address: Address) -> Address:
        return self._links.enter_context(self._plan.link(path, address)).address

    def _again(self, peer: Peer) -> None:
        """Start a system anew after a failure: it may be broken, and the next scenario is another question."""
        self._stop(peer)
        try:
            self._start(peer)
        except Exception as error:
            self._stop(peer)
            self._running.remove(peer)
            self._runner.fail(f"{peer.name} did not start again", error)

    def _stop(self, peer: Peer) -> None:
        try:
            peer.stop()
        except Exception as error:
            self._runner.fail(f"{peer.name} did not stop", error)


def _resident(peer: Peer) -> dict[str, float]:
    return {role: round(resident_bytes(peer.pids(role)) / 1e6, 1) for role in ROLES if role in peer.roots()}


_STATUS = StatusLine()
"""Where a run is: the last line of a terminal. The figures themselves are in the result."""


def say(text: str) -> None:
    """Write a line that stays to stderr."""
    _STATUS.say(text)

"""One interleaved run: A B A B …, round by round, so that a slow minute of the machine falls on all alike."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.load.generator import Generator, LoadFailed, Target
from bench.machine import commit, describe
from bench.peers import WITHOUT_RESUMPTION, Peer, Unavailable
from bench.process import NotReady
from bench.scenarios import Effort, Metrics, Scenario, higher_is_better
from bench.tap import Readable
from bench.usage import resident_bytes

MEMORY_ROLES = ("client", "relay", "agent")

NO_PEERS = ("direct", "mux-chain", WITHOUT_RESUMPTION)
"""What is measured beside the peers but is none: no proxy at all, arcbridge's hot path, arcbridge with a part off."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run does."""

    peers: tuple[Peer, ...]
    scenarios: tuple[Scenario, ...]
    rounds: int
    effort: Effort
    command: str


def run(plan: Plan) -> dict[str, Any]:
    """Do it; the result as it is written to JSON. Progress goes to stderr.

    A system that cannot be had or does not work is left out and named under `left_out`; a measurement that fails
    is named under `failures` and its system goes on.
    """
    load = Generator()
    begun = time.monotonic()
    machine = describe()
    runs: dict[str, dict[str, list[Metrics]]] = {s.name: {} for s in plan.scenarios}
    left_out: dict[str, str] = {}
    systems: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    running: list[Peer] = []
    with tempfile.TemporaryDirectory(prefix="arcbridge-bench-") as scratch, load.target() as target:
        try:
            for peer in plan.peers:
                problem = _start(peer, target, Path(scratch), systems)
                if problem is None:
                    running.append(peer)
                else:
                    left_out[peer.name] = problem
                    _say(f"LEFT OUT: {peer.name}: {problem}")
            for number in range(plan.rounds):
                for scenario in plan.scenarios:
                    chosen = [peer for peer in running if scenario.takes(peer)]
                    for turn in range(scenario.turns if chosen else 0):
                        # Nobody is always the first after another's load.
                        first = (number * scenario.turns + turn) % len(chosen)
                        for peer in chosen[first:] + chosen[:first]:
                            metrics = _measure(scenario, load, peer, plan, number, failures)
                            if metrics is not None:
                                runs[scenario.name].setdefault(peer.name, []).append(metrics)
            for peer in running:
                systems[peer.name]["resident_mb_after"] = _resident(peer)
        finally:
            for peer in plan.peers:
                peer.stop()
    scenarios = {
        scenario.name: {name: summary(found) for name, found in runs[scenario.name].items()}
        for scenario in plan.scenarios
    }
    return {
        "commit": commit(),
        "machine": machine,
        "command": plan.command,
        "rounds": plan.rounds,
        "seconds_per_measurement": plan.effort.seconds,
        "seconds_in_all": round(time.monotonic() - begun, 1),
        "systems": systems,
        "left_out": left_out,
        "failures": failures,
        "resumption_costs_percent": resumption_costs(scenarios.get("resumption", {})),
        "scenarios": scenarios,
    }


def _measure(
    scenario: Scenario, load: Generator, peer: Peer, plan: Plan, number: int, failures: list[str]
) -> Metrics | None:
    """One measurement; None when it failed, which is then named."""
    try:
        metrics = scenario.measure(load, peer, plan.effort)
    except LoadFailed as error:
        failures.append(f"round {number + 1}, {scenario.name}, {peer.name}: {error}")
        _say(f"FAILED: {failures[-1]}")
        return None
    shown = "  ".join(f"{key} {metrics[key]:.6g}" for key in scenario.primary if key in metrics)
    _say(f"round {number + 1}/{plan.rounds}  {scenario.name:<11} {peer.name:<28} {shown}")
    return metrics


def summary(runs: Sequence[Metrics]) -> dict[str, dict[str, Any]]:
    """`{metric: {"median", "runs"}}` of the runs of one system in one scenario."""
    return {
        name: {
            "median": _rounded(statistics.median(one[name] for one in runs)),
            "runs": [_rounded(one[name]) for one in runs],
        }
        for name in runs[0]
    }


def best_peer(systems: dict[str, dict[str, Any]], metric: str, ours: str = "arcbridge") -> tuple[str, float] | None:
    """The best system and its median, of those that are peers at all."""
    found = [
        (name, float(metrics[metric]["median"]))
        for name, metrics in systems.items()
        if name != ours and name not in NO_PEERS and metric in metrics
    ]
    if not found:
        return None
    return (max if higher_is_better(metric) else min)(found, key=lambda one: one[1])


def resumption_costs(systems: dict[str, dict[str, Any]], ours: str = "arcbridge") -> dict[str, dict[str, Any]]:
    """What resumption costs, percent: `up` and `down` of the throughput without it, `cpu` of client and agent per byte.

    `{"median", "runs"}` of the turns, each of which compares two measurements next to each other in time. Below 0: it
    was better with it, by chance.
    """
    found: dict[str, dict[str, Any]] = {}
    metrics = {"up": "up_mb_per_s", "down": "down_mb_per_s", "cpu": "ends_cpu_s_per_gb"}
    for what, metric in metrics.items():
        both = [systems.get(name, {}).get(metric, {}).get("runs", []) for name in (ours, WITHOUT_RESUMPTION)]
        sign = 1 if higher_is_better(metric) else -1
        costs = [_rounded(100 * sign * (1 - on / off)) for on, off in zip(*both, strict=False) if off]
        if costs:
            found[what] = {"median": _rounded(statistics.median(costs)), "runs": costs}
    return found


def _start(peer: Peer, target: Target, scratch: Path, systems: dict[str, dict[str, Any]]) -> str | None:
    """Start one system and see that it encrypts; what is wrong, or None."""
    directory = scratch / peer.name
    directory.mkdir(mode=0o700)
    try:
        version = peer.check()
        begun = time.monotonic()
        peer.start(target.address, directory)
        took = time.monotonic() - begun
        proof = peer.prove_encryption(target.address)
    except (Unavailable, NotReady, Readable) as error:
        peer.stop()
        return str(error)
    systems[peer.name] = {
        "version": version,
        "encrypts": peer.encrypts,
        "encryption_shown_by": proof,
        "tuned": peer.tuned,
        "seconds_to_start": round(took, 3),
        "resident_mb_before": _resident(peer),
    }
    return None


def _resident(peer: Peer) -> dict[str, float]:
    return {role: round(resident_bytes(peer.pids(role)) / 1e6, 1) for role in MEMORY_ROLES if role in peer.roots()}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

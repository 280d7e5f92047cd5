"""What can be read out of a result: medians, which system is whose peer, the best of them."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bench.peers import PEERS, WITHOUT_RESUMPTION

OURS = "arcbridge"

ROLES = ("client", "relay", "agent")

Measured = Mapping[str, Mapping[str, Any]]
"""One scenario: `{system: {metric: {"median", "runs"}}}`."""


def higher_is_better(metric: str) -> bool:
    """Tell by a metric's unit whether more is better."""
    return metric.endswith(("per_s", "percent_of_link"))


def rounded(value: float) -> float:
    """Six significant digits, which is more than any of these figures has."""
    return float(f"{value:.6g}")


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """`{metric: {"median", "runs"}}` of the runs of one system in one scenario.

    A metric that some runs lack (a level that could not be reached) is of those that have it.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for one in runs for name in one):
        values = [one[name] for one in runs if name in one]
        found[name] = {"median": rounded(statistics.median(values)), "runs": [rounded(value) for value in values]}
    return found


def standing(result: Mapping[str, Any], system: str) -> str:
    """Return a system's standing (bench.peers.base.Standing); older results lack it and get today's."""
    kept = result.get("systems", {}).get(system, {}).get("standing")
    if kept is None:
        kept = PEERS[system].standing if system in PEERS else "peer"
    return str(kept)


def multiplexes(result: Mapping[str, Any], system: str) -> bool:
    """Whether a system carries many streams over one connection of client and agent."""
    return bool(result.get("systems", {}).get(system, {}).get("multiplexes", True))


def has_all_roles(result: Mapping[str, Any], system: str) -> bool:
    """Whether client, relay and agent of a system are a process each; a leg that is not there costs nothing."""
    roles = result.get("systems", {}).get(system, {}).get("roles")
    return roles is None or set(ROLES) <= set(roles)


def standing_as(result: Mapping[str, Any], measured: Measured, *standings: str) -> list[str]:
    """The systems measured in a scenario that count as one of `standings`."""
    return [name for name in measured if standing(result, name) in standings]


def peers_of(result: Mapping[str, Any], measured: Measured) -> list[str]:
    """The systems measured in a scenario that we compare with: peers with all three roles."""
    return [name for name in standing_as(result, measured, "peer") if has_all_roles(result, name)]


def lesser_peers_of(result: Mapping[str, Any], measured: Measured) -> list[str]:
    """Peers that do with fewer roles, which are named beside the others."""
    return [name for name in standing_as(result, measured, "peer") if not has_all_roles(result, name)]


def median(measured: Measured, system: str, metric: str) -> float | None:
    """The median of one system's metric, or None when there is none."""
    found = measured.get(system, {}).get(metric)
    return None if found is None else float(found["median"])


def best(measured: Measured, systems: Collection[str], metric: str) -> tuple[str, float] | None:
    """The best of the systems named and its median."""
    found = [(name, value) for name in systems if (value := median(measured, name, metric)) is not None]
    if not found:
        return None
    return (max if higher_is_better(metric) else min)(found, key=lambda one: one[1])


def resumption_costs(measured: Measured, ours: str = OURS) -> dict[str, dict[str, Any]]:
    """What resumption costs, percent: `up` and `down` of the throughput without it, `cpu` of client and agent per byte.

    `{"median", "runs"}` of the turns, each of which compares two measurements next to each other in time. Below 0: it
    was better with it, by chance.
    """
    found: dict[str, dict[str, Any]] = {}
    metrics = {"up": "up_mb_per_s", "down": "down_mb_per_s", "cpu": "ends_cpu_s_per_gb"}
    for what, metric in metrics.items():
        both = [measured.get(name, {}).get(metric, {}).get("runs", []) for name in (ours, WITHOUT_RESUMPTION)]
        sign = 1 if higher_is_better(metric) else -1
        costs = [rounded(100 * sign * (1 - on / off)) for on, off in zip(*both, strict=False) if off]
        if costs:
            found[what] = {"median": rounded(statistics.median(costs)), "runs": costs}
    return found

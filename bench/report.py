"""A report in Markdown, made from a result and from nothing else."""

from __future__ import annotations

from typing import Any

from bench.run import best_peer
from bench.scenarios import SCENARIOS, higher_is_better

OURS = "arcbridge"

UNITS = {
    "up_mb_per_s": "up, MB/s",
    "down_mb_per_s": "down, MB/s",
    "relay_cpu_s_per_gb": "relay CPU, s/GB",
    "client_cpu_s_per_gb": "client CPU, s/GB",
    "agent_cpu_s_per_gb": "agent CPU, s/GB",
    "ends_cpu_s_per_gb": "client and agent CPU, s/GB",
    "p50_us": "p50, µs",
    "p99_us": "p99, µs",
    "per_s": "per second",
    "eight_per_s": "per second, eight at a time",
}


def report(result: dict[str, Any]) -> str:
    """The whole report."""
    machine = result["machine"]
    lines = [
        "# Benchmark",
        "",
        f"Commit `{result['commit']}`, {machine['date']}. {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gb']} GB, kernel {machine['kernel']}, Python {machine['python']}, "
        f"uvloop {machine['uvloop']}, {machine['openssl']}. Everything on loopback of this one machine.",
        "",
        f"`{result['command']}`: {result['rounds']} interleaved rounds of {result['seconds_per_measurement']:g} s per "
        f"measurement, {result['seconds_in_all']:g} s in all. Medians; in brackets the least and the most.",
        "",
        "Absolute figures change from run to run and from machine to machine; ratios within one run are what counts.",
    ]
    for name, systems in result["scenarios"].items():
        lines += ["", *_scenario(name, systems)]
    if costs := resumption(result):
        lines += ["", f"{costs[0].upper()}{costs[1:]}. Turn by turn: {_turns(result)}."]
    lines += ["", "## Systems", ""]
    lines += ["| system | version | encrypts | shown by | configured |", "|---|---|---|---|---|"]
    for name, about in result["systems"].items():
        columns = (about["version"], about["encrypts"], about["encryption_shown_by"], about["tuned"])
        lines.append(f"| {name} | {' | '.join(columns)} |")
    lines += ["", "Resident memory, MB, after the start and after the last round:", ""]
    lines += ["| system | role | before | after |", "|---|---|---|---|"]
    for name, about in result["systems"].items():
        for role, before in about["resident_mb_before"].items():
            lines.append(f"| {name} | {role} | {before:g} | {about.get('resident_mb_after', {}).get(role, 0):g} |")
    for title, entries in (
        ("Left out", [f"{name}: {why}" for name, why in result["left_out"].items()]),
        ("Failures", result["failures"]),
    ):
        if entries:
            lines += ["", f"## {title}", "", *(f"* {entry}" for entry in entries)]
    return "\n".join(lines) + "\n"


def resumption(result: dict[str, Any]) -> str:
    """What resumption costs, in one line; empty when that was not measured."""
    costs = result.get("resumption_costs_percent", {})
    parts = [f"{NAMES[what]} {measured['median']:.1f} %" for what, measured in costs.items()]
    return f"resumption costs: {', '.join(parts)}" if parts else ""


NAMES = {"up": "up", "down": "down", "cpu": "CPU of client and agent per byte"}


def _turns(result: dict[str, Any]) -> str:
    return "; ".join(
        f"{what} {', '.join(f'{cost:.0f}' for cost in measured['runs'])}"
        for what, measured in result["resumption_costs_percent"].items()
    )


def ratio(ours: float, theirs: float, metric: str) -> str:
    """How ours compares: always ours divided by theirs, and which way is better."""
    if not theirs:
        return "–"
    return f"{ours / theirs:.2f} × ({'higher' if higher_is_better(metric) else 'lower'} is better)"


def _scenario(name: str, systems: dict[str, dict[str, Any]]) -> list[str]:
    scenario = SCENARIOS.get(name)
    metrics = [
        metric
        for metric in (scenario.primary if scenario else ())
        if any(metric in measured for measured in systems.values())
    ]
    lines = [f"## {name}", "", f"{scenario.title[0].upper()}{scenario.title[1:]}." if scenario else "", ""]
    lines.append("| system | " + " | ".join(UNITS.get(metric, metric) for metric in metrics) + " |")
    lines.append("|---|" + "---|" * len(metrics))
    for system, measured in systems.items():
        cells = [_cell(measured.get(metric)) for metric in metrics]
        lines.append(f"| {f'**{system}**' if system == OURS else system} | {' | '.join(cells)} |")
    if OURS in systems:
        cells = []
        for metric in metrics:
            best = best_peer(systems, metric, OURS)
            mine = systems[OURS].get(metric)
            cells.append(ratio(mine["median"], best[1], metric) + f", {best[0]}" if best and mine else "–")
        if any(cell != "–" for cell in cells):
            lines.append(f"| *{OURS} / best peer* | {' | '.join(cells)} |")
    return lines


def _cell(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "–"
    runs = measured["runs"]
    return f"{_short(measured['median'])} ({_short(min(runs))}–{_short(max(runs))})"


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"

"""A report in Markdown, with plots, made from a result and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.goals import Goal, Part, goals, levels
from bench.plot import Bar, Chart, Kind, Panel, bars, lines, short
from bench.result import OURS, Measured, best, has_all_roles, higher_is_better, peers_of, standing, standing_as
from bench.scenarios import SCENARIOS

UNITS = {
    "up_mb_per_s": "up, MB/s",
    "down_mb_per_s": "down, MB/s",
    "mb_per_s": "MB/s",
    "relay_cpu_s_per_gb": "relay CPU, s/GB",
    "client_cpu_s_per_gb": "client CPU, s/GB",
    "agent_cpu_s_per_gb": "agent CPU, s/GB",
    "ends_cpu_s_per_gb": "client and agent CPU, s/GB",
    "idle_p99_us": "p99 while idle, µs",
    "p50_us": "p50, µs",
    "p99_us": "p99, µs",
    "echo_p50_ms": "echo p50, ms",
    "echo_p99_ms": "echo p99, ms",
    "bulk_mbit_per_s": "bulk, Mbit/s",
    "bulk_percent_of_link": "bulk, % of the link",
    "percent_of_link": "% of the link",
    "down_echo_p99_ms": "echo p99 beside a copy down, ms",
    "down_percent_of_link": "the copy down, % of the link",
    "first_byte_round_trips": "first byte, round trips",
    "per_s": "per second",
    "eight_per_s": "per second, eight at a time",
    "rss_mb": "RSS of client and agent, MB",
    "cpu_us_per_echo": "CPU of all roles per echo, µs",
    "cpu_us_per_open": "CPU of all roles per connection, µs",
    "cpu_us_per_request": "CPU per request, µs",
    **{f"{way}_{size}mb_mb_per_s": f"{size} MB {way}, MB/s" for size in (1, 10, 100) for way in ("up", "down")},
    **{f"streams{count}_mb_per_s": f"over {count} streams, MB/s" for count in (10, 100)},
}

GROWTH = ("mb_per_s", "per_s", "p99_us", "rss_mb", "cpu_us_per_request")
"""What of a scenario with levels (`n{N}_METRIC`) is drawn against N."""

KINDS: dict[str, Kind] = {"ours": "ours", "chain": "chain"}

REPORT = "report.md"


def write(result: Mapping[str, Any], directory: Path) -> Path:
    """The report and its plots in a directory; the path of the report. The same result makes the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    drawings = plots(result)
    for name, drawing in drawings.items():
        (directory / name).write_text(drawing, encoding="utf-8")
    path = directory / REPORT
    path.write_text(report(result, tuple(drawings)), encoding="utf-8")
    return path


def report(result: Mapping[str, Any], images: Sequence[str] = ()) -> str:
    """The whole report; `images` are the files of `plots` that lie beside it."""
    parts: list[list[str]] = [["# Benchmark"], _made_by(result), _missing(result), ["## Goals"], _goals(goals(result))]
    if images:
        parts.append(["In the plots blue is ours, grey a peer, amber the chain that multiplexes nothing."])
    for name, measured in result["scenarios"].items():
        parts += _scenario(result, name, measured, images)
        if name == "resumption" and (costs := resumption(result)):
            parts.append([f"{costs[0].upper()}{costs[1:]}. Turn by turn: {_turns(result)}."])
    for name, study in result.get("studies", {}).items():
        parts += _study(name, study)
    parts += [["## Systems"], _systems(result)]
    parts += [["Resident memory, MB, after the start and after the last round:"], _memory(result)]
    for title, entries in (
        ("Left out", [f"{name}: {why}" for name, why in result["left_out"].items()]),
        ("Failures", result["failures"]),
    ):
        if entries:
            parts += [[f"## {title}"], [f"* {_one_line(entry)}" for entry in entries]]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def resumption(result: Mapping[str, Any]) -> str:
    """Say in one line what resumption costs; empty when that was not measured."""
    costs = result.get("resumption_costs_percent", {})
    parts = [f"{NAMES[what]} {measured['median']:.1f} %" for what, measured in costs.items()]
    return f"resumption costs: {', '.join(parts)}" if parts else ""


NAMES = {"up": "up", "down": "down", "cpu": "CPU of client and agent per byte"}


def goal_lines(found: Sequence[Goal]) -> list[str]:
    """The goals for a terminal: one line each, and one for every part that was not reached or not measured."""
    told = []
    for goal in found:
        told.append(f"{goal.name:<4} {_verdict(goal.met):<13} {goal.measure}")
        for part in goal.parts:
            if part.met is None and goal.met is None and all(one.met is None for one in goal.parts):
                told.append(f"       {part.why}")
                break
            if not part.met:
                told.append(f"       {part.what}: {part.why or f'{_value(part)}, goal {part.goal}{_of(part)}'}")
    return told


def ratio(ours: float, theirs: float, metric: str) -> str:
    """Return arcbridge's figure divided by the other's, and which way is better."""
    if not theirs:
        return "–"
    return f"{ours / theirs:.2f} × ({_better(metric)} is better)"


# -- plots ----------------------------------------------------------------------------------------------------------


def plots(result: Mapping[str, Any]) -> dict[str, str]:
    """The plots (SVG) by file name, in the order of the report."""
    found = {}
    for name, measured in result["scenarios"].items():
        charts = [
            Chart(UNITS.get(metric, metric), grown)
            for metric in GROWTH
            if (grown := {system: line for system in measured if (line := levels(measured[system], metric))})
        ]
        panels = [
            _panel(result, measured, metric)
            for metric in _primary(result, name, measured)
            if metric in UNITS and standing_as(result, _with(measured, metric), "ours", "peer", "chain")
        ]
        if charts:
            found[f"{name}.svg"] = lines(charts, "streams")
        elif panels:
            found[f"{name}.svg"] = bars(panels)
    return found


def _with(measured: Measured, metric: str) -> Measured:
    return {name: metrics for name, metrics in measured.items() if metric in metrics}


def _panel(result: Mapping[str, Any], measured: Measured, metric: str) -> Panel:
    found, beside = [], []
    for name, metrics in _with(measured, metric).items():
        median, runs = metrics[metric]["median"], metrics[metric]["runs"]
        kind = standing(result, name)
        if kind == "yardstick":
            beside.append(f"{name} {short(median)}")
        else:
            found.append(Bar(name, median, min(runs), max(runs), KINDS.get(kind, "peer")))
    better = _better(metric)
    found.sort(key=lambda bar: -bar.median if better == "higher" else bar.median)
    note = f"not drawn: {', '.join(beside)}" if beside else ""
    return Panel(UNITS.get(metric, metric), better, tuple(found), note)


def _better(metric: str) -> Any:
    return "higher" if higher_is_better(metric) else "lower"


# -- sections -------------------------------------------------------------------------------------------------------


def _made_by(result: Mapping[str, Any]) -> list[str]:
    machine = result["machine"]
    load = f"Load average before: {machine['load_average_before']:g}"
    if "load_average_after" in machine:
        load += f", after: {machine['load_average_after']:g} (the run's own work is in it)"
    if "steal_percent" in machine:
        load += f"; {machine['steal_percent']:g} % of the cores' time was taken by the machine below"
    return [
        f"Commit `{result['commit']}`, {machine['date']}. {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory_gb']} GB, kernel {machine['kernel']}, {machine.get('system', 'Linux')}, "
        f"Python {machine['python']}, uvloop {machine['uvloop']}, {machine['openssl']}. "
        f"Everything on loopback of this one machine. {load}.",
        "",
        f"`{result['command']}`: {result['rounds']} interleaved rounds of {result['seconds_per_measurement']:g} s per "
        f"measurement where nothing else is said, {result['seconds_in_all']:g} s in all. Medians; in brackets, and as "
        "whiskers in the plots, the least and the most.",
        "",
        "Absolute figures change from run to run and from machine to machine; ratios within one run are what counts.",
    ]


def _missing(result: Mapping[str, Any]) -> list[str]:
    told = []
    if not result.get("complete", True):
        told.append("**This run was interrupted: it is not complete.**")
    if result["left_out"]:
        told.append(f"**Left out: {', '.join(result['left_out'])}** (why is told at the end).")
    if result["failures"]:
        told.append(f"**{len(result['failures'])} measurements failed** (told at the end).")
    return told


def _goals(found: Sequence[Goal]) -> list[str]:
    rows = []
    for goal in found:
        # A goal of which no part was measured, all for one reason, takes one row.
        whys = {part.why for part in goal.parts}
        if all(part.met is None for part in goal.parts) and len(whys) == 1:
            rows.append((f"**{goal.name}**", goal.measure, "", "", "", "", f"not measured: {whys.pop()}"))
            continue
        for index, part in enumerate(goal.parts):
            name, measure = (f"**{goal.name}**", goal.measure) if index == 0 else ("", "")
            compared = f"{part.peer}: {_figure(part.peer_value, part.unit)}" if part.peer else ""
            compared = " ".join(filter(None, (compared, f"(beside: {part.beside})" if part.beside else "")))
            times = f"{part.ratio:.2f} ×" if part.ratio is not None else ""
            what = f"{measure}: {part.what}" if measure else part.what
            verdict = f"not measured: {part.why}" if part.met is None else "**yes**" if part.met else "**no**"
            rows.append((name, what, _value(part), compared, times, part.goal, verdict))
    return _table(("", "measure", "figure", "compared with", "ratio", "goal", "met"), rows)


def _verdict(met: bool | None) -> str:
    return "not measured" if met is None else "met" if met else "NOT MET"


def _figure(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{short(value)} {unit}".rstrip()


def _value(part: Part) -> str:
    return _figure(part.value, part.unit)


def _of(part: Part) -> str:
    return f" ({part.ratio:.2f} × {part.peer})" if part.ratio is not None else ""


def _primary(result: Mapping[str, Any], name: str, measured: Measured) -> list[str]:
    """The metrics of a scenario that are compared: as the result says, or as today's scenario of that name does."""
    planned = result.get("plan", {}).get(name, {}).get("primary")
    if planned is None:
        planned = SCENARIOS[name].primary if name in SCENARIOS else ()
    return [metric for metric in planned if any(metric in metrics for metrics in measured.values())]


def _scenario(result: Mapping[str, Any], name: str, measured: Measured, images: Sequence[str]) -> Iterable[list[str]]:
    about = result.get("plan", {}).get(name, {})
    title = about.get("title") or (SCENARIOS[name].title if name in SCENARIOS else "")
    yield [f"## {name}"]
    said = f"{title[:1].upper()}{title[1:]}." if title else ""
    if about:
        over = f" Path between client and relay: {about['path']}." if about["path"] else ""
        said += f"{over} {about['rounds']} rounds of {about['seconds']:g} s."
    yield [said] if said else []
    if f"{name}.svg" in images:
        yield [f"![{name}: {title}]({name}.svg)"]
    metrics = _primary(result, name, measured)
    if not measured:
        yield ["Nothing was measured."]
    elif metrics:
        yield _compared(result, measured, metrics)
    yield from _grown(measured)


def _compared(result: Mapping[str, Any], measured: Measured, metrics: Sequence[str]) -> list[str]:
    rows = []
    for system, found in measured.items():
        rows.append((_bold(system), *(_cell(found.get(metric)) for metric in metrics)))
    rivals = peers_of(result, measured)
    if OURS in measured:
        cells = []
        for metric in metrics:
            rival, mine = best(measured, rivals, metric), measured[OURS].get(metric)
            cells.append(f"{ratio(mine['median'], rival[1], metric)}, {rival[0]}" if rival and mine else "–")
        if any(cell != "–" for cell in cells):
            rows.append((f"*{OURS} / best peer*", *cells))
    return _table(("system", *(UNITS.get(metric, metric) for metric in metrics)), rows)


def _grown(measured: Measured) -> Iterable[list[str]]:
    """One table per metric that was measured at several levels."""
    for metric in GROWTH:
        grown = {system: line for system in measured if (line := levels(measured[system], metric))}
        if grown:
            counts = sorted({count for line in grown.values() for count in line})
            rows = [
                (_bold(system), *(_cell(measured[system].get(f"n{count}_{metric}")) for count in counts))
                for system in grown
            ]
            yield _table((UNITS[metric], *(f"{short(count)} streams" for count in counts)), rows)


def _study(name: str, study: Mapping[str, Any]) -> Iterable[list[str]]:
    yield [f"## Study: {name}"]
    title = study.get("title", "")
    yield [f"{title[:1].upper()}{title[1:]}."] if title else []
    yield _table(("figure", "median"), [(f"`{key}`", short(value)) for key, value in study["values"].items()])
    yield [f"* {_one_line(note)}" for note in study.get("notes", ())]


def _systems(result: Mapping[str, Any]) -> list[str]:
    columns = ("version", "encrypts", "encryption_shown_by", "tuned")
    rows = [
        (name, _counts_as(result, name), *(_one_line(about[column]) for column in columns))
        for name, about in result["systems"].items()
    ]
    return _table(("system", "counts as", "version", "encrypts", "shown by", "configured"), rows)


def _counts_as(result: Mapping[str, Any], system: str) -> str:
    kind = _STANDINGS[standing(result, system)]
    return kind if kind != "peer" or has_all_roles(result, system) else "no goal compares with it: it has no client"


_STANDINGS = {"ours": "ours", "peer": "peer", "chain": "chain without multiplexing", "yardstick": "yardstick, no peer"}


def _memory(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, about in result["systems"].items():
        after = about.get("resident_mb_after", {})
        for role, before in about["resident_mb_before"].items():
            rows.append((name, role, f"{before:g}", f"{after[role]:g}" if role in after else "–"))
    return _table(("system", "role", "before", "after"), rows)


def _turns(result: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{what} {', '.join(f'{cost:.0f}' for cost in measured['runs'])}"
        for what, measured in result["resumption_costs_percent"].items()
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _one_line(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _bold(system: str) -> str:
    return f"**{system}**" if system == OURS else system


def _cell(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "–"
    runs = measured["runs"]
    return f"{short(measured['median'])} ({short(min(runs))}–{short(max(runs))})"

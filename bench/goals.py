"""The goals P1 … P15, each computed from one result: figure, best peer of the same run, ratio, goal, met or not.

Every goal has parts (up and down, p50 and p99), and is met when all of them are. What the run did not measure is "not
measured", with the reason, and never met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bench.plot import short
from bench.result import (
    OURS,
    Measured,
    best,
    higher_is_better,
    lesser_peers_of,
    median,
    multiplexes,
    peers_of,
    standing_as,
)

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One figure of a goal."""

    what: str
    goal: str
    """The bound, in words, with its unit."""
    value: float | None = None
    unit: str = ""
    peer: str = ""
    """The system that it is compared with; empty: none."""
    peer_value: float | None = None
    ratio: float | None = None
    """`value / peer_value`, or to whatever else the goal relates it."""
    met: bool | None = None
    """None: not measured."""
    why: str = ""
    """Why it was not measured."""
    beside: str = ""
    """Who was better than `peer` with fewer roles, and how good."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One of P1 … P15."""

    name: str
    measure: str
    parts: tuple[Part, ...]

    @property
    def met(self) -> bool | None:
        """True when all parts are met, False when one is missed, None when one was not measured and none is missed."""
        verdicts = [part.met for part in self.parts]
        return False if False in verdicts else None if None in verdicts else True


def goals(result: Result) -> list[Goal]:
    """Compute all goals, in order."""
    return [Goal(name, measure, tuple(parts(result))) for name, measure, parts in _GOALS]


# -- parts ----------------------------------------------------------------------------------------------------------


def _measured(result: Result, scenario: str) -> Measured:
    found: Measured = result.get("scenarios", {}).get(scenario, {})
    return found


def _missing(result: Result, scenario: str, system: str, metric: str) -> str:
    """Say why a figure of a scenario is missing."""
    if scenario not in result.get("scenarios", {}):
        return f"the scenario {scenario} was not run"
    if why := result.get("left_out", {}).get(system):
        return f"{system} was left out: {str(why).splitlines()[0]}"
    if system not in _measured(result, scenario):
        return f"{system} was not measured in {scenario}"
    return f"{scenario} has no {metric}"


def _unit(metric: str) -> str:
    for ending, unit in _UNITS.items():
        if metric.endswith(ending):
            return unit
    return ""


_UNITS = {
    "mb_per_s": "MB/s",
    "s_per_gb": "s/GB",
    "us_per_request": "µs",
    "ms_per_exec": "ms",
    "_us": "µs",
    "_ms": "ms",
    "_kib": "KiB",
    "percent_of_link": "% of the link",
    "percent_of_a_core": "% of a core",
    "round_trips": "round trips",
    "per_s": "/s",
}

Choice = Callable[[Result, Measured], list[str]]


def _against(
    result: Result, what: str, scenario: str, metric: str, factor: float, choice: Choice, whom: str = "the best peer"
) -> Part:
    """A ratio to the best of some systems: at least `factor` where more is better, at most where less is."""
    more = higher_is_better(metric)
    goal = f"{'≥' if more else '≤'} {factor:g} × {whom}"
    measured = _measured(result, scenario)
    value, unit = median(measured, OURS, metric), _unit(metric)
    if value is None:
        return Part(what, goal, why=_missing(result, scenario, OURS, metric))
    rival = best(measured, choice(result, measured), metric)
    if rival is None:
        return Part(what, goal, value, unit, why=f"{whom}: not measured in {scenario}")
    name, theirs = rival
    ratio = value / theirs if theirs else float("inf")
    met = ratio >= factor if more else ratio <= factor
    beside = ""
    lesser = best(measured, lesser_peers_of(result, measured), metric)
    if choice is _peers and lesser is not None and (lesser[1] > theirs if more else lesser[1] < theirs):
        beside = f"{lesser[0]}, which has no client: {short(lesser[1])} {unit}"
    return Part(what, goal, value, unit, name, theirs, ratio, met, beside=beside)


def _bound(
    result: Result, what: str, scenario: str, metric: str, *, most: float | None = None, least: float | None = None
) -> Part:
    """Compare a figure of arcbridge's with a constant."""
    value, unit = median(_measured(result, scenario), OURS, metric), _unit(metric)
    return _constant(what, value, unit, most, least, _missing(result, scenario, OURS, metric))


def _constant(
    what: str, value: float | None, unit: str, most: float | None, least: float | None, why: str, goal: str = ""
) -> Part:
    if not goal:
        goal = " and ".join(
            f"{sign} {bound:g} {unit}".rstrip() for sign, bound in (("≤", most), ("≥", least)) if bound is not None
        )
    if value is None:
        return Part(what, goal, why=why)
    met = (most is None or value <= most) and (least is None or value >= least)
    return Part(what, goal, value, unit, met=met)


def _study(
    result: Result,
    study: str,
    what: str,
    metric: str,
    *,
    most: float | None = None,
    least: float | None = None,
    goal: str = "",
) -> Part:
    """Compare a study's value with a constant."""
    found = result.get("studies", {}).get(study)
    if found is None:
        left_out = result.get("left_out", {}).get(f"study {study}")
        failed = next((text for text in result.get("failures", ()) if text.startswith(f"study {study}:")), None)
        why = f"left out: {left_out}" if left_out else failed or f"the study {study} was not run"
        return _constant(what, None, _unit(metric), most, least, why.splitlines()[0], goal)
    why = f"the study {study} has no {metric}"
    return _constant(what, found["values"].get(metric), _unit(metric), most, least, why, goal)


def _peers(result: Result, measured: Measured) -> list[str]:
    return peers_of(result, measured)


def _multiplexing(result: Result, measured: Measured) -> list[str]:
    return [name for name in _peers(result, measured) if multiplexes(result, name)]


def _chain(result: Result, measured: Measured) -> list[str]:
    return standing_as(result, measured, "chain")


# -- the goals ------------------------------------------------------------------------------------------------------


def _p1(result: Result) -> list[Part]:
    return [_against(result, way, "bulk", f"{way}_mb_per_s", 1.5, _peers) for way in ("up", "down")]


def _p2(result: Result) -> list[Part]:
    return [_against(result, way, "bulk", f"{way}_mb_per_s", 1.2, _chain, "the chain") for way in ("up", "down")]


def _p3(result: Result) -> list[Part]:
    return [
        _against(result, what, "echo", f"{what}_us", factor, choice, whom)
        for factor, choice, whom in ((0.95, _peers, "the best peer"), (1.4, _chain, "the chain"))
        for what in ("p50", "p99")
    ]


def _p4(result: Result) -> list[Part]:
    scenarios = {"32 streams": "concurrent", "256 streams": "concurrent256"}
    return [_against(result, what, scenario, "per_s", 2, _peers) for what, scenario in scenarios.items()]


def _p5(result: Result) -> list[Part]:
    metrics = {"one after the other": "per_s", "eight at a time": "eight_per_s"}
    return [_against(result, what, "open", metric, 1.5, _peers) for what, metric in metrics.items()]


def _p6(result: Result) -> list[Part]:
    metric = "relay_cpu_s_per_gb"
    return [
        _bound(result, "relay CPU", "bulk", metric, most=0.35),
        _against(result, "relay CPU", "bulk", metric, 0.5, _multiplexing, "the best peer's relay that multiplexes"),
    ]


def _p7(result: Result) -> list[Part]:
    measured = _measured(result, "keystroke")
    p99, idle = median(measured, OURS, "p99_us"), median(measured, OURS, "idle_p99_us")
    goal = "≤ 3 × idle"
    if p99 is None or idle is None:
        missing = _missing(result, "keystroke", OURS, "p99_us" if p99 is None else "idle_p99_us")
        return [Part("echo p99 under bulk", goal, why=missing), Part("echo p99 under bulk", "≤ 10 ms", why=missing)]
    ratio = p99 / idle
    return [
        Part("echo p99 under bulk", goal, p99, "µs", "idle", idle, ratio, ratio <= 3),
        _constant("echo p99 under bulk", p99 / 1000, "ms", 10, None, ""),
    ]


def _p7b(result: Result) -> list[Part]:
    parts = []
    for way, echo, bulk in (
        ("up", "echo_p99_ms", "bulk_percent_of_link"),
        ("down", "down_echo_p99_ms", "down_percent_of_link"),
    ):
        parts += [
            _bound(result, f"echo p99 beside a copy {way}", "last_mile", echo, most=100),
            _bound(result, f"the copy {way}", "last_mile", bulk, least=90),
            _against(result, f"echo p99 beside a copy {way}", "last_mile", echo, 0.25, _peers),
        ]
    return parts


ONE_ROUND_TRIP = 1.1
"""What "after one round trip" is measured as: one, and a tenth of 100 ms for everything that is computed."""


def _p8(result: Result) -> list[Part]:
    names = [name for name in result.get("scenarios", {}) if name.startswith("long_path")] or ["long_path"]
    parts = [_bound(result, name, name, "percent_of_link", least=90) for name in names]
    first = _bound(result, "first byte", names[0], "first_byte_round_trips", most=ONE_ROUND_TRIP)
    return [*parts, first]


def _p9(result: Result) -> list[Part]:
    return [
        _study(result, "scale", "paired sessions", "sessions", least=10_000),
        _study(result, "scale", "agents", "agents", least=5_000),
        _study(result, "scale", "RSS per session", "session_rss_kib", most=20),
        _study(result, "scale", "RSS per agent", "agent_rss_kib", most=60),
        _study(result, "scale", "idle CPU", "idle_percent_of_a_core", most=10),
    ]


def _p10(result: Result) -> list[Part]:
    return [
        _study(result, "kubernetes", "GET, p50 above direct", "get_p50_overhead_ms", most=1),
        _study(result, "kubernetes", "GETs/s, of direct", "get_ratio", least=0.5, goal="≥ 0.5 × direct"),
        _study(result, "kubernetes", "LIST of 10 MB", "list_mb_per_s", least=300),
        _study(result, "kubernetes", "watches", "watches", least=500),
    ]


def _commands(result: Result) -> list[Part]:
    """The short commands of a client and the single file, as far as the result has them."""
    goals = {"whoami_ms": 150, "status_ms": 150, "credential_ms": 40, "single_file_version_ms": 60}
    values = result.get("studies", {}).get("start", {}).get("values", {})
    return [
        _study(result, "start", name.removesuffix("_ms").replace("_", " "), name, most=most)
        for name, most in goals.items()
        if name in values
    ]


def _p11(result: Result) -> list[Part]:
    return [
        _study(result, "start", "arcbridge --version", "version_ms", most=60),
        *_commands(result),
        _study(result, "start", "client ready", "client_ready_ms", most=400),
        _study(result, "start", "session to first byte, loopback", "first_byte_ms", most=15),
        _study(
            result,
            "start",
            "session to first byte, over a path, without its round trips",
            "first_byte_beyond_5_round_trips_ms",
            most=15,
            goal="≤ 15 ms + 5 round trips",
        ),
    ]


FLAT = 1.2
"""The dearest level of P12 over the cheapest."""


def _p12(result: Result) -> list[Part]:
    found = levels(_measured(result, "streams").get(OURS, {}), "cpu_us_per_request")
    goal = f"≤ {FLAT:g} × the cheapest level"
    if len(found) < 2:
        return [Part("CPU per request", goal, why=_missing(result, "streams", OURS, "CPU per request at two levels"))]
    dearest, cheapest = (choose(found, key=lambda level: found[level]) for choose in (max, min))
    ratio = found[dearest] / found[cheapest]
    return [
        Part(
            f"CPU per request at {dearest} streams",
            goal,
            found[dearest],
            "µs",
            f"at {cheapest} streams",
            found[cheapest],
            ratio,
            ratio <= FLAT,
        )
    ]


def levels(metrics: Mapping[str, Any], metric: str) -> dict[int, float]:
    """The medians of `n{N}_{metric}` by N, in order."""
    found = {}
    for name, measured in metrics.items():
        head, _, rest = name.partition("_")
        if rest == metric and head[:1] == "n" and head[1:].isdigit():
            found[int(head[1:])] = float(measured["median"])
    return dict(sorted(found.items()))


def _p13(result: Result) -> list[Part]:
    goal = "≥ 1.6 × one worker where a second core is free"
    values = result.get("studies", {}).get("workers", {}).get("values", {})
    if "held_ratio" not in values:
        return [_study(result, "workers", "two workers over one", "ratio", least=1.6, goal=goal)]
    # No core is free on a machine of two, whose other core has the ends of the sessions: workers are held to a share.
    held = _study(
        result, "workers", "two workers over one, each held to a share of a core", "held_ratio", goal=goal, least=1.6
    )
    return [replace(held, beside=f"not held: {short(values['ratio'])} ×" if "ratio" in values else "")]


def _p14(result: Result) -> list[Part]:
    copies = {f"a copy of {size} MB {way}": f"{way}_{size}mb_mb_per_s" for size in (10, 100) for way in ("up", "down")}
    streams = {f"over {count} streams": f"streams{count}_mb_per_s" for count in (10, 100)}
    return [_against(result, what, "transfer", metric, 1.2, _peers) for what, metric in {**copies, **streams}.items()]


def _p15(result: Result) -> list[Part]:
    return [
        _study(result, "kubernetes", "a GET", "agent_cpu_us_per_request", most=200, goal="≤ 200 µs"),
        _study(result, "kubernetes", "an exec", "agent_cpu_ms_per_exec", most=4),
    ]


_GOALS: tuple[tuple[str, str, Callable[[Result], list[Part]]], ...] = (
    ("P1", "one stream, end-to-end encrypted, against the best of all three-role peers", _p1),
    ("P2", "the same against stunnel → HAProxy → stunnel, which multiplexes nothing", _p2),
    ("P3", "100-byte echo p50 and p99", _p3),
    ("P4", "echoes/s over 32 and over 256 streams", _p4),
    ("P5", "streams opened per second (open, one byte, close)", _p5),
    ("P6", "relay CPU seconds per GB", _p6),
    ("P7", "keystroke echo p99 while the same session moves bulk both ways", _p7),
    ("P7b", "the same over a last mile of 20 Mbit/s with 40 ms round trip and a queue of 4 MiB", _p7b),
    ("P8", "one stream over 100 ms round trip; first kubectl byte on a running client", _p8),
    ("P9", "idle scale: one relay process, 10 000 paired sessions and 5 000 agents", _p9),
    ("P10", "Kubernetes: GET, LIST of 10 MB, 500 watches, through all roles against the API server directly", _p10),
    ("P11", "start: version, client ready, session to first byte", _p11),
    ("P12", "cost as work grows: CPU per request flat within 20 %", _p12),
    ("P13", "--workers 2 against 1: bulk over many sessions", _p13),
    ("P14", "one copy on a fresh stream, each way; bulk over 10 and over 100 streams", _p14),
    ("P15", "CPU time of the agent", _p15),
)

"""The herd's run: relays with all their agents, SIGKILL of one or of all, and how long until all agents are back."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.herd.agents import MAX_AGENTS
from bench.herd.hall import Ends, Hall
from bench.machine import commit, describe
from bench.usage import cpu_seconds

MAX_SECONDS = 120.0
CALM = 5.0
"""Seconds for which the relays are watched before anything goes wrong."""
GOALS = {"one": 20.0, "all": 60.0}
"""Seconds within which all agents are back, by what dies."""
KIB_OF_AN_AGENT, MS_OF_AN_AGENT, IDLE_PERCENT, JOIN_P99 = 48.0, 2.0, 10.0, 1.0
_COUNTERS = ("ListenOverflows", "ListenDrops", "TCPReqQFullDrop", "TCPReqQFullDoCookies")


def kernel_counters() -> dict[str, int]:
    """Return this namespace's TCP counters, such as the connections that a full accept queue cost."""
    lines = Path("/proc/net/netstat").read_text().splitlines()
    names = next(line for line in lines if line.startswith("TcpExt:")).split()
    values = [line for line in lines if line.startswith("TcpExt:")][1].split()
    known = dict(zip(names, values, strict=True))
    return {name: int(known.get(name, 0)) for name in _COUNTERS}


def measure(
    dies: str, agents: int, relays: int, *, wanted: int = 1, seconds: float = MAX_SECONDS, pace: int | None = None
) -> dict[str, Any]:
    """Run once: `dies` is `one` of the relays, which stays away, or `all`, which are started again at once. Raises
    NotReady when the herd does not even come together before that."""
    with tempfile.TemporaryDirectory(prefix="arcbridge-herd-") as name, Hall(Path(name), relays) as hall:
        paced = f"\nagents_per_second = {pace}" if pace else ""
        hall.start(f"sessions = 500\nagents = {agents * wanted + 100}{paced}")
        empty, out = hall.resident(), Path(name) / "joins"
        if dies == "one":
            hall.joins(list(hall.relays)[1:], out)
            hall.idle(1.0)
        else:
            out.touch()
        parts = -(-agents // MAX_AGENTS)
        shares = [agents // parts + (number < agents % parts) for number in range(parts)]
        herds = [hall.agents(share, sum(shares[:number]), wanted) for number, share in enumerate(shares)]
        total = agents * wanted
        hall.wait("the agents", lambda: _up(herds) == total)
        hall.idle(1.0)
        kib = (hall.resident() - empty) / 1024 / total
        idle = 0.0 if dies == "one" else hall.idle(CALM) / relays  # joins are no idling
        calm = time.monotonic()
        hall.idle(CALM if dies == "one" else 0.0)
        result = _fall_and_rise(hall, herds, dies, total, min(seconds, MAX_SECONDS))
        joins = [json.loads(line) for line in out.read_text().splitlines() if line.endswith("}")]
    killed, over = result.pop("killed_at"), result.pop("over_at")
    before = [one for one in joins if calm <= one["at"] < killed]
    meanwhile = [one for one in joins if killed <= one["at"] < over]
    goals = {
        f"all_back_within_{GOALS[dies]:.0f}_s": result["back_after_kill_s"].get("100", MAX_SECONDS) <= GOALS[dies],
        "no_listen_overflow": result["kernel"]["ListenOverflows"] == 0,
    }
    if dies == "one":
        refused = [one["refused"] for one in meanwhile if one["refused"]]
        result["joins"] = {"before": _times(before), "meanwhile": _times(meanwhile), "refused": refused[:20]}
        goals |= {"no_join_refused": not refused, "join_p99_within_1_s": _times(meanwhile)["p99_s"] <= JOIN_P99}
    else:
        goals |= {
            "kib_of_an_agent": kib <= KIB_OF_AN_AGENT,
            "idle_share": idle <= IDLE_PERCENT,
            "cpu_ms_of_an_agent": result["relay_cpu_ms_per_agent"] <= MS_OF_AN_AGENT,
        }
    return {
        "commit": commit(),
        "machine": describe(),
        "dies": dies,
        "agents": agents,
        "relays": relays,
        "connections_of_an_agent": wanted,
        "agents_per_second": pace or "default",
        "kib_of_a_connection": round(kib, 1),
        "idle_percent_of_a_core_each_relay": round(idle, 2),
        **result,
        "goals": goals,
    }


def _up(herds: list[Ends]) -> int:
    return sum(herd.last.get("up", 0) for herd in herds)


def _rise(herds: list[Ends], before: list[dict[str, Any]], name: str) -> float:
    return sum(float(herd.last[name] - first[name]) for herd, first in zip(herds, before, strict=True))


def _fall_and_rise(hall: Hall, herds: list[Ends], dies: str, total: int, seconds: float) -> dict[str, Any]:
    kernel, before = kernel_counters(), [dict(herd.last) for herd in herds]
    killed_at = time.monotonic()
    dead = list(hall.relays) if dies == "all" else [0]
    for index in dead:
        hall.world.kill_relay(index)
    if dies == "all":
        with ThreadPoolExecutor(len(dead)) as threads:
            list(threads.map(hall.start_relay, dead))
    ready_at = time.monotonic()
    living = [index for index in hall.relays if dies == "all" or index not in dead]
    pids = hall.pids(*living)
    started = cpu_seconds(pids)
    timeline: list[tuple[float, int, float]] = []
    while time.monotonic() - killed_at < seconds:
        hall.told()
        at = max(herd.last["at"] for herd in herds) - killed_at
        timeline.append((round(at, 2), _up(herds), round(cpu_seconds(pids) - started, 2)))
        if _up(herds) == total and min(up for _, up, _ in timeline) < total:
            break
    over_at = time.monotonic()
    lowest = min(timeline, key=lambda row: row[1])
    lost = total if dies == "all" else total - lowest[1]
    back: dict[str, float] = {}
    for part in (50, 90, 99, 100):
        least = total - lost * (100 - part) / 100
        when = next((at for at, up, _ in timeline if at >= lowest[0] and up >= least), None)
        back |= {} if when is None else {f"{part}": when}
    cpu, took = timeline[-1][2], over_at - ready_at
    ended: Counter[str] = Counter()
    pairs = list(zip(herds, before, strict=True))
    for herd, first in pairs:
        ended += Counter(herd.last["ended"]) - Counter(first["ended"])
    turned_away: Counter[str] = Counter()
    for index in living:
        for name in ("agents_paced_total", "connections_rejected_total", "connections_evicted_total"):
            turned_away.update(hall.sample(index, name))
    after = kernel_counters()
    return {
        "killed_at": killed_at,
        "over_at": over_at,
        "lost": lost,
        "killed_to_ready_s": round(ready_at - killed_at, 2),
        "back_after_kill_s": back,
        "turned_away": dict(turned_away),
        "attempts": _rise(herds, before, "attempts"),
        "attempts_ended": dict(ended),
        "kernel": {name: after[name] - kernel[name] for name in _COUNTERS},
        "relay_cpu_s": cpu,
        "relay_cpu_share_each": round(cpu / took / len(living), 2),
        "relay_cpu_ms_per_agent": round(1000 * cpu / max(lost, 1), 2),
        "herd_cpu_share": round(max(_rise([herd], [first], "cpu") for herd, first in pairs) / took, 2),
        "timeline": timeline,
    }


def _times(joins: list[dict[str, Any]]) -> dict[str, float]:
    times = sorted(one["s"] for one in joins if not one["refused"])
    if not times:
        return {"joins": len(joins), "p50_s": 0.0, "p99_s": float(bool(joins)) * MAX_SECONDS, "longest_s": 0.0}
    p50, p99 = (times[min(int(len(times) * part), len(times) - 1)] for part in (0.5, 0.99))
    return {"joins": len(joins), "p50_s": p50, "p99_s": p99, "longest_s": times[-1]}

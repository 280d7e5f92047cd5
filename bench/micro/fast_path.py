"""CPU of the agent per GET and GETs per second: its fast path, its general path, and a session that may only read.

    python -m bench.micro.fast_path [--rounds 7] [--seconds 3] [--output FILE]

A real kube-apiserver, the three roles as shipped, and vegeta with 8 connections in a closed loop. Both paths are of
the same processes: a request with `TE: trailers`, which a proxy must drop (RFC 9110 §7.6.1), is carried by the general
path and is else the same request. `read_only` is the fast path by a second client of the same user, whose session is
restricted. They take turns, in the other order each time.

What is saved is the share of the general path's CPU that the fast path does without; what a restriction costs is a
share of the fast path's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import machine
from bench.load.generator import LoadFailed
from bench.peers.go.build import programs
from bench.studies.kubernetes import MODULE, OBJECT, Way, _private, _run, _Setting, _setting, _way_of_kubeconfig
from bench.usage import cpu_seconds
from tests.support.world import ALICE

WORKERS = 8
WARM_UP = 1.0
READ_ONLY = "read_only"
PATHS: dict[str, tuple[str, ...]] = {"fast": (), "general": ("-header=TE: trailers",), READ_ONLY: ()}


def measure(setting: _Setting, tools: Path, directory: Path, path: str, seconds: float) -> dict[str, float]:
    """One interval of GETs on one path."""
    way: Way = setting.ways[1]
    results = directory / "vegeta.bin"
    command: list[str | os.PathLike[str]] = [tools / "vegeta", "attack", "-rate=0", f"-workers={WORKERS}"]
    command += [f"-max-workers={WORKERS}", f"-connections={WORKERS}", "-http2=false", f"-duration={seconds}s"]
    command += [f"-output={results}", *PATHS[path], *way.flags]
    before = {role: cpu_seconds([pid]) for role, pid in setting.pids.items()}
    _run(command, seconds, f"GET {way.server}{OBJECT}\n")
    spent = {role: cpu_seconds([pid]) - before[role] for role, pid in setting.pids.items()}
    said = json.loads(_run([tools / "vegeta", "report", "-type=json", results], 0))
    count = said["requests"]
    if said["status_codes"] != {"200": count} or said["errors"]:
        raise LoadFailed(f"GET, {path} path: {said['status_codes']} {said['errors'][:3]}")
    cpu = {f"{role}_cpu_us_per_get": spent[role] / count * 1e6 for role in ("client", "relay", "agent", "apiserver")}
    return {"get_per_s": said["throughput"], "get_p50_us": said["latencies"]["50th"] / 1000, **cpu}


def run(rounds: int, seconds: float) -> dict[str, Any]:
    """All rounds; the result as it is kept."""
    tools = programs(MODULE, ("vegeta",), packages=("tool",))
    found: dict[str, list[dict[str, float]]] = {path: [] for path in PATHS}
    with tempfile.TemporaryDirectory() as place, _setting(Path(place)) as setting:
        settings = dict.fromkeys(PATHS, setting) | {READ_ONLY: _restricted(setting, Path(place))}
        for path in PATHS:
            measure(settings[path], tools, Path(place), path, WARM_UP)
        for number in range(rounds):
            for path in list(PATHS)[:: 1 if number % 2 == 0 else -1]:
                found[path].append(measure(settings[path], tools, Path(place), path, seconds))
            print({path: round(runs[-1]["agent_cpu_us_per_get"], 1) for path, runs in found.items()}, file=sys.stderr)
    medians = {
        path: {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
        for path, runs in found.items()
    }
    general, fast, read_only = (medians[path]["agent_cpu_us_per_get"] for path in ("general", "fast", READ_ONLY))
    return {
        "command": f"python -m bench.micro.fast_path --rounds {rounds} --seconds {seconds:g}",
        "commit": machine.commit(),
        "machine": machine.describe(),
        "medians": medians,
        "agent_cpu_saved": round(1 - fast / general, 3),
        "agent_cpu_of_read_only": round(read_only / fast - 1, 3),
        "runs": found,
    }


def _restricted(setting: _Setting, directory: Path) -> _Setting:
    """Return the setting as seen by a second client of the same user, whose session may only read."""
    client = setting.world.start_client(ALICE, "--read-only")
    through = _way_of_kubeconfig(client.kubeconfig, _private(directory / READ_ONLY))
    return _Setting(
        setting.cluster, setting.world, through, setting.ways[0], {**setting.pids, "client": client.process.pid}
    )


def main() -> None:
    """Measure, and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = json.dumps(run(options.rounds, options.seconds), indent=1)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()

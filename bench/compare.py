"""`python -m bench.compare before=PATH after=PATH`: arcbridge of several checkouts, in turns: what does a change do?

Each checkout is measured with its own code, in processes of its own, A B, then B A, …; the figures of all rounds go to
`--out`. CPU time is of the three roles together. Only the checkouts' difference counts, not the figures themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.machine import describe

LOADS = ("up", "down", "echo", "echo32", "conc", "open", "keystroke", "transfer", "first", "last_mile", "get", "exec")
"""`conc`: echoes over 256 connections, as `echo32` has them over 32; `first`: one copy of 10 MB as the first stream of
its session, each way; `last_mile` goes over its own path; `get`: GETs at a real kube-apiserver on both paths of the
agent, with the CPU of each role, as `bench.micro.fast_path`; `exec`: commands in a pod there by kubectl, one after the
other, as the study `kubernetes` runs them."""

EXECS = 30
"""Commands of a measurement."""

_MEASURE = """
import json, sys, tempfile, time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from bench import peers, scenarios
from bench.load.generator import Generator
from bench.path.link import Link
from bench.scenarios import Effort
from bench.usage import cpu_seconds

loads, seconds = sys.argv[1].split(","), float(sys.argv[2])
load, found = Generator(), {}
# A role that ends may still write.
scratch = partial(tempfile.TemporaryDirectory, ignore_cleanup_errors=True)

@contextmanager
def started(path=None):
    peer = peers.PEERS["arcbridge"]()
    with ExitStack() as stack, scratch() as directory, load.target() as target:
        stack.callback(peer.stop)
        if path is not None:
            peer.through = lambda address: stack.enter_context(Link(path, address)).address
        peer.start(target.address, Path(directory))
        yield peer

def scenario(name, peer):
    metrics = scenarios.SCENARIOS[name]().measure(load, peer, Effort(seconds, 0.3))
    found.update({f"{name}_{metric}": value for metric, value in metrics.items()})

if "first" in loads:
    for way in ("up", "down"):
        with started() as peer:
            copy = load.run(way, peer.endpoint, seconds=10, warmup=0, bytes=10_000_000)
            found[f"first_{way}_10mb_mb_per_s"] = copy["mb_per_s"]
if "last_mile" in loads:
    with started(scenarios.SCENARIOS["last_mile"].path) as peer:
        scenario("last_mile", peer)
if "get" in loads:
    from bench.micro import fast_path
    from bench.peers.go.build import programs
    from bench.studies.kubernetes import MODULE, _setting
    tools = programs(MODULE, ("vegeta",), packages=("tool",))
    with scratch() as directory, _setting(Path(directory)) as setting:
        for name in ('fast', 'general'):
            fast_path.measure(setting, tools, Path(directory), name, fast_path.WARM_UP)
        for name in ('fast', 'general'):
            metrics = fast_path.measure(setting, tools, Path(directory), name, seconds)
            found.update({f"get_{name}_{metric}": value for metric, value in metrics.items()})
if "exec" in loads:
    from bench.studies import kubernetes
    with scratch() as directory, kubernetes._setting(Path(directory)) as setting:
        study = kubernetes._Bench(setting, Path(directory), Path(directory))
        through = setting.ways[1]
        study.exec(through, count=3)
        found.update(study.exec(through, count=int(sys.argv[3])))
rest = [name for name in loads if name not in ("first", "last_mile", "get", "exec")]
if rest:
    with started() as peer:
        for name in rest:
            if name in ("keystroke", "transfer"):
                scenario(name, peer)
                continue
            many = {"echo32": 32, "conc": 256}.get(name)
            options = {"connections": many} if many else {"count": 50_000} if name == "open" else {}
            before = cpu_seconds(peer.pids())
            command = "many" if many else name
            result = load.run(command, peer.endpoint, seconds=seconds, warmup=0.4, **options)
            cpu = cpu_seconds(peer.pids()) - before
            if "mb_per_s" in result:
                found[f"{name}_mb_per_s"] = result["mb_per_s"]
                found[f"{name}_cpu_s_per_gb"] = cpu / (result["total_bytes"] / 1e9)
            else:
                found[f"{name}_per_s"] = result["per_s"]
                found[f"{name}_p50_us"] = result["p50_us"]
                found[f"{name}_cpu_us"] = 1e6 * cpu / (result["per_s"] * (seconds + 0.4))
print(json.dumps(found))
"""


def main(argv: list[str]) -> int:
    """Measure the checkouts and print the medians."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description="Compare checkouts of arcbridge.")
    parser.add_argument("checkouts", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--loads", default="up,down", help=f"of {', '.join(LOADS)} (default: up,down)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--out", type=Path, help="where the figures of all rounds go, JSON")
    args = parser.parse_args(argv)
    checkouts = {}
    for one in args.checkouts:
        name, _, path = one.partition("=")
        if not (name and path) or not (Path(path) / "arcbridge").is_dir():
            parser.error(f"{one!r} is not NAME=PATH with the path of a checkout of arcbridge")
        checkouts[name] = path
    if unknown := set(args.loads.split(",")) - set(LOADS):
        parser.error(f"no load is called {', '.join(sorted(unknown))}; there are: {', '.join(LOADS)}")
    machine = describe()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    names = list(checkouts)
    for number in range(args.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            runs[name].append(_measure(Path(checkouts[name]), args.loads, args.seconds))
            print(f"round {number + 1}/{args.rounds}  {name}  {runs[name][-1]}", file=sys.stderr, flush=True)
    medians = {
        name: {metric: round(statistics.median(run[metric] for run in found), 3) for metric in found[0]}
        for name, found in runs.items()
    }
    if args.out is not None:
        result: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "bench.compare", *(f"{name}=…" for name in names)]),
            "loads": args.loads,
            "rounds": args.rounds,
            "seconds_per_measurement": args.seconds,
            "checkouts": {name: _state(Path(path)) for name, path in checkouts.items()},
            "machine": machine,
            "medians": medians,
            "runs": runs,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in medians.items():
        print(name, "  ".join(f"{metric} {value:g}" for metric, value in found.items()))
    return 0


def _measure(checkout: Path, loads: str, seconds: float) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, loads, str(seconds), str(EXECS)],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _state(checkout: Path) -> dict[str, str]:
    """Return the commit and the changes that are not committed."""
    told = {}
    for key, words in (("commit", ("rev-parse", "HEAD")), ("changes", ("diff", "-U0", "--", "arcbridge"))):
        run = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False)
        told[key] = run.stdout.strip()
    return told


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

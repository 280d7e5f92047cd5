"""How long an eviction, a drain, `helm upgrade --wait` and a rollback of the agent take, alone and under people.

    python -m bench.studies.rollouts DIRECTORY OUT [ROUNDS]

Helm, Kubernetes' own controllers and scheduler decide, and the node of the tests runs three agents on three nodes. Both
kinds of workload; without and with sessions by turns (`logs -f`, `exec`, port-forward and a copy), so that noise falls
on both. OUT is JSON: seconds of each step.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from tests.e2e.test_daemonset import MINUTES, NAMESPACE, RELEASE, Place
from tests.e2e.test_rollouts import MIB, People, cluster, ending, evict, ready, write_slow_tar
from tests.support.reports import until

KINDS = ("DaemonSet", "Deployment")
AGENTS = 3


def steps(here: Place, kind: str) -> Iterator[tuple[str, float]]:
    """Drain a node, evict its pod, upgrade to pods of another template, and roll back: the seconds of each, by name.

    A Deployment's drain waits for sessions (decision 0037) and is left out.
    """
    before = ready(here)
    pod = next(pod for pod in here.pods() if pod["metadata"]["name"] in before)
    if kind == "DaemonSet":
        node = pod["spec"]["nodeName"]
        began = time.monotonic()
        here.cluster.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data")
        yield "drain", time.monotonic() - began
        here.cluster.kubectl("uncordon", node)
    began = time.monotonic()
    evict(here, pod["metadata"]["name"])
    until(lambda: bool(ready(here) - before), "another pod is ready", timeout=120)
    yield "eviction", time.monotonic() - began
    began = time.monotonic()
    here.helm_does("upgrade", logLevel="warning")
    yield "upgrade", time.monotonic() - began
    began = time.monotonic()
    here.helm.run("rollback", RELEASE, "--namespace", NAMESPACE, "--wait", MINUTES, timeout=320)
    yield "rollback", time.monotonic() - began


def measure(directory: Path, kind: str, rounds: int) -> dict[str, Any]:
    """Return the seconds of each step with a kind of workload, without and with sessions."""
    seconds: dict[str, dict[str, list[float]]] = {"without": {}, "with": {}}
    with cluster(directory, kind, AGENTS) as here:
        for number in range(rounds):
            for way, of in seconds.items():
                with ExitStack() as stack:
                    if way == "with":
                        (directory / "hurry").unlink(missing_ok=True)
                        people = stack.enter_context(closing(People(here, directory / f"people-{number}", 64 * MIB)))
                    for step, took in steps(here, kind):
                        of.setdefault(step, []).append(round(took, 2))
                    if way == "with":
                        people.wait_moves()
                        people.check()
                until(lambda: not ending(here), "the old pods end with their sessions", timeout=120)
            print(kind, number, {w: {s: t[-1] for s, t in of.items()} for w, of in seconds.items()}, file=sys.stderr)
    median = {way: {step: statistics.median(took) for step, took in of.items()} for way, of in seconds.items()}
    return {**seconds, "median": median}


def main(argv: list[str]) -> int:
    """Run; the exit code."""
    directory, out, rounds = Path(argv[0]), Path(argv[1]), int(argv[2]) if len(argv) > 2 else 5
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "command": f"python -m bench.studies.rollouts DIRECTORY OUT {rounds}",
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "agents": AGENTS,
    }
    for kind in KINDS:
        (directory / kind).mkdir(parents=True)
        os.environ["PATH"] = f"{write_slow_tar(directory / kind)}:{os.environ['PATH']}"
        found[kind] = measure(directory / kind, kind, rounds)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

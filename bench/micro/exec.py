"""CPU of each role per `kubectl exec`, and where the agent's goes.

    python -m bench.micro.exec [--rounds 5] [--count 20] [--output FILE]

A real kube-apiserver, its node, and the three roles as shipped; `kubectl exec POD -- true`, one after the other. Each
runs a few GETs and one upgrade over WebSocket.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import machine
from bench.studies.kubernetes import _Setting, _setting
from bench.usage import cpu_seconds

POD = "bench"


def measure(setting: _Setting, kubeconfig: Path, count: int) -> dict[str, float]:
    """CPU microseconds per exec, by role."""
    kubectl = setting.cluster.kubectl_for(kubeconfig=kubeconfig)
    before = {role: cpu_seconds([pid]) for role, pid in setting.pids.items()}
    for _ in range(count):
        kubectl.run("exec", POD, "--", "true")
    spent = {role: cpu_seconds([pid]) - before[role] for role, pid in setting.pids.items()}
    return {f"{role}_cpu_us_per_exec": spent[role] / count * 1e6 for role in ("client", "relay", "agent")}


def run(rounds: int, count: int) -> dict[str, Any]:
    """All rounds; the result as it is kept."""
    with tempfile.TemporaryDirectory() as place, _setting(Path(place)) as setting:
        setting.cluster.add_pod(POD)
        (kubeconfig,) = setting.world.directory.glob("client-1-*/kubeconfig")
        measure(setting, kubeconfig, 3)
        requests = len(setting.world.audit_records())
        runs = []
        for _ in range(rounds):
            runs.append(measure(setting, kubeconfig, count))
            print({name: round(value) for name, value in runs[-1].items()}, file=sys.stderr)
        requests = len(setting.world.audit_records()) - requests
    return {
        "command": f"python -m bench.micro.exec --rounds {rounds} --count {count}",
        "commit": machine.commit(),
        "machine": machine.describe(),
        "requests_per_exec": requests / rounds / count,
        "medians": {name: round(statistics.median(run[name] for run in runs)) for name in runs[0]},
        "runs": runs,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Measures, and prints or writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = json.dumps(run(options.rounds, options.count), indent=1)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""How long `helm upgrade --wait` of the agent's chart takes with nobody there, and with people at work at each agent.

    python -m bench.studies.rollouts DIRECTORY OUT [ROUNDS]

Helm, Kubernetes' own controllers and scheduler decide, and the node of the tests runs three agents on three nodes. Both
kinds of workload; without and with sessions by turns (`logs -f`, `exec`, port-forward and a copy), so that noise falls
on both. OUT is JSON: seconds of each upgrade.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.e2e.test_daemonset import Place
from tests.e2e.test_rollouts import MIB, People, cluster, ending, write_slow_tar
from tests.support.reports import until

KINDS = ("DaemonSet", "Deployment")
AGENTS = 3


def upgrade(here: Place, number: int) -> float:
    """Upgrade to pods of another template, and return the seconds that Helm took."""
    began = time.monotonic()
    here.helm_does("upgrade", logLevel="info" if number % 2 else "warning")
    return time.monotonic() - began


def measure(directory: Path, kind: str, rounds: int) -> dict[str, Any]:
    """Return the seconds of each upgrade of a kind of workload, without and with sessions."""
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    with cluster(directory, kind, AGENTS) as here:
        for number in range(rounds):
            seconds["without"].append(upgrade(here, 2 * number))
            until(lambda: not ending(here), "the old pods end, with nobody there", timeout=120)
            (directory / "hurry").unlink(missing_ok=True)
            with closing(People(here, directory / f"people-{number}", 16 * MIB)) as people:
                seconds["with"].append(upgrade(here, 2 * number + 1))
                people.check()
            until(lambda: not ending(here), "the old pods end with their sessions", timeout=120)
            print(kind, number, {way: round(of[-1], 1) for way, of in seconds.items()}, file=sys.stderr)
    return {way: [round(one, 2) for one in of] for way, of in seconds.items()} | {
        "median": {way: round(statistics.median(of), 2) for way, of in seconds.items()}
    }


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

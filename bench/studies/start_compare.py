"""`python -m bench.studies.start_compare before=PATH after=PATH`: how long clients of several checkouts take to start.

One relay and one agent, of this checkout, serve the clients of all of them, which start in turns, each with a home of
its own that has been used. Each is started from byte code, as it is installed, and with the byte code of its libraries
alone, as from a checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from bench.machine import describe
from bench.studies.start import compiled, start_client
from tests.support.world import ApiServer, World, fixed_port


def main(argv: list[str]) -> int:
    """Measure; the medians go to stdout."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.start_compare", description=__doc__)
    parser.add_argument("checkouts", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="where the figures of all rounds go, JSON")
    args = parser.parse_args(argv)
    checkouts = {name: Path(path).resolve() for name, _, path in (one.partition("=") for one in args.checkouts)}
    machine = describe()
    with tempfile.TemporaryDirectory() as directory:
        runs = measure(checkouts, args.rounds, Path(directory))
    medians = {
        name: {metric: round(statistics.median(run[metric] for run in found), 1) for metric in found[0]}
        for name, found in runs.items()
    }
    if args.out is not None:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(
                ["python", "-m", "bench.studies.start_compare", *(f"{name}=…" for name in checkouts)]
            ),
            "rounds": args.rounds,
            "checkouts": {name: _commit(path) for name, path in checkouts.items()},
            "machine": machine,
            "medians": medians,
            "runs": runs,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in medians.items():
        print(name, "  ".join(f"{metric} {value:g}" for metric, value in found.items()))
    return 0


def measure(checkouts: dict[str, Path], rounds: int, directory: Path) -> dict[str, list[dict[str, float]]]:
    """Every start's milliseconds by "checkout, byte code" and "checkout, sources"; the first round is not counted."""
    runs: dict[str, list[dict[str, float]]] = {}
    # No API server is needed: that the agent cannot reach one is an answer, too, and has come the whole way.
    credential = directory / "agent-token"
    credential.write_text("of-no-use")
    world = World(ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=credential), directory=directory / "world")
    try:
        world.start()
        for number in range(rounds + 1):
            for name, path in list(checkouts.items())[:: -1 if number % 2 else 1]:
                for kind in ("byte code", "sources"):
                    own = directory / f"{name}-{kind.replace(' ', '-')}"
                    environment = (
                        compiled(own) if kind == "byte code" else {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
                    )
                    found = start_client(world, own / "home", {**environment, "PYTHONPATH": str(path)})
                    if number:
                        runs.setdefault(f"{name}, {kind}", []).append({k: round(v, 1) for k, v in found.items()})
    finally:
        world.stop()
    return runs


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

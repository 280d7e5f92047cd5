"""`python -m bench.virtual [--agents 100000] [--seed 1] [--out FILE]`: an hour of agents under one virtual clock."""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bench.machine import commit, describe
from bench.virtual.plan import Size
from bench.virtual.run import simulate


def main(argv: list[str]) -> int:
    """Run one seed, or several; print the results; return 1 where something was seen that may not be."""
    parser = argparse.ArgumentParser(prog="python -m bench.virtual", description=__doc__)
    parser.add_argument("--agents", type=int, default=100_000, help="how many (100000)")
    parser.add_argument("--seed", type=int, default=1, help="the first seed (1)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds from there on (1)")
    parser.add_argument("--outages", type=int, default=8, help="outages at most (8)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long, in virtual seconds (3600)")
    parser.add_argument("--keep", type=Path, help="a folder that gets a file for each seed that fails")
    parser.add_argument("--out", type=Path, help="where the results go")
    args = parser.parse_args(argv)
    size = Size(
        agents=args.agents,
        users=max(args.agents // 100, 50),
        outages=args.outages,
        per_cluster=max(args.agents // 4000, 10),
        seconds=args.seconds,
    )
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        begun, cpu = time.monotonic(), time.process_time()
        result = simulate(size, seed, lambda text: print(text, file=sys.stderr))
        result["seconds"], result["cpu_s"] = round(time.monotonic() - begun), round(time.process_time() - cpu)
        result["resident_mb_at_most"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
        print(json.dumps(result, indent=1))
        runs.append(result)
        if result["violations"] and args.keep is not None:
            kept = {"size": asdict(size), "seed": seed, "found": result["violations"]}
            (args.keep / f"{args.agents}-{seed}.json").write_text(json.dumps(kept, indent=1) + "\n")
    if args.out is not None:
        command = shlex.join(["python", "-m", "bench.virtual", *argv])
        document = {"commit": commit(), "machine": describe(), "command": command, "runs": runs}
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    return int(any(result["violations"] for result in runs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m bench.herd one|all [--agents 10000] [--out FILE]`: relays die with their agents; when are these back?

It runs in a network namespace of its own where that can be had, so that the kernel's counters are this run's alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

_CLONE_NEWNET = 0x40000000


def own_namespace() -> bool:
    """Move this process, and what it will start, into a network namespace with loopback only; whether that worked."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        return False
    return subprocess.run(["ip", "link", "set", "lo", "up"], check=False).returncode == 0


def main(argv: list[str]) -> int:
    """Run the herd, print its result without the timeline, write all of it with `--out`; return 1 for a missed goal."""
    parser = argparse.ArgumentParser(prog="python -m bench.herd", description=__doc__)
    parser.add_argument("dies", choices=("one", "all"), help="what is killed: one of the relays, or all of them")
    parser.add_argument("--agents", type=int, default=10_000, help="how many (10000)")
    parser.add_argument("--relays", type=int, default=3, help="how many (3)")
    parser.add_argument("--wanted", type=int, default=1, help="control connections of each agent (1)")
    parser.add_argument("--seconds", type=float, default=120.0, help="at most (120)")
    parser.add_argument("--agents-per-second", type=int, help="the relays' setting, if not its default")
    parser.add_argument("--out", type=Path, help="where the result goes")
    args = parser.parse_args(argv)
    alone = own_namespace()
    from bench.herd.run import measure  # it begins a thread, which stays in the namespace in which it began

    result: dict[str, Any] = {"own_network_namespace": alone}
    result |= measure(
        args.dies, args.agents, args.relays, wanted=args.wanted, seconds=args.seconds, pace=args.agents_per_second
    )
    result["command"] = shlex.join(["python", "-m", "bench.herd", *argv])
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "timeline"}, indent=1))
    return 0 if all(result["goals"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

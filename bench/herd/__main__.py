"""`python -m bench.herd [--agents 5000] [--out FILE]`: a relay dies with all its agents; when are they back?"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from bench.herd.agents import MAX_AGENTS
from bench.herd.run import MAX_SECONDS, measure


def main(argv: list[str]) -> int:
    """Run the herd, print its result without the timeline, write all of it with `--out`; return 1 for a missed goal."""
    parser = argparse.ArgumentParser(prog="python -m bench.herd", description=__doc__)
    parser.add_argument("--agents", type=int, default=MAX_AGENTS, help=f"how many, at most {MAX_AGENTS} (the default)")
    parser.add_argument("--seconds", type=float, default=MAX_SECONDS, help=f"at most {MAX_SECONDS:.0f} (the default)")
    parser.add_argument("--agents-per-second", type=int, help="the relay's setting, if not its default")
    parser.add_argument("--restart-after", type=float, default=0.0, help="seconds that the relay stays away (0)")
    parser.add_argument("--out", type=Path, help="where the result goes")
    args = parser.parse_args(argv)
    result = measure(args.agents, args.seconds, args.agents_per_second, min(args.restart_after, 30.0))
    result["command"] = shlex.join(["python", "-m", "bench.herd", *argv])
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "timeline"}, indent=1))
    return 0 if all(result["goals"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

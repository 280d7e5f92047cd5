"""`python -m bench [--quick | --full]` runs the benchmark; `python -m bench report FILE.json` reports on a result."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

from bench import peers, scenarios
from bench.load.build import NoCompiler
from bench.report import OURS, report, resumption
from bench.run import Plan, run
from bench.scenarios import Effort

LOCAL_RESULTS = Path(__file__).parent / "results" / "local"


def main(argv: list[str]) -> int:
    """Run; the exit code. The path of the result is the last line printed."""
    if argv[:1] == ["report"]:
        return _report(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure arcbridge beside its peers.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="the short list, under two minutes")
    length.add_argument("--full", action="store_true", help="every system and scenario (the default)")
    parser.add_argument("--peers", default="", metavar="A,B", help=f"of {', '.join(peers.PEERS)}")
    parser.add_argument("--scenarios", default="", metavar="A,B", help=f"of {', '.join(scenarios.SCENARIOS)}")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (quick: 4, full: 7)")
    parser.add_argument("--seconds", type=float, help="seconds per measurement (quick: 1, full: 5)")
    parser.add_argument("--out", type=Path, help="where the result goes (default: bench/results/local/, not committed)")
    args = parser.parse_args(argv)
    chosen = _choose(parser, "peer", args.peers, peers.PEERS, peers.QUICK if args.quick else tuple(peers.PEERS))
    wanted = _choose(
        parser,
        "scenario",
        args.scenarios,
        scenarios.SCENARIOS,
        scenarios.QUICK if args.quick else tuple(scenarios.SCENARIOS),
    )
    seconds = args.seconds or (1.0 if args.quick else 5.0)
    plan = Plan(
        peers=tuple(peers.PEERS[name]() for name in chosen),
        scenarios=tuple(scenarios.SCENARIOS[name]() for name in wanted),
        rounds=args.rounds or (4 if args.quick else 7),
        effort=Effort(seconds, min(0.3, seconds / 3)),
        command=shlex.join(["python", "-m", "bench", *argv]),
    )
    try:
        result = run(plan)
    except NoCompiler as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    out = args.out or LOCAL_RESULTS / f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(report(result))
    if costs := resumption(result):
        print(costs)
    print(out)
    # A benchmark is not a test: slow is no failure. Nothing measured, bytes that were wrong, or arcbridge itself
    # missing, is one.
    failed = (
        result["failures"]
        or {OURS, peers.WITHOUT_RESUMPTION} & result["left_out"].keys()
        or not any(result["scenarios"].values())
    )
    return 1 if failed else 0


def _choose(
    parser: argparse.ArgumentParser, kind: str, given: str, known: dict[str, type], default: tuple[str, ...]
) -> tuple[str, ...]:
    names = tuple(name.strip() for name in given.split(",") if name.strip()) or default
    for name in names:
        if name not in known:
            parser.error(f"no {kind} is called {name!r}; there are: {', '.join(known)}")
    return names


def _report(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description="Make a report (Markdown) of a result.")
    parser.add_argument("file", type=Path)
    args = parser.parse_args(argv)
    try:
        result = json.loads(args.file.read_text())
    except (OSError, ValueError) as error:
        print(f"bench: cannot read {args.file}: {error}", file=sys.stderr)
        return 2
    print(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

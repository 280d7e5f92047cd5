"""`python -m bench [--quick | --full]` runs the benchmark; `python -m bench report FILE.json` reports on a result."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from bench import peers, scenarios, studies
from bench.goals import goals
from bench.load.build import NoCompiler
from bench.merge import Unlike, merged
from bench.report import goal_lines, report, resumption, write
from bench.result import OURS
from bench.run import Plan, run
from bench.scenarios import Effort

LOCAL_RESULTS = Path(__file__).parent / "results" / "local"

INTERRUPTED = 130

Part = TypeVar("Part")


def main(argv: list[str]) -> int:
    """Run the benchmark and return the exit code. The path of the result is the last line printed."""
    if argv[:1] == ["report"]:
        return _report(argv[1:])
    if argv[:1] == ["merge"]:
        return _merge(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure arcbridge beside its peers. `python -m bench report FILE.json` reports on a result.",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="the short list, under two minutes")
    length.add_argument("--full", action="store_true", help="every peer, scenario and study (the default)")
    parser.add_argument("--peers", default="", metavar="A,B", help=f"of {', '.join(peers.PEERS)}")
    parser.add_argument("--scenarios", default="", metavar="A,B", help=f"of {', '.join(scenarios.SCENARIOS)}, or none")
    parser.add_argument("--studies", default="", metavar="A,B", help=f"of {', '.join(studies.STUDIES)}, or none")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (quick: 4, full: 5 or what a scenario says)")
    parser.add_argument(
        "--seconds", type=float, help="seconds per measurement (quick: 0.8, full: 1.5 or what a scenario says)"
    )
    parser.add_argument("--out", type=Path, help="where the result goes (default: bench/results/local/, not committed)")
    args = parser.parse_args(argv)
    quick: bool = args.quick
    chosen = _choose(parser, "peer", args.peers, peers.PEERS, peers.QUICK if quick else tuple(peers.PEERS))
    wanted = _choose(
        *(parser, "scenario", args.scenarios, scenarios.SCENARIOS),
        scenarios.QUICK if quick else tuple(scenarios.SCENARIOS),
    )
    # A run that names scenarios asks a question that studies do not answer.
    asked = () if args.scenarios else studies.QUICK if quick else tuple(studies.STUDIES)
    asked = _choose(parser, "study", args.studies, studies.STUDIES, asked)
    seconds = args.seconds or (0.8 if quick else 1.5)
    out: Path = args.out or LOCAL_RESULTS / f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}.json"
    plan = Plan(
        peers=tuple(peers.PEERS[name]() for name in chosen),
        scenarios=tuple(scenarios.SCENARIOS[name]() for name in wanted),
        studies=tuple(studies.STUDIES[name]() for name in asked),
        rounds=args.rounds or (4 if quick else 5),
        effort=Effort(seconds, min(0.3, seconds / 3)),
        command=shlex.join(["python", "-m", "bench", *_without_folder(argv, out)]),
        own_rounds=not quick and args.rounds is None,
        own_seconds=not quick and args.seconds is None,
        save=lambda result: _save(result, out),
    )
    try:
        with _interruptible():
            result = run(plan)
            _save(result, out)
    except NoCompiler as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(report(result))
    if costs := resumption(result):
        print(costs)
    _tell_what_is_missing(result)
    print(out)
    if not result["complete"]:
        return INTERRUPTED
    # A benchmark is not a test: slow is no failure. Nothing measured, bytes that were wrong, or arcbridge itself
    # missing, is one.
    failed = (
        result["failures"]
        or {OURS, peers.WITHOUT_RESUMPTION} & result["left_out"].keys()
        or not (any(result["scenarios"].values()) or result["studies"])
    )
    return 1 if failed else 0


@contextmanager
def _interruptible() -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the run; later ones do not disturb its end, in which processes are stopped."""
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if len(heard) == 1:
            raise KeyboardInterrupt
        print("bench: ending what was started; a moment", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save(result: dict[str, Any], out: Path) -> None:
    """Write a result so that a reader never sees half of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = out.with_name(out.name + ".new")
    fresh.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(fresh, out)


def _without_folder(argv: list[str], out: Path) -> list[str]:
    """Return the arguments as a result holds them, which holds no path of the machine it was made on."""
    return [argument.replace(f"{out.parent}/", "") if out.is_absolute() else argument for argument in argv]


def _tell_what_is_missing(result: dict[str, Any]) -> None:
    """Say last and loudly what was left out: a reader of the end alone must not take a part for the whole."""
    for line in goal_lines(goals(result)):
        print(line, file=sys.stderr)
    for name, why in result["left_out"].items():
        print(f"LEFT OUT: {name}: {why}", file=sys.stderr)
    for failure in result["failures"]:
        print(f"FAILED: {failure}", file=sys.stderr)


def _choose(
    parser: argparse.ArgumentParser, kind: str, given: str, known: dict[str, type[Part]], default: tuple[str, ...]
) -> tuple[str, ...]:
    if given == "none":
        return ()
    names = tuple(name.strip() for name in given.split(",") if name.strip()) or default
    for name in names:
        if name not in known:
            parser.error(f"no {kind} is called {name!r}; there are: {', '.join(known)}")
    return names


def _merge(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench merge", description="Put an interrupted result and one of the rest of it together."
    )
    parser.add_argument("files", type=Path, nargs=2, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, help="where the result of both goes")
    args = parser.parse_args(argv)
    try:
        first, second = (json.loads(file.read_text()) for file in args.files)
        result = merged(first, second)
    except (OSError, ValueError) as error:
        print(f"bench: cannot read a result: {error}", file=sys.stderr)
        return 2
    except Unlike as error:
        print(f"bench: these results cannot be put together: {error}", file=sys.stderr)
        return 2
    _save(result, args.out)
    print(args.out)
    return 0


def _report(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench report", description="Make a report of a result, from the file alone."
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.md and its plots (SVG) there")
    args = parser.parse_args(argv)
    try:
        result = json.loads(args.file.read_text())
    except (OSError, ValueError) as error:
        print(f"bench: cannot read {args.file}: {error}", file=sys.stderr)
        return 2
    if args.out is None:
        print(report(result))
    else:
        print(write(result, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

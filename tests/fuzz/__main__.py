"""`python -m tests.fuzz TARGET [--seconds N] [--runs N]`: one target under atheris, from the corpus of the repository.

Inputs that reach new code are kept in `--found` (default: a new directory, which the last line names), and what makes
the target raise is written beside them. The exit code is that of libFuzzer: 77 for a defect.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import atheris

CORPUS = Path(__file__).parent / "corpus"
LARGEST = 16 * 1024
"""Bytes of an input at most: no bound of a parser but that of a whole token or head lies above it."""
MEMORY = 1024
"""MiB that an input may make the process take."""


def memory_limit() -> int:
    """Return the MiB at which libFuzzer stops. What it takes for the most memory so far (`ru_maxrss`) begins with what
    the process that started this one has taken: Linux keeps it across execve."""
    return MEMORY + (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)


def main(argv: list[str]) -> None:
    """Run until the time is over or the target raises."""
    with atheris.instrument_imports(include=["arcbridge", "tomllib", "yaml"]):
        from tests.fuzz.targets import TARGETS
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz one parser of outside input.")
    parser.add_argument("target", choices=sorted(TARGETS), metavar="TARGET", help=", ".join(sorted(TARGETS)))
    parser.add_argument("--seconds", type=int, default=60, help="0: no bound")
    parser.add_argument("--runs", type=int, default=-1, help="inputs at most; -1: as many as the time allows")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations; 0: another one each time")
    parser.add_argument("--found", type=Path, help="directory for what is found")
    args = parser.parse_args(argv)
    found = args.found or Path(tempfile.mkdtemp(prefix=f"fuzz-{args.target}-"))
    found.mkdir(parents=True, exist_ok=True)
    print(f"inputs that reach new code go to {found}", file=sys.stderr)
    options = [
        f"-max_total_time={args.seconds}", f"-runs={args.runs}", f"-max_len={LARGEST}", f"-seed={args.seed}",
        "-timeout=20", f"-rss_limit_mb={memory_limit()}", f"-artifact_prefix={found}/", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS / args.target)], TARGETS[args.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])

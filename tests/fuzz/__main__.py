"""`python -m tests.fuzz TARGET ... [--seconds N] [--runs N]`: targets under atheris, from the corpus of the repository.

Several targets run one after the other, each for as long. Inputs that reach new code are kept in `--found` (default: a
new directory, which a line names), and what makes a target raise is written beside them. Beside a target's own promises
one input in SAMPLE is measured: what takes more than the table of entrances in docs/threats.md allows is a defect, too.
The exit code is that of libFuzzer: 77 for a defect.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import atheris

CORPUS = Path(__file__).parent / "corpus"
LARGEST = 256 * 1024
"""Bytes of an input at most, where its entrance takes more: mutations of more come to nothing."""
SLOW = dict.fromkeys(("authentication_file", "foreign_kubeconfig", "kubeconfig", "policy_file", "sessions"), 16 * 1024)
"""Bytes of an input where a parser of files in pure Python would take seconds for one, and no stranger gives it any."""
MEMORY = 1024
"""MiB that an input may make the process take."""
SAMPLE = 64
"""One input of so many is measured."""
LIVES = 10
"""How many times fewer inputs of `sessions`, each of which is a whole life, make `--runs`."""
INSTRUMENTED = 10
"""How many times more steps code may take that reports its branches to atheris."""


def memory_limit() -> int:
    """Return the MiB at which libFuzzer stops. What it takes for the most memory so far (`ru_maxrss`) begins with what
    the process that started this one has taken: Linux keeps it across execve."""
    return MEMORY + (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)


def measured(name: str, target: Callable[[bytes], None]) -> tuple[Callable[[bytes], None], int]:
    """Return a target that also measures one input in SAMPLE, and the bytes of its largest input."""
    from tests.fuzz import costs
    from tests.fuzz.readers import READERS

    if name not in READERS:
        return target, SLOW[name]
    entrance, read, count = costs.of_target(name), READERS[name], 0
    entrance = replace(entrance, steps=entrance.steps * INSTRUMENTED)

    def both(data: bytes) -> None:
        nonlocal count
        target(data)
        count += 1
        if count % SAMPLE == 0:
            found = costs.excess(read, data, entrance)
            assert not found, found

    return both, min(entrance.largest, SLOW.get(name, LARGEST))


def main(argv: list[str]) -> None:
    """Run each target until its time is over or it raises."""
    with atheris.instrument_imports(include=["arcbridge", "tomllib", "yaml"]):
        from tests.fuzz.targets import TARGETS
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz parsers of outside input.")
    names = ", ".join(sorted(TARGETS))
    choices = [*sorted(TARGETS), "all"]
    parser.add_argument("targets", nargs="+", choices=choices, metavar="TARGET", help=f"all, or of these: {names}")
    parser.add_argument("--seconds", type=int, default=60, help="of each target; 0: no bound")
    parser.add_argument("--runs", type=int, default=-1, help="inputs at most; -1: as many as the time allows")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations; 0: another one each time")
    parser.add_argument("--found", type=Path, help="directory for what is found")
    args = parser.parse_args(argv)
    codes = []
    for name in sorted(TARGETS) if "all" in args.targets else args.targets:
        sys.stderr.flush()
        child = os.fork()  # libFuzzer ends its process, and what was instrumented once serves all
        if child == 0:
            _fuzz(name, TARGETS[name], args)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.exit(next((code for code in codes if code), 0))


def _fuzz(name: str, target: Callable[[bytes], None], args: argparse.Namespace) -> None:
    """Fuzz one target; the process ends with libFuzzer's code."""
    found = args.found / name if args.found else Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    found.mkdir(parents=True, exist_ok=True)
    print(f"target: {name}\ninputs that reach new code go to {found}", file=sys.stderr, flush=True)
    target, largest = measured(name, target)
    runs = args.runs // LIVES if name == "sessions" else args.runs
    options = [
        f"-max_total_time={args.seconds}", f"-runs={runs}", f"-max_len={largest}", f"-seed={args.seed}",
        "-timeout=20", f"-rss_limit_mb={memory_limit()}", f"-artifact_prefix={found}/", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(found), str(CORPUS / name)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])

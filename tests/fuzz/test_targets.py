"""Each target holds on its corpus and on inputs near it, and can be fuzzed by coverage."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS
from tests.support.processes import require_or_skip

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).parents[2]
NEAR = 200
"""Inputs near each one of the corpus: a guard for changes; `make fuzz` finds more."""
RUNS = 500
"""Inputs that atheris tries here: a bound in count, so that the test does not depend on speed."""
FEW = {"sessions": 50}
"""Fewer where one input is a whole life."""

# Atheris instruments what a target imports before it begins, some ten seconds of a quiet machine.
pytestmark = pytest.mark.timeout(600)


def corpus(target: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_and_what_is_near_it(target: str) -> None:
    inputs = corpus(target)
    assert len(inputs) >= 2
    draw = random.Random(target)
    for one in [b"", *inputs]:
        TARGETS[target](one)
        for _ in range(FEW.get(target, NEAR)):
            changed = bytearray(one)
            for _ in range(draw.randint(1, 4)):
                at = draw.randint(0, len(changed))
                match draw.randrange(4):
                    case 0:
                        changed[at : at + 1] = bytes([draw.randrange(256)])
                    case 1:
                        del changed[at : at + draw.randint(1, 8)]
                    case 2:
                        changed[at:at] = changed[: draw.randint(0, 16)]
                    case 3:
                        other = draw.choice(inputs)
                        begin = draw.randint(0, len(other))
                        changed[at:at] = other[begin : begin + draw.randint(0, 64)]
            TARGETS[target](bytes(changed))


def test_every_target_has_a_corpus_and_no_other_exists() -> None:
    assert sorted(path.name for path in CORPUS.iterdir()) == sorted(TARGETS)


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("atheris") is None:
        require_or_skip("atheris", "atheris is not installed: it has no wheel for this machine or this Python")
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=570)


def test_coverage_guided(tmp_path: Path) -> None:
    # One process for all targets: to instrument what they import takes longer than their runs.
    done = fuzz("-m", "tests.fuzz", *TARGETS, "--runs", str(RUNS), "--seconds", "0", "--found", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    tried = [int(count) for count in re.findall(r"number_of_executed_units: (\d+)", done.stderr)]
    short = [name for name, count in zip(TARGETS, tried, strict=True) if count < FEW.get(name, RUNS)]
    assert not short, done.stderr[-4000:]


BROKEN = {"a promise": "assert not data.startswith(b'[[al'), 'found'", "a cost": "seen.append(data)"}


@pytest.mark.parametrize("what", BROKEN)
def test_a_target_that_breaks_a_promise_or_costs_too_much_is_reported(what: str, tmp_path: Path) -> None:
    code = (
        "import tests.fuzz.__main__ as program\n"
        "from tests.fuzz import readers, targets\n"
        "seen = []\n"
        "def broken(data):\n"
        f"    {BROKEN[what]}\n"
        "targets.TARGETS['policy_file'] = broken\n"
        f"readers.READERS['policy_file'] = lambda data: bytes({20_000_000 if what == 'a cost' else 0})\n"
        "program.SAMPLE = 4\n"
        f"program.main(['policy_file', '--runs', '100', '--found', {str(tmp_path)!r}])\n"
    )
    done = fuzz("-c", code)
    assert done.returncode == 77, done.stderr[-4000:]
    (crash,) = (tmp_path / "policy_file").glob("crash-*")
    assert ("bytes of memory" in done.stdout + done.stderr) == (what == "a cost")
    assert crash.read_bytes().startswith(b"[[al") or what == "a cost"

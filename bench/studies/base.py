"""What a study is: its own set-up, some numbers back."""

from __future__ import annotations

import argparse
import json
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any


class Study(ABC):
    """One question that needs a set-up of its own: many sessions, a cluster, a start."""

    name: str
    title: str
    """What is done, one line for the report."""

    expected_s: float = 60.0
    """About how long it takes in a full run, seconds, for the plan."""

    @abstractmethod
    def run(self, directory: Path, *, rounds: int, seconds: float) -> dict[str, Any]:
        """Run in `directory`, which is empty and private; progress goes to stderr, and processes end with the study.

        The answer is plain JSON: `{"values": {METRIC: number}, "runs": [...], "notes": [text], ...}`. Metrics end in
        their unit (`_ms`, `_us`, `_per_s`, `_mb_per_s`, `_kib`, `_ratio`, `_percent_of_a_core`). Values are medians of
        `rounds` runs where a run is short, and every run is under `runs`.

        Raises bench.peers.base.Unavailable (what to install), bench.process.NotReady,
        bench.load.generator.LoadFailed.
        """


def run_alone(study: Study, *, rounds: int, seconds: float) -> None:
    """Run one study from the command line, with `--rounds` and `--seconds`, and print what it found as JSON."""
    parser = argparse.ArgumentParser(description=study.title)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seconds", type=float, default=seconds)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=f"arcbridge-{study.name}-") as scratch:
        found = study.run(Path(scratch), rounds=args.rounds, seconds=args.seconds)
    print(json.dumps(found, indent=1))

"""How long the short commands of a client take, of an installed package and of the single-file client.

`make dist` builds that file; ARCBRIDGE_SINGLE_FILE names another one. What is not there (the file, or a command of this
version) is left out, and the result says so.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.process import NotReady
from tests.support.world import ALICE, World

ROOT: Final = Path(__file__).resolve().parents[2]
COUNT: Final = 15
"""Runs of each command, in turns."""
PATIENCE_S: Final = 30.0
COMMANDS: Final[Mapping[str, Sequence[str]]] = {
    "version": ["--version"],
    "whoami": ["whoami"],
    "status": ["status"],
    "credential": ["credential"],
}
"""What is measured, each as `NAME_ms`; commands that need one are given a login and a cluster."""


def measure(
    world: World, home: Path, package: Sequence[str], environment: Mapping[str, str]
) -> tuple[dict[str, list[float]], list[str]]:
    """Return milliseconds by metric, and a note on what was left out.

    `package`: the command line of the installed package. A metric of the single file begins with `single_file_`.
    """
    forms: dict[str, Sequence[str]] = {"": package}
    notes: list[str] = []
    if (file := single_file()) is not None:
        forms["single_file_"] = [str(file)]
    else:
        notes.append("NOT MEASURED: the single-file client; build it with `make dist`")
    environment = {**environment, **world.client_env(home)}
    runs: dict[str, list[float]] = {}
    plan: list[tuple[str, list[str]]] = []
    for name, words in COMMANDS.items():
        if name != "version" and not _is_there(package, words, environment):
            notes.append(f"NOT MEASURED: `{name}`, which this version does not have")
            continue
        given = [] if name == "version" else world.client_arguments(ALICE, home)
        for prefix, command in forms.items():
            if not prefix or name == "version" or _is_there(command, words, environment):
                plan.append((f"{prefix}{name}_ms", [*command, *given, *words]))
    for number in range(COUNT + 1):
        for metric, argv in plan:
            took, code, said = _wall(argv, environment)
            if code:
                notes.append(f"NOT MEASURED: {metric}: exit code {code}: {said}")
                plan = [entry for entry in plan if entry[0] != metric]
                runs.pop(metric, None)
            elif number:  # the first one unpacks, compiles and fills caches
                runs.setdefault(metric, []).append(took)
    if not runs:
        raise NotReady("no command ended well: " + "; ".join(notes))
    for note in notes:
        print(f"  {note}", file=sys.stderr)
    return runs, notes


def single_file() -> Path | None:
    """Return the single-file client of this platform, None where none was built."""
    named = os.environ.get("ARCBRIDGE_SINGLE_FILE", "")
    path = Path(named) if named else ROOT / "dist" / f"arcbridge-{sys.platform}-{platform.machine().lower()}"
    return path.resolve() if path.is_file() else None


def _is_there(command: Sequence[str], words: Sequence[str], environment: Mapping[str, str]) -> bool:
    _, code, _ = _wall([*command, "--role", "client", *words, "--help"], environment)
    return code == 0


def _wall(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[float, int, str]:
    """Milliseconds from before a process begins until it has ended, its exit code, and the last line of its errors."""
    before = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env=dict(environment))
    took = (time.perf_counter() - before) * 1e3
    return took, done.returncode, (done.stderr.strip().splitlines() or [""])[-1][:200]

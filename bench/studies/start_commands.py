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

import yaml

from bench.process import NotReady
from tests.support.world import ALICE, World

ROOT: Final = Path(__file__).resolve().parents[2]
COUNT: Final = 15
"""Runs of each command, in turns."""
PATIENCE_S: Final = 30.0
COMMANDS: Final = ("version", "whoami", "status", "credential")
"""What is measured, each as `NAME_ms`: the last two while the background process serves a cluster, `credential` with
the words that kubectl has in its kubeconfig."""


def measure(
    world: World, home: Path, package: Sequence[str], environment: Mapping[str, str]
) -> tuple[dict[str, list[float]], list[str]]:
    """Return milliseconds by metric, and a note on what was left out.

    `package`: the command line of the installed package. A metric of the single file begins with `single_file_`. Each
    form has a home of its own, beside `home`.
    """
    forms: dict[str, Sequence[str]] = {"": package}
    notes: list[str] = []
    if (file := single_file()) is not None:
        forms["single_file_"] = [str(file)]
    else:
        notes.append("NOT MEASURED: the single-file client; build it with `make dist`")
    runs: dict[str, list[float]] = {}
    plan: dict[str, tuple[list[str], dict[str, str]]] = {}
    connected: list[tuple[Sequence[str], dict[str, str]]] = []
    try:
        for prefix, command in forms.items():
            place = home.with_name(f"{home.name}-of-{prefix or 'package'}")
            its = {**environment, **world.client_env(place)}
            given = [word for word in world.client_arguments(ALICE, place) if word not in ("--cluster", world.cluster)]
            _, code, said = _wall([*command, "connect", world.cluster, *given], its)
            if code:
                raise NotReady(f"connect: exit code {code}: {said}")
            connected.append((command, its))
            user = yaml.safe_load((place / ".kube" / "config").read_text())["users"][0]["user"]
            words = {
                "version": ["--version"],
                "whoami": ["whoami", *given],
                "status": ["status"],
                "credential": user["exec"]["args"],
            }
            plan |= {f"{prefix}{name}_ms": ([*command, *words[name]], its) for name in COMMANDS}
        for number in range(COUNT + 1):
            for metric, (argv, its) in list(plan.items()):
                took, code, said = _wall(argv, its)
                if code:
                    notes.append(f"NOT MEASURED: {metric}: exit code {code}: {said}")
                    del plan[metric]
                    runs.pop(metric, None)
                elif number:  # the first one unpacks, compiles and fills caches
                    runs.setdefault(metric, []).append(took)
    finally:
        for command, its in connected:
            _wall([*command, "disconnect", "--all"], its)
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


def _wall(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[float, int, str]:
    """Milliseconds from before a process begins until it has ended, its exit code, and the last line of its errors."""
    before = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env=dict(environment))
    took = (time.perf_counter() - before) * 1e3
    return took, done.returncode, (done.stderr.strip().splitlines() or [""])[-1][:200]

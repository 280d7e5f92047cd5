"""Runs the load generator: one target for all systems, one client per measurement."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from bench.address import Address
from bench.load.build import build
from bench.process import Listening

GRACE = 40.0
"""Seconds that one measurement may take beyond its own time (the generator gives up after 15 s without progress)."""


class LoadFailed(Exception):
    """A measurement did not end in order: bytes were lost or changed, or the system under test broke."""


class Target(Listening):
    """The server at the far end: sink, source, echo and one byte, on one loopback port."""

    def __init__(self, program: Path) -> None:
        super().__init__([program, "serve"])


class Generator:
    """The client end; each call measures one system once."""

    def __init__(self) -> None:
        self.program = build()

    def target(self) -> Target:
        """Start a target for this run."""
        return Target(self.program)

    def run(self, command: str, to: Address, *, seconds: float, warmup: float, **more: float) -> dict[str, Any]:
        """One measurement; the generator's JSON. `more` are its options (`_` for `-`): bytes, count, connections, size,
        idle, every_us, up, down.

        Raises LoadFailed with what the generator said.
        """
        options = {"seconds": seconds, "warmup": warmup} | more
        pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in options.items())
        argv = [str(self.program), command, to.host, str(to.port), *(part for pair in pairs for part in pair)]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=seconds + warmup + GRACE)
        except subprocess.TimeoutExpired as error:
            raise LoadFailed(f"`load {command}` did not end") from error
        if done.returncode:
            raise LoadFailed(f"`load {command}` to {to}: {done.stderr.strip() or done.returncode}")
        result: dict[str, Any] = json.loads(done.stdout)
        return result

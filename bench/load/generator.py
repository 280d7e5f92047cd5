"""Runs the load generator: one target for all systems, one client per measurement."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.address import Address
from bench.load.build import build

GRACE = 40.0
"""Seconds that one measurement may take beyond its own time (the generator gives up after 15 s without progress)."""


class LoadFailed(Exception):
    """A measurement did not end in order: bytes were lost or changed, or the system under test broke."""


class Target:
    """The server at the far end: sink, source, echo and one byte, on one loopback port. Use as a context manager."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen(
            [program, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        word = self._process.stdout.readline().split()
        if len(word) != 2 or word[0] != "PORT":
            self.stop()
            raise LoadFailed("the target did not start")
        self.address = Address("127.0.0.1", int(word[1]))

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def stop(self) -> None:
        """Close its stdin, which ends it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Generator:
    """The client end. One call is one measurement through one system."""

    def __init__(self) -> None:
        self.program = build()

    def target(self) -> Target:
        """A target for this run."""
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

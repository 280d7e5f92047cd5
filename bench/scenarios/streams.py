"""Cost as work grows: 1, 10, 100, 1,000 and 5,000 streams through one client, open all the time.

Three things at each level, over the same connections (`bench/load/many.c`): a fixed number of echoes a second, spread
evenly over all of them, whose latency and CPU time per echo are told (at a fixed rate they can be compared between
levels: with one echo under way on each, more streams would also be more load); then one echo under way on each, for the
rate; then, on as many new streams, a fixed number of bytes in all, an equal share on each.

Where a system fails at a level, what was measured there before is kept, `nN_failed` is 1, and it is not asked for more
streams: `nN_failed` is 1 there, too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any, Self

from bench.address import Address
from bench.load.build import build
from bench.load.generator import Generator, LoadFailed
from bench.peers.base import Peer
from bench.scenarios.base import Effort, Metrics, Scenario
from bench.usage import cpu_seconds, resident_bytes

LEVELS = (1, 10, 100, 1_000, 5_000)
SIZE = 100
RATE = 2_000
"""Echoes a second; every system can do several times as many over one connection."""
BULK = 96_000_000
"""Bytes in all."""
SOURCE = Path(__file__).parents[1] / "load" / "many.c"
OPEN_MOST, PHASE_MOST = 60.0, 45.0
"""Seconds after which a system that does not go on is given up."""
SETTLE = 0.3


class Streams(Scenario):
    """The scenario of goal P12."""

    name = "streams"
    title = "1 to 5,000 streams at once: 2,000 echoes a second over all; one under way on each; 96 MB over as many"
    primary = ("n1000_per_s", "n5000_p99_us", "n5000_cpu_us_per_request")
    seconds = 2.5
    rounds = 2
    # No goal compares here, and a round of one system takes half a minute: those that differ in how they carry streams.
    peers = ("arcbridge", "openssh", "frp", "direct")

    levels: tuple[int, ...] = LEVELS
    most: Mapping[str, int] = {"openssh": 1_000}
    """Streams of systems that are not asked for all: OpenSSH opens 5,000 twice in a minute and a half."""

    def expected_s(self, effort: Effort) -> float:
        return sum(2 * (effort.seconds + effort.warmup) + 1.0 + level / 700 for level in self.levels)

    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        program = build(SOURCE)
        metrics: Metrics = {}
        levels = [level for level in self.levels if level <= self.most.get(peer.name, level)]
        for level in levels:
            found: Metrics = {}
            try:
                _level(found, program, peer, level, effort)
            except LoadFailed as error:
                if level == levels[0]:
                    raise
                print(f"streams: {peer.name} at {level}: {error}", file=sys.stderr, flush=True)
                metrics |= {f"n{more}_failed": 1.0 for more in levels if more >= level}
            metrics |= {f"n{level}_{name}": value for name, value in found.items()}
            if f"n{level}_failed" in metrics:
                break
        return metrics


def _level(found: Metrics, program: Path, peer: Peer, level: int, effort: Effort) -> None:
    """Measure one level into `found`, whose metrics survive the failure of a later step. Raises LoadFailed."""
    roles = peer.roots()
    with Many(program, peer.endpoint, level) as many:
        found["open_per_s"] = level / many.seconds_to_open
        time.sleep(SETTLE)
        before = cpu_seconds(peer.pids()) if roles else 0.0
        rate = many.ask(f"rate {RATE} {effort.seconds} {effort.warmup}")
        if roles:
            found["cpu_us_per_request"] = 1e6 * (cpu_seconds(peer.pids()) - before) / rate["requests"]
        found.update({name: rate[name] for name in ("p50_us", "p99_us")})
        found["per_s"] = many.ask(f"echo {effort.seconds / 2} {effort.warmup}")["per_s"]
        if roles:
            found["rss_mb"] = resident_bytes(peer.pids("client", "agent")) / 1e6
        found["mb_per_s"] = many.ask(f"bulk {BULK}")["mb_per_s"]


class Many:
    """The generator of this scenario: opens its connections, then does what it is asked. A context manager."""

    def __init__(self, program: Path, to: Address, connections: int) -> None:
        self._process = subprocess.Popen(
            [program, to.host, str(to.port), str(connections), str(SIZE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self.seconds_to_open = float(self._answer(OPEN_MOST)["seconds"])
        except BaseException:
            self.close()
            raise

    def ask(self, line: str) -> dict[str, Any]:
        """Run one phase. Raises LoadFailed with the generator's words."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has said why
        return self._answer(PHASE_MOST)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        # It gives up by itself when nothing moves; this is for a system that trickles.
        timer = Timer(seconds, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            code = self._process.wait()
            said = self._process.stderr.read().strip()
            raise LoadFailed(said or (f"not done within {seconds:.0f} s" if code == -9 else f"it ended with {code}"))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the generator and its connections."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(5)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

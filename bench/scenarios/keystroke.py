"""A keystroke while the same client moves files both ways: 100 bytes there and back, every 10 ms."""

from __future__ import annotations

from bench.load.generator import Generator
from bench.peers.base import Peer
from bench.scenarios.base import Effort, Metrics, Scenario

LEAST_SECONDS = 2.0
"""200 keystrokes a phase: with fewer, p99 is the worst of them."""
LEAST_WARMUP = 0.5


class Keystroke(Scenario):
    """Microseconds from the moment at which a key was due; a stall counts for each key that waited in it."""

    name = "keystroke"
    title = "100 bytes every 10 ms on one connection, alone (`idle`), then while one stream goes up and one down"
    primary = ("p50_us", "p99_us", "idle_p99_us", "up_mb_per_s", "down_mb_per_s")

    def expected_s(self, effort: Effort) -> float:
        return max(effort.warmup, LEAST_WARMUP) + 2.25 * max(effort.seconds, LEAST_SECONDS)

    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        seconds = max(effort.seconds, LEAST_SECONDS)
        result = load.run(
            "keys",
            peer.endpoint,
            seconds=seconds,
            warmup=max(effort.warmup, LEAST_WARMUP),
            idle=seconds * 1.25,
            up=1,
            down=1,
        )
        return {
            "idle_p50_us": result["idle"]["p50_us"],
            "idle_p99_us": result["idle"]["p99_us"],
            "p50_us": result["busy"]["p50_us"],
            "p99_us": result["busy"]["p99_us"],
            "up_mb_per_s": result["up"][0]["mb_per_s"],
            "down_mb_per_s": result["down"][0]["mb_per_s"],
        }

"""A keystroke: 100 bytes there and back on one connection, one at a time."""

from __future__ import annotations

from bench.load.generator import Generator
from bench.peers.base import Peer
from bench.scenarios.base import Effort, Metrics, Scenario


class Echo(Scenario):
    """Round trips of 100 bytes, microseconds."""

    name = "echo"
    title = "100 bytes there and back, one connection, one at a time"
    primary = ("p50_us", "p99_us")

    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        result = load.run("echo", peer.endpoint, seconds=effort.seconds, warmup=effort.warmup, size=100)
        return {name: result[name] for name in ("p50_us", "p99_us", "per_s")}

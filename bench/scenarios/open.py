"""New connections: open, one byte there, one byte back, close."""

from __future__ import annotations

from bench.load.generator import Generator
from bench.peers.base import Peer
from bench.scenarios.base import Effort, Metrics, Scenario
from bench.usage import cpu_seconds


class Open(Scenario):
    """Connections per second, one after the other and eight at a time; microseconds until the byte is back."""

    name = "open"
    title = "open, one byte there and back, close: one after the other (and eight at a time: `eight_per_s`)"
    primary = ("per_s", "eight_per_s", "p50_us", "p99_us", "cpu_us_per_open")

    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        half = effort.seconds / 2
        before = cpu_seconds(peer.pids())
        serial = load.run("open", peer.endpoint, seconds=half, warmup=effort.warmup, count=50_000)
        eight = load.run("open", peer.endpoint, seconds=half, warmup=0, connections=8, count=50_000)
        metrics = {name: serial[name] for name in ("per_s", "p50_us", "p99_us")} | {"eight_per_s": eight["per_s"]}
        if peer.roots():
            opened = serial["per_s"] * (half + effort.warmup) + eight["count"]
            metrics["cpu_us_per_open"] = 1e6 * (cpu_seconds(peer.pids()) - before) / opened
        return metrics

"""Many small conversations at once: 32 or 256 connections, each with one 100-byte echo under way."""

from __future__ import annotations

from bench.load.generator import Generator
from bench.peers.base import Peer
from bench.scenarios.base import Effort, Metrics, Scenario
from bench.usage import cpu_seconds


class Concurrent(Scenario):
    """Echoes per second over all connections."""

    name = "concurrent"
    title = "100-byte echoes over 32 connections at once"
    primary = ("per_s", "p99_us", "cpu_us_per_echo")
    connections = 32

    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        before = cpu_seconds(peer.pids())
        result = load.run(
            "many", peer.endpoint, seconds=effort.seconds, warmup=effort.warmup, size=100, connections=self.connections
        )
        metrics = {name: result[name] for name in ("per_s", "p50_us", "p99_us")}
        if peer.roots():
            # Steadier than any rate: what else the machine does hardly changes it. The warm-up's echoes cost as much.
            echoes = result["per_s"] * (effort.seconds + effort.warmup)
            metrics["cpu_us_per_echo"] = 1e6 * (cpu_seconds(peer.pids()) - before) / echoes
        return metrics


class Concurrent256(Concurrent):
    """Echoes over so many connections that a session serves more streams than one turn of a loop brings."""

    name = "concurrent256"
    title = "100-byte echoes over 256 connections at once"
    connections = 256

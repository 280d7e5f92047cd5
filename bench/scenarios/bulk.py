"""One stream of bytes, each way in turn; what it costs the relay."""

from __future__ import annotations

from bench.load.generator import Generator
from bench.peers.base import Peer
from bench.scenarios.base import Effort, Metrics, Scenario
from bench.usage import cpu_seconds


class Bulk(Scenario):
    """MB/s (10^6 bytes) at the receiver, each byte compared with what it must be."""

    name = "bulk"
    title = "one stream, as fast as it goes, up and then down"
    primary = ("up_mb_per_s", "down_mb_per_s", "relay_cpu_s_per_gb")

    def expected_s(self, effort: Effort) -> float:
        return 2 * (effort.warmup + effort.seconds)

    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        roles = tuple(peer.roots())
        before = {role: cpu_seconds(peer.pids(role)) for role in roles}
        up = load.run("up", peer.endpoint, seconds=effort.seconds, warmup=effort.warmup)
        down = load.run("down", peer.endpoint, seconds=effort.seconds, warmup=effort.warmup)
        moved = (up["total_bytes"] + down["total_bytes"]) / 1e9
        metrics = {"up_mb_per_s": up["mb_per_s"], "down_mb_per_s": down["mb_per_s"]}
        for role in roles:
            metrics[f"{role}_cpu_s_per_gb"] = (cpu_seconds(peer.pids(role)) - before[role]) / moved
        return metrics

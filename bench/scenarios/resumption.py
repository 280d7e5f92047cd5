"""What it costs to keep what was sent until the other end has it: `bulk` with resumption and without it."""

from __future__ import annotations

from dataclasses import replace

from bench.load.generator import Generator
from bench.peers.base import Peer
from bench.scenarios.base import Effort, Metrics
from bench.scenarios.bulk import Bulk

SHARE = 0.4
"""How much of another measurement's time each turn takes."""


class Resumption(Bulk):
    """Turns are short and many, because two nearly equal figures are compared."""

    name = "resumption"
    title = "`bulk` with resumption and without, in short turns"
    primary = ("up_mb_per_s", "down_mb_per_s", "ends_cpu_s_per_gb")
    peers = ("arcbridge", "arcbridge-without-resumption")
    turns = 2

    def expected_s(self, effort: Effort) -> float:
        return SHARE * super().expected_s(effort)

    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        metrics = super().measure(
            load, peer, replace(effort, seconds=effort.seconds * SHARE, warmup=effort.warmup * SHARE)
        )
        ends = sum(value for name, value in metrics.items() if name.startswith(("client_", "agent_")))
        return metrics | {"ends_cpu_s_per_gb": ends}

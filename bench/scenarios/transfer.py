"""One copy on a fresh stream, and the same bytes over many streams at once: what `kubectl cp` and many pulls meet.

`bulk` measures a steady state; here the start of a stream counts, too. A copy of each size goes over a stream of its
own, several times with a pause between, and the median of these is the run's figure. The clock of a copy runs from
before its connection is asked for until the receiver has the last byte: the receiver's own clock would start with its
first bytes, and leave out what opening a stream takes (34 ms with OpenSSH, three times what 10 MB take) and what waited
in buffers. Over many streams it is the sender's, until the last receiver has confirmed its share.
"""

from __future__ import annotations

import statistics
import time

from bench.load.build import build
from bench.load.generator import Generator
from bench.peers.base import Peer
from bench.scenarios.base import Effort, Metrics, Scenario
from bench.scenarios.streams import SOURCE, Many

COPIES = {1: 7, 10: 5, 100: 3}
"""Copies of each size (MB, 10^6 bytes) and way: the shorter, the more they differ from each other."""
STREAMS = (10, 100)
BULK = 200_000_000
"""Bytes over all streams together."""
PAUSE = 0.1
"""Seconds between two copies: what was under way has arrived, and the session rests."""
MOST_SECONDS = 30.0
USUAL = 300e6
"""Bytes per second, for the plan: the slowest have half, the fastest twice as many."""


class Transfer(Scenario):
    """The scenario of goal P14."""

    name = "transfer"
    title = "1, 10 and 100 MB on a fresh stream, up and then down; 200 MB up over 10 and over 100 streams at once"
    primary = (
        *(f"{way}_{size}mb_mb_per_s" for size in COPIES for way in ("up", "down")),
        *(f"streams{count}_mb_per_s" for count in STREAMS),
    )

    rounds = 3  # each measures every size several times
    peers = ("arcbridge", "openssh", "frp", "frp-no-mux", "direct")

    def expected_s(self, effort: Effort) -> float:
        copies = sum(2 * count * (PAUSE + 1e6 * size / USUAL) for size, count in COPIES.items())
        return copies + len(STREAMS) * (0.5 + BULK / USUAL)

    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        metrics: Metrics = {}
        for size, count in COPIES.items():
            for way in ("up", "down"):
                rates = []
                for _ in range(count):
                    time.sleep(PAUSE)
                    copy = load.run(way, peer.endpoint, seconds=MOST_SECONDS, warmup=0, bytes=size * 1_000_000)
                    rates.append(size / copy["whole_seconds"])
                metrics[f"{way}_{size}mb_mb_per_s"] = statistics.median(rates)
        program = build(SOURCE)
        for count in STREAMS:
            with Many(program, peer.endpoint, count) as many:
                metrics[f"streams{count}_mb_per_s"] = many.ask(f"bulk {BULK}")["mb_per_s"]
        return metrics

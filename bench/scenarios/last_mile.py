"""A keystroke over a slow last mile with a deep queue, beside a copy: bufferbloat, as a user at home meets it."""

from __future__ import annotations

from bench.load.generator import Generator
from bench.path.link import Path
from bench.peers.base import Peer
from bench.scenarios.base import Effort, Metrics, Scenario

LEAST_SECONDS = 4.0
FILLED_AFTER = 4.0
"""Seconds until a sender that fills queues has filled this one: 4 MiB take 1.7 s, and sockets hold some more."""
IDLE_SECONDS = 1.0
PATH = Path("last-mile", round_trip_ms=40, mbit_per_s=20, queue_bytes=4 * 1024 * 1024)


class LastMile(Scenario):
    """First a copy upwards, then one downwards; the link is the client's leg alone."""

    name = "last_mile"
    title = "20 Mbit/s, 40 ms and 4 MiB of queue at the client: 100 bytes every 10 ms beside a copy up, then down"
    primary = ("echo_p99_ms", "echo_p50_ms", "bulk_percent_of_link", "down_echo_p99_ms", "down_percent_of_link")
    path = PATH
    rounds = 2  # a queue of 4 MiB has to fill each time; figures of a shaped link hardly differ from round to round
    # The variant of frp fills the same queue as frp; it would take another minute.
    peers = ("arcbridge", "openssh", "frp", "direct")

    def expected_s(self, effort: Effort) -> float:
        # The bytes queued at the end of a copy have to leave, too.
        return 2 * (IDLE_SECONDS + FILLED_AFTER + max(effort.seconds, LEAST_SECONDS) + 1)

    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        seconds = max(effort.seconds, LEAST_SECONDS)
        metrics: Metrics = {}
        for way in ("up", "down"):
            result = load.run(
                "keys", peer.endpoint, seconds=seconds, warmup=FILLED_AFTER, idle=IDLE_SECONDS, **{way: 1}
            )
            mbit_per_s = result[way][0]["mb_per_s"] * 8
            prefix, bulk = ("", "bulk_") if way == "up" else ("down_", "down_")
            metrics |= {
                f"{prefix}idle_p99_ms": result["idle"]["p99_us"] / 1e3,
                f"{prefix}echo_p50_ms": result["busy"]["p50_us"] / 1e3,
                f"{prefix}echo_p99_ms": result["busy"]["p99_us"] / 1e3,
                f"{bulk}mbit_per_s": mbit_per_s,
                f"{bulk}percent_of_link": 100 * mbit_per_s / PATH.mbit_per_s,
            }
        return metrics

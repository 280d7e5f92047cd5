"""One stream, and one first byte, over a long way between client and relay."""

from __future__ import annotations

from bench.load.generator import Generator
from bench.path.link import Path
from bench.peers.base import Peer
from bench.scenarios.base import Effort, Metrics, Scenario

MBIT_PER_S = 400.0
"""So that the link is the limit, not the machine: every system here moves more over loopback."""
LEAST_SECONDS = 3.0
WARMUP_ROUND_TRIPS = 20
"""Windows grow by the round trip; how fast they do is told by `first_10_mb_s`."""
TEN_MB = 10_000_000
FIRST_BYTES = 10


class LongPath(Scenario):
    """100 ms and 400 Mbit/s: 5 MB are on the way. Percent are of the shaped rate; `direct` shows what TCP gets."""

    name = "long_path"
    title = "100 ms and 400 Mbit/s between client and relay: one stream up, then down; the first byte of a connection"
    primary = ("percent_of_link", "up_mb_per_s", "down_mb_per_s", "first_byte_round_trips")
    path: Path = Path("long-100-ms", round_trip_ms=100, mbit_per_s=MBIT_PER_S)
    rounds = 2  # long measurements; figures of a shaped link hardly differ from round to round
    # The goal is about the link. Who multiplexes beside us shows what other windows make of it.
    peers: tuple[str, ...] = ("arcbridge", "openssh", "frp", "direct")

    def expected_s(self, effort: Effort) -> float:
        round_trip = self.path.round_trip_ms / 1e3
        warmup = max(effort.warmup, WARMUP_ROUND_TRIPS * round_trip)
        return 2 * (warmup + max(effort.seconds, LEAST_SECONDS)) + 20 * round_trip + 2

    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        seconds = max(effort.seconds, LEAST_SECONDS)
        round_trip = self.path.round_trip_ms / 1e3
        first = load.run("open", peer.endpoint, seconds=60 * round_trip, warmup=0, count=FIRST_BYTES)
        warmup = max(effort.warmup, WARMUP_ROUND_TRIPS * round_trip)
        up, down = (load.run(way, peer.endpoint, seconds=seconds, warmup=warmup) for way in ("up", "down"))
        ten = load.run("up", peer.endpoint, seconds=60, warmup=0, bytes=TEN_MB)
        return {
            "up_mb_per_s": up["mb_per_s"],
            "down_mb_per_s": down["mb_per_s"],
            "percent_of_link": 100 * min(up["mb_per_s"], down["mb_per_s"]) * 8 / self.path.mbit_per_s,
            "first_byte_round_trips": first["p50_us"] / 1e6 / round_trip,
            "first_10_mb_s": ten["seconds"],
        }


class LongPath200(LongPath):
    """The same at 200 ms: 10 MB are on the way."""

    name = "long_path_200"
    title = "the same over 200 ms"
    path = Path("long-200-ms", round_trip_ms=200, mbit_per_s=MBIT_PER_S)
    peers = ("arcbridge", "openssh", "direct")

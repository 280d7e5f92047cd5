"""`speedtest`: round trips and throughput of the way to a cluster, each measured with what is there anyway.

* client and relay: TCP connections to the relay's port; one takes one round trip.
* client and agent: PING of the framing layer, whose answer the agent gives at once ([protocol](docs/protocol.md) §3).
* client and API server: `GET /version`, one after the other over one stream.
* throughput towards the client: a large document of the API server (`/openapi/v2`), again and again over one stream,
  uncompressed. It is bounded by the slowest hop, the API server among them. Towards the cluster nothing is measured:
  there is no request that would carry bytes there and change nothing.

What is read counts as the user's own traffic at the agent (`limits.bytes_per_day`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from arcbridge.client.service import ClientContext
from arcbridge.client.session.stream_http import StreamHttp
from arcbridge.errors import ArcbridgeError, Unreachable
from arcbridge.mux.session import MuxSession
from arcbridge.net.dialer import connect

DURATION = 5.0
"""Seconds for which is read."""
CONNECTS = 5
REQUESTS = 20
DOCUMENTS = ("/openapi/v2", "/openapi/v3")
LARGE = 64 * 1024
"""Bytes of a document below which its round trip and not the rate would be measured."""
CONNECT_DEADLINE = 5.0
PING_DEADLINE = 5.0
NOT_MEASURED = "to the cluster: not measured, because no request carries bytes there and changes nothing"


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """Samples of one hop, in seconds."""

    samples: tuple[float, ...] = ()

    @property
    def best(self) -> float:
        """The smallest; 0 without samples."""
        return min(self.samples, default=0.0)

    @property
    def median(self) -> float:
        """0 without samples."""
        return median(self.samples) if self.samples else 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read of one document in how long."""

    path: str = ""
    bytes: int = 0
    seconds: float = 0.0
    times: int = 0
    why_not: str = ""
    """Why nothing was measured; empty: something was."""

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """All of one run."""

    cluster: str
    relay: str
    to_relay: RoundTrips
    to_agent: float
    """The smallest recent round trip of the session, seconds."""
    to_api_server: RoundTrips
    reading: Reading = field(default_factory=Reading)

    def rows(self) -> list[dict[str, str]]:
        """Return a line for each hop, for people."""
        reading = self.reading
        how = reading.why_not or (
            f"{reading.path} read {reading.times} times in {reading.seconds:.1f} s over one stream, uncompressed; the "
            "slowest hop bounds it"
        )
        return [
            {"hop": "relay", "round_trip": _times(self.to_relay), "how": f"{CONNECTS} TCP connections to {self.relay}"},
            {"hop": "agent", "round_trip": _milliseconds(self.to_agent), "how": "PING of the session, the smallest"},
            {
                "hop": "API server",
                "round_trip": _times(self.to_api_server),
                "how": f"GET /version, {len(self.to_api_server.samples)} times over one stream",
            },
            {"hop": "from the cluster", "rate": "" if reading.why_not else _megabytes(reading.rate), "how": how},
            {"hop": "to the cluster", "how": NOT_MEASURED.partition(": ")[2]},
        ]

    def document(self) -> dict[str, Any]:
        """Return the same for programs: seconds, bytes, bytes per second."""
        reading = self.reading
        return {
            "cluster": self.cluster,
            "relay": {"address": self.relay, **_document(self.to_relay)},
            "agent": {"round_trip": self.to_agent},
            "api_server": _document(self.to_api_server),
            "from_cluster": {
                "path": reading.path,
                "bytes": reading.bytes,
                "seconds": reading.seconds,
                "times": reading.times,
                "bytes_per_second": reading.rate,
                "not_measured": reading.why_not,
            },
            "to_cluster": {"not_measured": NOT_MEASURED.partition(": ")[2]},
        }


async def measure(context: ClientContext, cluster: str, seconds: float) -> Measurement:
    """Measure the way to `cluster`. Raises ArcbridgeError where there is none."""
    session = context.session(cluster)
    try:
        await session.connect_once()
        if session.current is None or session.relay is None:
            raise Unreachable(f'the session with cluster "{cluster}" ended')
        to_agent = await _ping(session.current)
        relay = session.relay.address
        samples = []
        for _ in range(CONNECTS):
            began = time.perf_counter()
            (await connect(relay, deadline=CONNECT_DEADLINE)).close()
            samples.append(time.perf_counter() - began)
        versions = await _versions(session.current)
        reading = await _read(session.current, seconds)
        return Measurement(cluster, str(relay), RoundTrips(tuple(samples)), to_agent, versions, reading)
    finally:
        session.close()
        await session.wait_closed()


async def _ping(session: MuxSession) -> float:
    """Return the session's own round trip: it sends a PING as soon as it is up."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PING_DEADLINE
    while not session.round_trip and loop.time() < deadline:
        await asyncio.sleep(0.01)
    return session.round_trip


async def _versions(session: MuxSession) -> RoundTrips:
    connection = StreamHttp.open(session)
    samples = []
    try:
        await connection.request("GET", "/version")  # the first one makes the agent's connection
        for _ in range(REQUESTS):
            began = time.perf_counter()
            await connection.request("GET", "/version")
            samples.append(time.perf_counter() - began)
    finally:
        connection.close()
    return RoundTrips(tuple(samples))


async def _read(session: MuxSession, seconds: float) -> Reading:
    """Read the first document that is there and large, for `seconds`."""
    largest = 0
    for path in DOCUMENTS:
        connection = StreamHttp.open(session)
        try:
            answer = await connection.request("GET", path, arrived=lambda count: None)
            if answer.status != 200 or answer.size < LARGE:
                largest = max(largest, answer.size if answer.status == 200 else 0)
                continue
            return await _again_and_again(connection, path, seconds)
        except ArcbridgeError as error:
            return Reading(path, why_not=f"not measured: {error.message}")
        finally:
            connection.close()
    return Reading(why_not=f"not measured: the largest document that you may read has {largest} bytes")


async def _again_and_again(connection: StreamHttp, path: str, seconds: float) -> Reading:
    total = times = 0
    began = last = time.perf_counter()

    def arrived(count: int) -> None:
        nonlocal total
        total += count

    while last - began < seconds:
        await connection.request("GET", path, arrived=arrived)
        times += 1
        last = time.perf_counter()
    return Reading(path, total, last - began, times)


def _times(trips: RoundTrips) -> str:
    return f"{_milliseconds(trips.best)} (median {_milliseconds(trips.median)})" if trips.samples else ""


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds else ""


def _megabytes(rate: float) -> str:
    return f"{rate / 1e6:.1f} MB/s"


def _document(trips: RoundTrips) -> dict[str, Any]:
    return {"round_trip": trips.best, "median": trips.median, "samples": _rounded(trips.samples)}


def _rounded(samples: Sequence[float]) -> list[float]:
    return [round(sample, 6) for sample in samples]

"""Measures how fast bytes come from a cluster: reads a document of the API server again and again.

The slowest hop bounds the rate, the API server among them. Towards the cluster nothing is measured, because no request
carries bytes there and changes nothing. What is read counts as the user's own traffic at the agent
(`limits.bytes_per_day`). Invariant: nothing is kept of what is read.
"""

from __future__ import annotations

import time

import aiohttp

from arcbridge.checks.diagnosis import Finding, ok, skipped
from arcbridge.client.doctor.codes import sentence
from arcbridge.client.session.stream_http import api_client
from arcbridge.errors import ArcbridgeError
from arcbridge.mux.session import MuxSession
from arcbridge.units import size

DURATION = 5.0
"""Seconds for which is read."""
LARGE = 64 * 1024
"""Bytes of a document below which its round trip and not the rate would be measured."""
HOP = "throughput"
_DOCUMENTS = ("/openapi/v2", "/openapi/v3")


async def measure(session: MuxSession, seconds: float = DURATION) -> Finding:
    """Read the first document that is there and large, for `seconds`."""
    largest = 0
    try:
        async with api_client(session) as http:
            for path in _DOCUMENTS:
                count = await _read(http, path)
                if count >= LARGE:
                    return await _again_and_again(http, path, seconds)
                largest = max(largest, count)
    except ArcbridgeError as error:
        return skipped(HOP, f"not measured: {sentence(error)}")
    return skipped(HOP, f"not measured: the largest document that you may read has {size(largest)}")


async def _again_and_again(http: aiohttp.ClientSession, path: str, seconds: float) -> Finding:
    total = times = 0
    began = last = time.perf_counter()
    while last - began < seconds:
        total += await _read(http, path)
        times += 1
        last = time.perf_counter()
    took = last - began
    detail = f"{size(total / took)} a second from the cluster ({path}, {times} times in {took:.1f} s over one stream)"
    return ok(HOP, detail)


async def _read(http: aiohttp.ClientSession, path: str) -> int:
    """Return the bytes of a document; 0 for one that may not be read."""
    count = 0
    async with http.get(path, allow_redirects=False) as answer:
        async for piece in answer.content.iter_any():
            count += len(piece)
    return count if answer.status == 200 else 0

"""What charging the event loop's time costs the agent per GET on the fast path, in one process.

    python -m bench.micro.loop_time [--rounds 15] [--gets 600] [--output FILE]

A caller's session, the agent's proxy and a small API server share one loop, so the difference is the agent's alone.
Half of the blocks run with the callbacks as they were before anything was charged; the halves take turns within a
round, and the first of a round is the second of the next. CPU time of the thread counts: other processes matter less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import uvloop

from arcbridge.agent.kube.upstream_pool import UpstreamConnection
from arcbridge.loop_shares import LoopShares, LoopTime
from arcbridge.mux import buffer
from arcbridge.mux.connection import MuxConnection
from arcbridge.settings.config import AgentLimitsConfig
from bench import machine
from tests.agent.kube.bench import PODS, Bench, running

UNBOUND = AgentLimitsConfig(requests_per_second=0)
REQUEST = f"GET {PODS} HTTP/1.1\r\nHost: k\r\nAccept: application/json\r\n\r\n".encode()


WAYS = ("without", "with")
WARM_UP = 100
"""GETs after a change of the callbacks that are not measured: the interpreter specialises its code anew."""


@contextmanager
def charged(bench: Bench, way: str) -> Iterator[None]:
    """Run with the callbacks as they are, or as they were; they are put into their classes either way."""

    def session_buffer(self: MuxConnection, sizehint: int) -> memoryview:
        return buffer.VIEW

    def session_updated(self: MuxConnection, nbytes: int) -> None:
        if self._session is not None:
            self._session.data_received(buffer.VIEW[:nbytes], time.monotonic())

    def upstream_buffer(self: UpstreamConnection, sizehint: int) -> memoryview:
        if self._backlog is not None and self._backlog.full:
            return buffer.VIEW[: buffer.PORTION]
        return buffer.VIEW[: self._read_size]

    ours, theirs = MuxConnection, UpstreamConnection
    callbacks: tuple[Any, ...] = (session_buffer, session_updated, upstream_buffer, theirs._read)
    if way == "with":
        callbacks = (ours.get_buffer, ours.buffer_updated, theirs.get_buffer, theirs.buffer_updated)
    with (
        patch.object(ours, "get_buffer", callbacks[0]),
        patch.object(ours, "buffer_updated", callbacks[1]),
        patch.object(theirs, "get_buffer", callbacks[2]),
        patch.object(theirs, "buffer_updated", callbacks[3]),
    ):
        for session in bench.agents:
            session.payer = bench.caller.account.loop_time if way == "with" else None
        yield


async def block(bench: Bench, gets: int) -> float:
    """Return the microseconds of CPU per GET, one behind the other on one stream."""
    wire = bench.stream()
    begin = time.thread_time()
    for _ in range(gets):
        await wire.send(REQUEST)
        await wire.answer()
    return (time.thread_time() - begin) / gets * 1e6


async def measure(rounds: int, gets: int) -> dict[str, list[float]]:
    """Run all rounds."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as directory:
        async with running(Path(directory), limits=UNBOUND) as bench:
            for number in range(rounds):
                for way in WAYS[:: 1 if number % 2 == 0 else -1]:
                    with charged(bench, way):
                        await block(bench, WARM_UP)
                        found[way].append(await block(bench, gets))
    return found


def nothing() -> None:
    """Work that takes no time."""


def charge_ns() -> float:
    """Return the least nanoseconds that one measurement takes, with a call of work that is none."""
    payer = LoopTime(LoopShares(), lambda seconds: None)
    payer.set_share(0.0, 0.5)
    found = []
    for _ in range(200):
        begin = time.thread_time_ns()
        for _ in range(1000):
            payer.run(nothing)
        found.append((time.thread_time_ns() - begin) / 1000)
    return min(found)


async def charges_per_get(gets: int = 200) -> float:
    """Return how many measurements a GET has."""
    count = 0
    charge = LoopTime.charge

    def counted(self: LoopTime, now: float, began: float, before: float) -> None:
        nonlocal count
        count += 1
        charge(self, now, began, before)

    with tempfile.TemporaryDirectory() as directory:
        async with running(Path(directory), limits=UNBOUND) as bench:
            with charged(bench, "with"), patch.object(LoopTime, "charge", counted):
                await block(bench, gets)
    return count / gets


def main() -> None:
    """Measure, and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--gets", type=int, default=600)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = uvloop.run(measure(options.rounds, options.gets))
    differences = [after - before for before, after in zip(found["without"], found["with"], strict=True)]
    result: dict[str, Any] = {
        "command": f"python -m bench.micro.loop_time --rounds {options.rounds} --gets {options.gets}",
        "commit": machine.commit(),
        "machine": machine.describe(),
        "cpu_us_per_get": {way: round(statistics.median(values), 2) for way, values in found.items()},
        "least_us_per_get": {way: round(min(values), 2) for way, values in found.items()},
        "median_difference_us": round(statistics.median(differences), 2),
        "charges_per_get": round(charges := uvloop.run(charges_per_get()), 2),
        "charge_ns": round(one := charge_ns(), 1),
        "charges_us_per_get": round(charges * one / 1000, 2),
        "runs": {way: [round(value, 2) for value in values] for way, values in found.items()},
    }
    text = json.dumps(result, indent=1)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()

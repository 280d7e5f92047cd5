"""What charging the event loop's time costs the relay's pump per read, beside the pump of another commit.

    python -m bench.micro.pump_time [--base b6e47e9] [--rounds 15] [--reads 3000] [--output FILE]

One pair of socket pairs in one process; the far end sends the next message when one has come. Both pumps take turns
within a round, and the first of a round is the second of the next. CPU time of the thread counts, the two ends' too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from arcbridge.relay import pump as present
from bench import machine

SIZES = (64, 4096, 1 << 20)
"""Bytes of a message; the largest is bulk."""


def module_at(commit: str) -> types.ModuleType:
    """Return the pump of another commit."""
    found = subprocess.run(
        ["git", "show", f"{commit}:arcbridge/relay/pump.py"], check=True, capture_output=True, text=True
    )
    made = types.ModuleType("pump_of_another_commit")
    exec(compile(found.stdout, made.__name__, "exec"), made.__dict__)
    return made


async def block(module: Any, reads: int, size: int) -> float:
    """Return the microseconds of CPU for a message from one end to the other."""
    pumps = module.Pumps(lambda pump: None)
    near, near_relay = socket.socketpair()
    far, far_relay = socket.socketpair()
    for sock in (near, near_relay, far, far_relay):
        sock.setblocking(False)
    pumps.join(near_relay, far_relay)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    message, buffer, left, missing = bytes(size), bytearray(1 << 20), reads, 0
    waiting = memoryview(b"")

    def send() -> None:
        nonlocal waiting
        try:
            waiting = waiting[near.send(waiting) :]
        except BlockingIOError:
            pass
        if not waiting:
            loop.remove_writer(near.fileno())

    def begin() -> None:
        nonlocal waiting, missing
        missing, waiting = size, memoryview(message)
        send()
        if waiting:
            loop.add_writer(near.fileno(), send)

    def arrived() -> None:
        nonlocal left, missing
        missing -= far.recv_into(buffer)
        if missing:
            return
        left -= 1
        if left:
            begin()
        elif not done.done():
            done.set_result(None)

    loop.add_reader(far.fileno(), arrived)
    begun = time.thread_time()
    begin()
    await done
    seconds = time.thread_time() - begun
    loop.remove_reader(far.fileno())
    pumps.close()
    near.close()
    far.close()
    return seconds / reads * 1e6


async def measure(pumps: dict[str, Any], rounds: int, reads: Callable[[int], int]) -> dict[int, dict[str, list[float]]]:
    """Run all rounds."""
    found: dict[int, dict[str, list[float]]] = {size: {way: [] for way in pumps} for size in SIZES}
    for number in range(rounds):
        for size, ways in found.items():
            for way in list(pumps)[:: 1 if number % 2 == 0 else -1]:
                await block(pumps[way], reads(size) // 5, size)
                ways[way].append(await block(pumps[way], reads(size), size))
    return found


def main() -> None:
    """Measure, and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="b6e47e9")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--reads", type=int, default=3000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    for name, stub in (("tune", lambda sock: None), ("set_keepalive", lambda sock, **values: None)):
        setattr(present, name, stub)  # these are for TCP
    base: Any = module_at(options.base)
    base.tune, base.set_keepalive = present.tune, present.set_keepalive  # type: ignore[attr-defined]
    pumps = {"without": base, "with": present}
    found = uvloop.run(measure(pumps, options.rounds, lambda size: options.reads // (50 if size >= 1 << 20 else 1)))
    result = {
        "command": f"python -m bench.micro.pump_time --rounds {options.rounds} --reads {options.reads}",
        "base": options.base,
        "commit": machine.commit(),
        "machine": machine.describe(),
        "least_us_per_message": {
            size: {way: round(min(runs), 2) for way, runs in ways.items()} for size, ways in found.items()
        },
        "median_us_per_message": {
            size: {way: round(statistics.median(runs), 2) for way, runs in ways.items()} for size, ways in found.items()
        },
        "runs": {
            size: {way: [round(run, 2) for run in runs] for way, runs in ways.items()} for size, ways in found.items()
        },
    }
    text = json.dumps(result, indent=1)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()

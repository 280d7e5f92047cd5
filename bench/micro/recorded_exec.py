"""CPU of a short exec through the agent's proxy, with a recording and without, in turns.

    python -m bench.micro.recorded_exec [--rounds 12] [--each 60]

One process and one event loop have the caller, the agent and an API server that answers at once, so that what a
recording adds is the difference, and its share of the agent is larger than the ratio. `thread` is the part of it that
the recordings' thread takes, which seals and writes. The machine has to be quiet: the thread wakes three times an exec.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from arcbridge.agent.recording.recorder import Recorder
from arcbridge.cli.loop import loop_factory
from arcbridge.settings.config import RecordingConfig, RecordingRuleConfig
from tests.agent.kube.bench import Bench, running
from tests.agent.recording.keys import RECIPIENT, frame
from tests.agent.recording.test_recorder import EXEC, SUCCESS, request, serving


async def spend(bench: Bench, recorder: Recorder, times: int) -> tuple[float, float]:
    """Run so many execs, each to the end of its recording; return CPU and the thread's part of it, seconds each."""
    begin, thread = time.process_time(), time.process_time() - time.thread_time()
    for _ in range(times):
        wire = await bench.begin(request())
        await wire.head()
        await wire.rest()
        if recorder._tasks:
            await asyncio.wait(recorder._tasks)
    spent = time.process_time() - begin
    return spent / times, (time.process_time() - time.thread_time() - thread) / times


async def measure(rounds: int, each: int) -> None:
    """Print the medians, after a round that warms up."""
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as place:
        async with running(Path(place)) as bench:
            config = RecordingConfig((RECIPIENT,), Path(place) / "recordings", rules={"all": RecordingRuleConfig()})
            recorder = Recorder(config, bench.audit)
            bench.api.routes[EXEC] = serving(frame(b"\x01hello\n") + SUCCESS)
            for number in range(rounds + 1):
                for recorded in found:
                    bench.proxy.context.recorder = recorder if recorded else None
                    one = await spend(bench, recorder, each)
                    if number:
                        found[recorded].append(one)
            bench.proxy.context.recorder = None
            await recorder.close()
    plain, recorded_cpu = (statistics.median(cpu for cpu, _ in found[recorded]) * 1e3 for recorded in found)
    thread = statistics.median(part for _, part in found[True]) * 1e3
    print(f"plain {plain:.2f} ms, recorded {recorded_cpu:.2f} ms, of which the thread {thread:.2f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--each", type=int, default=60)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(measure(options.rounds, options.each))

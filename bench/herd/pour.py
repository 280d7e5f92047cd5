"""Both ends of some sessions in one process, and bulk through them.

`python -m bench.herd.pour` reads its orders as one JSON line (`bench.herd.sessions.Orders`), joins the sessions as the
product joins them, and writes a line with what it has. Then, for each line `SECONDS WARMUP` that it reads, it has
`bench/load/pour.c` write into the clients' ends and take from the agents' ends, and writes that program's line. It ends
with its input.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path

from arcbridge.cli.loop import loop_factory
from bench.herd.sessions import Ends, orders_of
from bench.load.build import build

POUR = Path(__file__).parents[1] / "load" / "pour.c"
JOIN_DEADLINE = 30.0


class Pouring(Ends):
    """Sessions whose raw sockets are left to the C program: this process sends nothing on them."""

    sources: list[socket.socket]
    sinks: list[socket.socket]

    def _is_raw(self, sock: socket.socket, *, pings: bool) -> None:
        (self.sources if pings else self.sinks).append(sock)

    async def pour(self) -> None:
        self.sources, self.sinks = [], []
        program = build(POUR)
        await self.come()
        await self.pair()
        async with asyncio.timeout(JOIN_DEADLINE):
            while len(self.sinks) < len(self.sources) or self.count.failed:
                await asyncio.sleep(0.01)
        print(json.dumps({"paired": len(self.sources)}), flush=True)
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            print(await loop.run_in_executor(None, self._poured, program, line.split()), flush=True)

    def _poured(self, program: Path, times: list[str]) -> str:
        numbers = [[sock.fileno() for sock in ends] for ends in (self.sources, self.sinks)]
        argv = [str(program), *times, *(",".join(map(str, ends)) for ends in numbers)]
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, pass_fds=[n for e in numbers for n in e]
        )
        return done.stdout.strip() if done.returncode == 0 else json.dumps({"error": done.stderr.strip()})


def main() -> None:
    orders = orders_of(sys.stdin.readline())

    async def run() -> None:
        await Pouring(orders).pour()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()

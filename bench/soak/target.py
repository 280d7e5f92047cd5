"""The far end of the soak: a TCP server on loopback, behind a TCP target of the agent.

    python -m bench.soak.target --seed HEX --ledger FILE

Says `PORT n`, then follows `bench.soak.orders`; when told to drain it waits for its streams to end, then ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import TextIO

from bench.soak.conversation import PATIENCE, End, Room
from bench.soak.orders import follow, say
from bench.soak.records import PREAMBLE_SIZE, Direction, Mismatch, Preamble

SETTLE = 20.0
"""Seconds that streams may still need to end once the load has ended all of its own."""


class Target:
    """All streams of one process."""

    def __init__(self, seed: bytes, ledger: TextIO, patience: float = PATIENCE) -> None:
        self.room = Room(ledger, "target", patience)
        self.tasks: set[asyncio.Task[None]] = set()
        self.accepted = 0
        self._seed = seed

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        self.accepted += 1
        try:
            await self._serve(reader, writer)
        finally:
            self.tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self.room.patience):
                preamble = Preamble.decode(await reader.readexactly(PREAMBLE_SIZE))
            if preamble.seed != self._seed:
                raise Mismatch("wrong", 1, "a stream of another run")
        except (OSError, EOFError, Mismatch) as error:  # TimeoutError is an OSError
            writer.transport.abort()
            got = len(error.partial) if isinstance(error, asyncio.IncompleteReadError) else 0
            wrong = {"mismatch": error.what, "count": error.count} if isinstance(error, Mismatch) else {}
            self.room.write({"nameless": str(error) or type(error).__name__, "bytes": got, **wrong})
            return
        await End(self.room, preamble, reader, writer, Direction.DOWN).run()


async def run(args: argparse.Namespace) -> None:
    """Accept streams until `drain` or the end of stdin."""
    with args.ledger.open("w") as ledger:
        target = Target(bytes.fromhex(args.seed), ledger, args.patience)
        server = await asyncio.start_server(target.serve, "127.0.0.1", 0, backlog=1024)
        say(f"PORT {server.sockets[0].getsockname()[1]}")
        drain = await follow(target.room, lambda: {"accepted": target.accepted})
        server.close()
        if drain and target.tasks:
            await asyncio.wait(target.tasks, timeout=SETTLE)
        tasks = list(target.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        say(json.dumps({"done": True, **target.room.bytes, "accepted": target.accepted}))


def main() -> int:
    """Run the target's process."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak.target")
    parser.add_argument("--seed", required=True)
    parser.add_argument("--ledger", required=True, type=Path)
    parser.add_argument("--patience", type=float, default=PATIENCE)
    asyncio.run(run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

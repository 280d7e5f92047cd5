"""The near end of the soak: keeps a number of streams open at local ports, each with a life of its own.

    python -m bench.soak.load --ports 5001,5002 --streams 200 --seed HEX --ledger FILE

Stream n goes to port n modulo the number of ports. Says `READY`, then follows `bench.soak.orders`; when told to drain
it ends all streams in order and says its last status.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
from pathlib import Path
from typing import TextIO

from bench.address import Address
from bench.soak.conversation import PATIENCE, End, Room
from bench.soak.orders import follow, say
from bench.soak.records import Direction, Kind, Preamble

CHATTY_SHARE = 0.75
LIVES = (60.0, 300.0)
"""Seconds that most streams live."""
BRIEF_PLACES = 10
"""Of so many places one has streams that live only for seconds, so that beginnings and ends of streams are cut too."""
BRIEF_LIVES = (0.2, 5.0)
TARGET_FIRST_SHARE = 0.25
"""Streams whose target ends its direction first, while the other goes on."""
MOST_STREAMS = 1_000_000
"""No run opens more."""
RAMP = 0.01
"""Seconds between the first openings."""
PAUSE = 0.5
"""Seconds before a place whose stream broke is filled again."""


class Load:
    """All streams of one process."""

    def __init__(self, ports: list[int], seed: bytes, ledger: TextIO, patience: float = PATIENCE) -> None:
        self.room = Room(ledger, "load", patience)
        self.opened = self.completed = self.failed = 0
        self._addresses = [Address("127.0.0.1", port) for port in ports]
        self._seed = seed
        self._random = random.Random(seed)
        self._numbers = itertools.count(1)

    def status(self) -> dict[str, int]:
        """Return how many streams were opened, completed and failed so far."""
        return {"opened": self.opened, "completed": self.completed, "failed": self.failed}

    async def keep(self, place: int) -> None:
        """Open one stream after the other until the load drains."""
        await asyncio.sleep(place * RAMP)
        lives = LIVES if place % BRIEF_PLACES else BRIEF_LIVES
        while not self.room.draining and self.opened < MOST_STREAMS:
            if not await self._stream(next(self._numbers), self._random.uniform(*lives)):
                await asyncio.sleep(PAUSE)

    async def _stream(self, number: int, life: float) -> bool:
        """Run one stream from its opening to its end; return whether this end found nothing wrong."""
        client = number % len(self._addresses)
        kind = Kind.CHATTY if self._random.random() < CHATTY_SHARE else Kind.BULKY
        first = self._random.random() < TARGET_FIRST_SHARE
        preamble = Preamble(self._seed, number, kind, self._random.randint(1, 300) if first else 0)
        self.opened += 1
        try:
            reader, writer = await asyncio.open_connection(*self._addresses[client])
        except OSError as error:
            self.failed += 1
            self.room.write({"stream": number, "client": client, "refused": str(error)})
            return False
        end = End(self.room, preamble, reader, writer, Direction.UP, client=client)
        try:
            await end.run(life)
        finally:
            self.completed += end.clean
            self.failed += not end.clean
        return end.clean


async def run(args: argparse.Namespace) -> None:
    """Keep the streams open until `drain` or the end of stdin."""
    with args.ledger.open("w") as ledger:
        load = Load([int(port) for port in args.ports.split(",")], bytes.fromhex(args.seed), ledger, args.patience)
        async with asyncio.TaskGroup() as group:
            places = [group.create_task(load.keep(place)) for place in range(args.streams)]
            say("READY")
            if await follow(load.room, load.status):
                await asyncio.wait(places, timeout=args.patience + 10)
            for place in places:
                place.cancel()
        say(json.dumps({"done": True, **load.room.bytes, **load.status()}))


def main() -> int:
    """Run the load's process."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak.load")
    parser.add_argument("--ports", required=True)
    parser.add_argument("--streams", required=True, type=int)
    parser.add_argument("--seed", required=True)
    parser.add_argument("--ledger", required=True, type=Path)
    parser.add_argument("--patience", type=float, default=PATIENCE)
    asyncio.run(run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How the soak talks to its load and its target: a line on stdin each, answers on stdout.

`kill N`: relay kill number N is about to happen. `status`: say so far, in one line of JSON. `drain`: end in order
what is open, then the process ends by itself. End of stdin: end at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

from bench.soak.conversation import Room


async def follow(room: Room, status: Callable[[], dict[str, Any]]) -> bool:
    """Follow orders until `drain` (True) or the end of stdin (False)."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        match line.decode().split():
            case ["kill", number]:
                room.kill(int(number))
            case ["status"]:
                say(json.dumps({"live": room.live, **room.bytes, **status()}))
            case ["drain"]:
                room.draining = True
                return True
            case other:
                raise ValueError(f"no such order: {other}")
    return False


def say(line: str) -> None:
    """Write one line to the soak."""
    print(line, flush=True)

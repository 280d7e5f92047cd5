"""One attack in a process of its own: `python -m bench.hostile.attacker NAME` reads its place as a line of JSON.

It begins at the line `go` and ends with its stdin; the last line of stdout is what it got, as JSON. It runs at a
low priority: a real attacker computes on a machine of its own, and here the honest pay for what the attack makes
arcbridge do, and not for the attacker's own TLS.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from arcbridge.cli.loop import loop_factory
from arcbridge.net.descriptors import raise_limit
from bench.hostile.attacks import ATTACKS, Attacker
from bench.hostile.place import Place

NICE = 10
"""Where cores are full, a tenth of what another process gets. At 19, the least, an attacker had no session after 4 s
beside other jobs, so that nothing was attacked."""
AUTOGROUP = Path("/proc/self/autogroup")
"""Where the kernel groups processes by session (sched(7)), `nice` counts within the session alone, and each process of
a run leads one. The group's own value counts between them; the file is missing where there are no groups."""


async def _run(name: str, place: Place) -> None:
    loop = asyncio.get_running_loop()
    attacker = Attacker(place)
    if await loop.run_in_executor(None, sys.stdin.readline) == "go\n":
        attack = asyncio.ensure_future(ATTACKS[name].run(attacker))
        over = asyncio.ensure_future(loop.run_in_executor(None, sys.stdin.read))
        await asyncio.wait([attack, over], return_when=asyncio.FIRST_COMPLETED)
        broke = attack.done()
        attack.cancel()
        await asyncio.gather(attack, return_exceptions=not broke)
    print(json.dumps(dict(attacker.outcomes.most_common())), flush=True)
    os._exit(0)  # what is held is held no more, all of it at once


def lower_priority() -> None:
    """Leave the cores to the other processes of the machine that want them, of this session and of others."""
    os.nice(NICE)
    if AUTOGROUP.exists():
        AUTOGROUP.write_text(str(NICE))


def main() -> None:
    """Read the place, attack."""
    lower_priority()
    raise_limit()
    place = Place.of(sys.stdin.readline())
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_run(sys.argv[1], place))


if __name__ == "__main__":
    main()

"""Begins sessions one after the other, and says how long each took to a target's first byte.

    python -m bench.studies.start_session TARGET COUNT FLAGS...

The flags are those of `arcbridge`. The last line of stdout is a list of milliseconds, JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

from arcbridge.cli.loop import run_until_signal
from arcbridge.cli.parser import parse
from arcbridge.cli.settings import load_settings
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.observe import logging
from arcbridge.settings.config import ClientConfig
from tests.support.stream_io import StreamIO


async def measure(context: ClientContext, target: str, count: int) -> list[float]:
    """Milliseconds of each session: join, both handshakes, authentication, a stream opened, one byte there and back."""
    cluster, found = context.clusters()[0], []
    for _ in range(count):
        session = context.session(cluster)
        before = time.perf_counter()
        begins = asyncio.ensure_future(session.connect_once())
        usable = await session.ready(before_auth=True)  # as `forward` does for a connection that comes meanwhile
        stream = StreamIO()
        usable.open(f"tcp:{target}", stream)
        await stream.write(b"O")
        if await stream.read_exactly(1) != b"o":
            raise RuntimeError("another byte came back")
        found.append((time.perf_counter() - before) * 1e3)
        await begins
        session.close()
        await session.wait_closed()
        await asyncio.sleep(0)
    return found


def main(argv: list[str]) -> int:
    """Run; the exit code."""
    target, count, *flags = argv
    invocation = parse(flags, "client")
    config: ClientConfig = load_settings(invocation, os.environ)
    logging.configure("client", "warning", config.observe.log_format)
    print(json.dumps(run_until_signal(measure(ClientContext(config, Terminal()), target, int(count)))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A client that makes one session for each byte of its standard input, and ends it: join, both handshakes, AUTH.

    python -m bench.budget.joins FLAGS...

The flags are those of `arcbridge`. It says `ready`, and `ended` after each session.
"""

from __future__ import annotations

import asyncio
import os
import sys

from arcbridge.cli.loop import run_until_signal
from arcbridge.cli.parser import parse
from arcbridge.cli.settings import load_settings
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.observe import logging
from arcbridge.settings.config import ClientConfig


async def serve(context: ClientContext) -> None:
    """Join until standard input ends."""
    loop, cluster = asyncio.get_running_loop(), context.clusters()[0]
    wanted: asyncio.Queue[bytes] = asyncio.Queue()
    loop.add_reader(0, lambda: wanted.put_nowait(os.read(0, 1)))
    print("ready", flush=True)
    while await wanted.get():
        session = context.session(cluster)
        await session.connect_once()
        session.close()
        os.write(1, b"ended\n")


def main(argv: list[str]) -> int:
    """Run; the exit code."""
    invocation = parse(argv, "client")
    config: ClientConfig = load_settings(invocation, os.environ)
    logging.configure("client", "warning", config.observe.log_format)
    run_until_signal(serve(ClientContext(config, Terminal())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

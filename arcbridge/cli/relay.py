"""The relay's sub-commands: `run`, and those that work on its data directory."""

from __future__ import annotations

import os
import signal
import sys

from arcbridge.cli.configuration import require
from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import load_settings
from arcbridge.config import RelayConfig
from arcbridge.errors import ExitCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine, Sequence
    from typing import Any


def run_relay(invocation: Invocation) -> int:
    """Run a relay command; returns the exit code."""
    config: RelayConfig = load_settings(invocation, os.environ)
    from arcbridge.observe import logging

    if invocation.command[0] in ("token", "cluster"):
        from arcbridge.relay.admin import run_admin

        logging.configure("relay", "warning", config.observe.log_format)
        return run_admin(_Arguments(invocation), config, sys.stdout)

    require(config)
    logging.configure("relay", config.observe.log_level, config.observe.log_format)
    from arcbridge.cli.loop import Interrupted, notify, run_until_drained

    several = False
    if config.workers != 1:
        from arcbridge.relay.processes.supervisor import supervise, worker_count

        several = worker_count(config) > 1
    if not several:
        from arcbridge.relay.service import serve

    def run(stopping: asyncio.Event, hurry: asyncio.Event) -> Coroutine[Any, Any, None]:
        if several:
            return supervise(config, lambda _: notify("READY=1"), stopping, hurry)
        return serve(config, lambda _: notify("READY=1"), stopping, hurry)

    try:
        run_until_drained(run)
    except Interrupted as error:
        return ExitCode.DONE if error.signal == signal.SIGTERM else ExitCode.INTERRUPTED
    return ExitCode.DONE


class _Arguments:
    """An invocation as `run_admin` reads it."""

    def __init__(self, invocation: Invocation) -> None:
        self.command: Sequence[str] = invocation.command
        self.cluster = invocation.text("cluster")
        self.uses = invocation.text("uses")
        self.ttl = invocation.text("ttl")
        self.rebind = invocation.switch("rebind")
        self.id = invocation.text("id")
        self.output = invocation.text("output", "table")

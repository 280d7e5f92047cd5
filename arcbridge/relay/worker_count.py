"""Decides how many processes a relay has, by its settings and its machine.

It starts none. Invariant: a number above 1 comes only where several processes can share the port.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from arcbridge.errors import ConfigError
from arcbridge.settings.config import RelayConfig

MAX_WORKERS: Final = 64
"""More than any machine's cores that one relay can use: each pair of workers has a channel."""


def worker_count(config: RelayConfig) -> int:
    """Return how many processes this relay has. Raises `ConfigError` where it cannot have so many."""
    count = config.workers or min(_cores(), MAX_WORKERS)
    if not 1 <= count <= MAX_WORKERS:
        raise ConfigError(f"workers: 1 to {MAX_WORKERS}, or 0 for one for each core")
    if count > 1:
        if config.fleet.servers:
            raise ConfigError(
                "workers: more than one cannot be had together with fleet.servers: another relay that passes an "
                "agent's join on must reach the very process that waits, and these share one port. Set workers = 1, "
                "and run several relays of the fleet on this machine, each with a port and a data_dir of its own"
            )
        if not sys.platform.startswith("linux"):
            raise ConfigError("workers: more than one needs Linux, whose kernel spreads connections over processes")
    return count


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

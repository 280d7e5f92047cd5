"""Finds out whether this machine slept, or left the network whose address a connection uses.

Both end a connection silently; the keepalive would take 25 s to notice. Nothing here acts: the session manager asks
once a second.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
import time
from collections.abc import Callable

SLEEP_THRESHOLD = 5.0
"""Seconds of sleep from which a connection is suspect; NATs and relays keep one over a shorter sleep."""
CHECK_INTERVAL = 1.0
"""Seconds between two checks."""


def seconds_asleep() -> float:
    """Return the seconds for which this machine has slept since its start: CLOCK_BOOTTIME runs on then, CLOCK_MONOTONIC
    does not.

    Where that is not known, 0.
    """
    if sys.platform != "linux":
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()


def is_gone(address: tuple[str, int] | tuple[str, int, int, int]) -> bool:
    """Return whether no interface has a local socket address (IPv4 or IPv6) any more: then nothing can be bound to
    it."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address[0], 0, *address[2:]))
    except OSError as error:
        return error.errno == errno.EADDRNOTAVAIL
    return False


class SleepDetector:
    """Remembers how long the machine had slept at the last check."""

    def __init__(
        self,
        asleep: Callable[[], float] = seconds_asleep,
        gone: Callable[[tuple[str, int] | tuple[str, int, int, int]], bool] = is_gone,
    ) -> None:
        self._asleep = asleep
        self._gone = gone
        self._before = asleep()

    def slept(self) -> float:
        """Return the seconds slept since the last call; 0 for less than `SLEEP_THRESHOLD`."""
        now = self._asleep()
        slept, self._before = now - self._before, now
        return slept if slept >= SLEEP_THRESHOLD else 0.0

    def lost_address(self, transport: asyncio.BaseTransport | None) -> str:
        """Return the local IP address of a connection if it is gone; empty when it is there, or unknown."""
        name = transport.get_extra_info("sockname") if transport is not None else None
        if not isinstance(name, tuple) or len(name) < 2 or not isinstance(name[0], str):
            return ""  # closed, or no IP socket
        return name[0] if self._gone(name) else ""

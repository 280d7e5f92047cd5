"""Reports to the relays how the agent is: relays are scraped, and agents behind firewalls cannot be.

A report is a `Status` on each control connection: when the connection is up, when readiness or a self-check changes,
and every half a minute. It holds names and codes of checks, and numbers; nothing of a user's, and no detail, which may
name hosts of the cluster. A relay of an earlier version reads `ready` alone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from arcbridge.checks.self_checks import SelfChecks
from arcbridge.observe.health import Checks
from arcbridge.wire.records import Status

EVERY: Final = 30.0
"""Seconds between two reports, on average."""
SPREAD: Final = 0.25
"""By which share of that one comes earlier or later."""
LOOK: Final = 1.0
"""Seconds between two looks whether anything has changed: so long a change waits."""


@dataclass(eq=False, repr=False)
class AgentReports:
    """What this agent reports now; `run` is a task of the agent's."""

    instance: str
    self_checks: SelfChecks
    checks: Checks
    """Those of readiness."""
    sessions: Callable[[], int]
    """How many the agent serves."""
    cas: Callable[[], tuple[str, str, str]] = lambda: ("", "", "")
    """Pins of the relay's newest CA that is known, of the one that has issued the certificate, and of the newest of the
    cluster's CAs."""

    def status(self, round_trip: float) -> Status:
        """Return the report for a connection with this round trip, seconds."""
        failures = self.checks.failures()
        words = []
        for name in self.self_checks.names:
            finding = self.self_checks.failed(name)
            words.append(name if finding is None else f"{name}:{finding.code or 'failed'}")
        known, issuer, cluster = self.cas()
        return Status(
            instance=self.instance,
            ready=not failures,
            unready=" ".join(failures),
            checks=" ".join(words),
            sessions=self.sessions(),
            round_trip=round(round_trip * 1e6),
            relay_ca=known,
            certificate_ca=issuer,
            cluster_ca=cluster,
        )

    async def run(self, send: Callable[[], None], *, draw: Callable[[], float] = random.random) -> None:
        """Call `send`, which sends a report on each connection, until cancelled. `draw` returns floats in [0, 1)."""
        loop = asyncio.get_running_loop()
        told, due = (True, "", ""), 0.0
        while True:
            status = self.status(0.0)
            if (now := (status.ready, status.unready, status.checks)) != told or loop.time() >= due:
                told, due = now, loop.time() + EVERY * (1 - SPREAD + 2 * SPREAD * draw())
                send()
            await asyncio.sleep(LOOK)

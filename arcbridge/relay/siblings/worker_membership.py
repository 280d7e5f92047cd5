"""A worker's membership in a relay of several processes, as `relay.service` needs it.

It shares the limits out, waits for the siblings before the port opens, and tells the supervisor metrics and failed
checks. It moves no connection: that is `handover`.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

import structlog

from arcbridge.net.address import Address
from arcbridge.observe.gathered import snapshot
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.reloads import Outcome
from arcbridge.relay.fleet.workers import WorkersFleet
from arcbridge.relay.operations import Question, Row
from arcbridge.relay.siblings.group import Siblings
from arcbridge.relay.siblings.handover import Handovers
from arcbridge.settings.config import RelayConfig, RelayLimitsConfig, RelayUserLimitsConfig

ACQUAINTED: Final = 2.0
"""Seconds for the siblings to say which agents they have: without them a client would be refused for want of one."""

log = structlog.get_logger("arcbridge.relay")


class WorkerMembership:
    """One of `count` processes that listen on `listen`. `together`: see `relay.drain`."""

    def __init__(
        self,
        index: int,
        count: int,
        listen: Address,
        siblings: Siblings,
        together: Callable[[asyncio.Event], Awaitable[None]],
    ) -> None:
        self.index = index
        self.count = count
        self.listen = listen
        self.together = together
        self.siblings = siblings
        self.fleet = WorkersFleet(siblings)
        self.handovers = Handovers(siblings)
        self.expected = 0
        """Siblings that lived when this one was started."""
        self.answer: Callable[[Question], list[Row]] = lambda question: []
        """Answers an operator's question for this process; set once it serves."""
        self.reload: Callable[[RelayConfig], Outcome] | None = None
        """Puts other settings in force in this process; None until it serves. Raises `ConfigError`."""
        self._metrics: Metrics | None = None
        self._checks: Checks | None = None

    def share(self, limits: RelayLimitsConfig) -> RelayLimitsConfig:
        """Return this process' part of what the whole relay may hold: an equal one, rounded up, because the kernel
        spreads connections evenly; shared counters would cost a message between processes for each connection.

        A user's few connections are spread less evenly than those of all, so a user's part has three standard
        deviations more: a user within the limit is hardly ever refused because the kernel chose one worker too often.
        At all workers together a user may have more than the limit says, by as much as these deviations at most.
        """

        def part(of: int) -> int:
            return max(-(-of // self.count), 1)

        def user_part(of: int) -> int:
            return min(part(of) + math.ceil(3 * math.sqrt(of / self.count)), of)

        def parts(of: dict[str, RelayUserLimitsConfig]) -> dict[str, RelayUserLimitsConfig]:
            return {
                name: RelayUserLimitsConfig(user_part(one.sessions), user_part(one.joins_per_minute))
                for name, one in of.items()
            }

        return replace(
            limits,
            unauthenticated=part(limits.unauthenticated),
            unauthenticated_per_address=part(limits.unauthenticated_per_address),
            sessions=part(limits.sessions),
            agents=part(limits.agents),
            pending_joins=part(limits.pending_joins),
            agents_per_second=part(limits.agents_per_second),
            connections_per_second_per_address=part(limits.connections_per_second_per_address),
            sessions_per_user=user_part(limits.sessions_per_user),
            joins_per_minute_per_user=user_part(limits.joins_per_minute_per_user),
            requests_per_minute_per_user=user_part(limits.requests_per_minute_per_user),
            groups=parts(limits.groups),
            users=parts(limits.users),
        )

    async def acquainted(self) -> None:
        """Wait, within bounds, until the siblings have said what they have."""
        if not await self.siblings.synced(self.expected, ACQUAINTED):
            log.warning("not all other workers have answered yet", expected=self.expected, found=len(self.siblings))

    def watch(self, metrics: Metrics, checks: Checks) -> None:
        """Remember what the supervisor asks for from now on."""
        self._metrics, self._checks = metrics, checks

    def snapshot(self) -> bytes:
        """Return the metrics, as JSON of a `observe.gathered.Snapshot`."""
        return json.dumps([] if self._metrics is None else snapshot(self._metrics)).encode()

    def failures(self) -> dict[str, str]:
        """Return the readiness checks that fail now."""
        return {} if self._checks is None else self._checks.failures()

"""A worker's membership in a relay of several processes, as `relay.service` needs it.

It shares the limits out, waits for the siblings before the port opens, and keeps what the supervisor asks for: metrics,
failed checks, answers and reloads. It moves no connection: that is `handover`.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import structlog

from arcbridge.net.address import Address
from arcbridge.observe.aggregated_metrics import snapshot
from arcbridge.observe.server import ObserveServer
from arcbridge.relay.fleet.workers import WorkersFleet
from arcbridge.relay.membership import Membership, Service
from arcbridge.relay.settings import CheckedRelay
from arcbridge.relay.siblings.group import Siblings
from arcbridge.relay.siblings.handover import Handovers
from arcbridge.settings.config import RelayLimitsConfig, RelayUserLimitsConfig

log = structlog.get_logger("arcbridge.relay")


class WorkerMembership(Membership):
    """One of `count` processes that listen on `listen`."""

    serves = "worker serving"
    shares_port = True
    siblings_deadline = 2.0
    """Seconds for the siblings to send which agents they have: without them a client would be refused for want of
    one."""

    def __init__(
        self,
        index: int,
        count: int,
        listen: Address,
        siblings: Siblings,
        wait_to_close: Callable[[asyncio.Event], Awaitable[None]],
    ) -> None:
        """`wait_to_close`: see `Membership.wait_to_close`."""
        super().__init__()
        self.index = index
        self.count = count
        self.siblings = siblings
        self.fleet = WorkersFleet(siblings)
        self.detour = Handovers(siblings)
        self.expected = 0
        """Siblings that lived when this one was started."""
        self.service: Service | None = None
        """What the supervisor asks for; None until this process serves."""
        self._listen = listen
        self._wait_to_close = wait_to_close

    def enter(self, checked: CheckedRelay, stack: AsyncExitStack) -> None:
        """Do nothing: the supervisor has logged the warnings, and holds the lock."""

    def address(self, configured: Address) -> Address:
        return self._listen

    async def wait_to_close(self, hurry: asyncio.Event) -> None:
        await self._wait_to_close(hurry)

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

    async def siblings_ready(self) -> None:
        if not await self.siblings.synced(self.expected, self.siblings_deadline):
            log.warning("not all other workers have answered yet", expected=self.expected, found=len(self.siblings))

    async def publish(self, service: Service, stack: AsyncExitStack) -> str:
        """Keep what the supervisor asks for: it answers the operator for all processes."""
        observe = ObserveServer("", service.metrics, service.checks)
        await observe.start()
        stack.push_async_callback(observe.stop)
        self.service = service
        return ""

    def snapshot(self) -> bytes:
        """Return the metrics, as JSON of an `observe.aggregated_metrics.Snapshot`."""
        return json.dumps([] if self.service is None else snapshot(self.service.metrics)).encode()

    def failures(self) -> dict[str, str]:
        """Return the readiness checks that fail now."""
        return {} if self.service is None else self.service.checks.failures()

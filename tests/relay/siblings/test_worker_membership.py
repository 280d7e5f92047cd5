from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from contextlib import AsyncExitStack
from types import SimpleNamespace

from arcbridge.net.address import Address
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.reloads import Outcome
from arcbridge.relay.membership import Service
from arcbridge.relay.siblings.group import Siblings
from arcbridge.relay.siblings.worker_membership import WorkerMembership
from arcbridge.settings.config import RelayConfig, RelayLimitsConfig, RelayUserLimitsConfig
from tests.relay.siblings.test_group import joined


async def together(hurry: asyncio.Event) -> None: ...


def made(count: int, index: int = 0) -> WorkerMembership:
    return WorkerMembership(index, count, Address("127.0.0.1", 443), Siblings(), together)


async def test_limits_are_divided_and_never_nothing() -> None:
    limits = RelayLimitsConfig(unauthenticated=1000, unauthenticated_per_address=100, sessions=20_001, pending_joins=2)
    part = made(3).share(limits)
    assert (part.unauthenticated, part.unauthenticated_per_address, part.sessions) == (334, 34, 6667)
    assert (part.pending_joins, part.agents_per_second) == (1, 100)
    assert part.join_deadline == limits.join_deadline
    assert made(1).share(limits) == limits


async def test_a_user_within_the_limit_is_refused_by_no_worker() -> None:
    """The kernel chooses a worker for each connection: a user's part leaves room for an uneven choice."""
    limits = RelayLimitsConfig(
        sessions_per_user=200,
        joins_per_minute_per_user=8,
        groups={"ci": RelayUserLimitsConfig(2000, 0)},
        users={"robot": RelayUserLimitsConfig(1, 600)},
    )
    part = made(4).share(limits)
    assert part.sessions_per_user == 50 + 22
    assert part.joins_per_minute_per_user == 2 + 5
    assert part.groups == {"ci": RelayUserLimitsConfig(500 + 68, 0)}
    assert part.users == {"robot": RelayUserLimitsConfig(1, 150 + 37)}
    assert part.connections_per_second_per_address == 50
    refused = 0
    for seed in range(1000):
        chosen = Counter(random.Random(seed).choices(range(4), k=200))
        refused += max(chosen.values()) > part.sessions_per_user
    assert refused <= 10


async def test_waits_for_those_that_were_there_before() -> None:
    one, other = made(2), made(2, 1)
    one.expected = 1
    one.siblings_deadline = 3600.0
    waiting = asyncio.ensure_future(one.siblings_ready())
    await asyncio.sleep(0)
    assert not waiting.done()
    joined(one.siblings, other.siblings)
    await asyncio.wait_for(waiting, 5)
    one.siblings.close()
    other.siblings.close()
    # A worker that does not answer must not keep this one from serving.
    one.siblings_deadline = 0.01
    await asyncio.wait_for(one.siblings_ready(), 5)


async def test_what_the_supervisor_asks_for() -> None:
    membership = made(2)
    assert json.loads(membership.snapshot()) == []
    assert membership.failures() == {}
    metrics, checks = Metrics("relay"), Checks()
    metrics.gauge("held", "Held.", None, lambda: 7)
    checks.add("registry", lambda: "it is gone")
    async with AsyncExitStack() as stack:
        service = Service(
            RelayConfig(), metrics, checks, SimpleNamespace(), membership.fleet, lambda checked: Outcome()
        )
        assert await membership.publish(service, stack) == ""
    assert ["arcbridge_relay_held", [[[], 7]]] in [[e["name"], e["series"]] for e in json.loads(membership.snapshot())]
    assert membership.failures() == {"registry": "it is gone"}

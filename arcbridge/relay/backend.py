"""Chooses what a relay keeps its registry in, and how it reaches agents that other processes hold.

The choice follows from the settings and from the process: one of several workers, a relay of a NATS fleet, or a relay
alone. It is made here and nowhere else: a relay sees a `Registry` and a `Fleet`, and asks the fleet for what only some
fleets can do.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable

import structlog

from arcbridge.errors import ConfigError
from arcbridge.net.address import parse_address
from arcbridge.relay.data_dir import open_registry
from arcbridge.relay.fleet.base import Fleet
from arcbridge.relay.fleet.nats import NatsFleet
from arcbridge.relay.fleet.nats_questions import NatsQuestions
from arcbridge.relay.nats import NatsConnection
from arcbridge.relay.registry.base import Registry, RegistryUnavailable
from arcbridge.relay.registry.nats import NatsRegistry
from arcbridge.settings.config import RelayConfig
from arcbridge.tasks import TaskSet, cancel_and_wait

NATS_PATIENCE = 5.0
"""Seconds that a relay or an operator's command waits for NATS: several servers may have to be tried."""

log = structlog.get_logger("arcbridge.relay")


async def open_backend(
    config: RelayConfig, without_nats: Fleet, stack: contextlib.AsyncExitStack
) -> tuple[Registry, Fleet]:
    """Open the registry and make the fleet, which is still to be started; `stack` closes the registry and NATS.

    `without_nats`: the fleet of a relay whose settings name no NATS, with one process or several.
    A relay starts without NATS, too: it refuses what it cannot know. Raises `ConfigError`, `StateError` and
    `RegistryUnavailable`.
    """
    registry: Registry
    fleet: Fleet
    if config.fleet.servers:
        connection = NatsConnection(config.fleet)
        stack.push_async_callback(connection.close)
        if not await connection.start(NATS_PATIENCE):
            log.warning("NATS not reached", effect="this relay starts without it, and refuses what it cannot know")
        fleet = NatsFleet(connection, internal_address=_internal_address(config))
        registry = following = _nats_registry(connection, config)
        following.start()
    else:
        fleet = without_nats
        registry = await open_registry(config.data_dir)
    stack.push_async_callback(registry.close)
    return registry, fleet


@contextlib.asynccontextmanager
async def registry_of(
    config: RelayConfig, *, must_exist: bool = False, clock: Callable[[], float] = time.time
) -> AsyncIterator[Registry]:
    """Open the registry that a relay with these settings has, its own or its fleet's, for one command of an operator.

    Raises `ConfigError`, `StateError`, and `RegistryUnavailable` when NATS does not answer in time.
    """
    async with contextlib.AsyncExitStack() as stack:
        registry: Registry
        if config.fleet.servers:
            registry = _nats_registry(await _connected(config, stack), config, clock)
        else:
            registry = await open_registry(config.data_dir, must_exist=must_exist, clock=clock)
        stack.push_async_callback(registry.close)
        yield registry


async def running_relays(config: RelayConfig) -> list[str]:
    """Return the public addresses of the relays of a NATS fleet that answer now, for one command of an operator; none
    without a fleet.

    A relay that is frozen does not answer and is left out. Raises `ConfigError`, and `RegistryUnavailable` when NATS
    does not answer in time.
    """
    if not config.fleet.servers:
        return []
    async with contextlib.AsyncExitStack() as stack:
        connection, tasks = await _connected(config, stack), TaskSet()
        questions = NatsQuestions(connection, secrets.token_hex(8), lambda question: [], tasks)
        await questions.start()
        rows = await questions.ask({"ask": "policy"})
        await cancel_and_wait(*tasks)
    return sorted({str(row.get("relay")) for row in rows})


async def _connected(config: RelayConfig, stack: contextlib.AsyncExitStack) -> NatsConnection:
    connection = NatsConnection(config.fleet)
    stack.push_async_callback(connection.close)
    # An operator tries again; a relay does so by itself.
    if not await connection.start(NATS_PATIENCE, once=True):
        why = f" ({connection.failure})" if connection.failure else ""
        servers = ", ".join(config.fleet.servers)
        raise RegistryUnavailable(f"the fleet's registry does not answer: NATS cannot be reached at {servers}{why}")
    return connection


def _nats_registry(
    connection: NatsConnection, config: RelayConfig, clock: Callable[[], float] = time.time
) -> NatsRegistry:
    fleet = config.fleet
    return NatsRegistry(connection, bucket=fleet.bucket, replicas=fleet.replicas, outage=fleet.outage, clock=clock)


def _internal_address(config: RelayConfig) -> str:
    """Return where other relays reach this one: without a setting, at the public address."""
    try:
        return str(parse_address(config.fleet.internal_address or config.public_address))
    except ConfigError as error:
        raise ConfigError(f"fleet.internal_address: {error.message}") from error

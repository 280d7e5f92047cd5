"""What a relay keeps in its data directory, and how it is opened: by the relay, by its workers, by an operator.

    ca.crt, ca.key    the relay's own CA (`pki.authority`)
    registry.db       clusters, join tokens, revocations (`registry.sqlite`); with -wal and -shm while it is open

Back up all of it together. Whoever first needs the CA makes it, so a join token, which is of no use without the
CA's pin, can be made before the relay's first start.

A relay of a fleet has its registry in NATS instead, and no `registry.db`; the CA's two files are the same at all of
them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from arcbridge.config import RelayConfig, RelayFleetConfig
from arcbridge.errors import StateError
from arcbridge.pki.authority import Authority
from arcbridge.relay.nats import NatsConnection
from arcbridge.relay.registry.base import Registry, RegistryUnavailable
from arcbridge.relay.registry.nats import NatsRegistry
from arcbridge.relay.registry.sqlite import DATABASE_FILE, SqliteRegistry

NATS_PATIENCE = 5.0
"""Seconds that an operator's command waits for a connection to NATS: several servers may have to be tried."""

CA_NAME = "arcbridge relay CA"


def open_authority(data_dir: Path, *, clock: Callable[[], float] = time.time) -> Authority:
    """The relay's CA, made at first use; raises `StateError`. Takes milliseconds and may wait for a lock."""
    return Authority.load_or_create(data_dir, CA_NAME, clock=clock)


async def open_registry(
    data_dir: Path, *, must_exist: bool = False, clock: Callable[[], float] = time.time
) -> SqliteRegistry:
    """The relay's registry, made at first use unless it `must_exist`; raises `StateError` and `RegistryUnavailable`."""
    if must_exist and not (data_dir / DATABASE_FILE).exists():
        raise StateError(f"there is no registry in {data_dir}: is data_dir right, and has the relay ever run?")
    return await SqliteRegistry.open(data_dir, clock=clock)


def fleet_registry(
    connection: NatsConnection, config: RelayFleetConfig, *, clock: Callable[[], float] = time.time
) -> NatsRegistry:
    """The registry of a fleet over a connection that somebody else keeps; nothing is asked of NATS yet."""
    return NatsRegistry(connection, bucket=config.bucket, replicas=config.replicas, outage=config.outage, clock=clock)


@contextlib.asynccontextmanager
async def registry_of(
    config: RelayConfig, *, must_exist: bool = False, clock: Callable[[], float] = time.time
) -> AsyncIterator[Registry]:
    """The registry that a relay with these settings has, its own or its fleet's, for one command of an operator.

    Raises `ConfigError`, `StateError`, and `RegistryUnavailable` when NATS does not answer in time.
    """
    async with contextlib.AsyncExitStack() as stack:
        registry: Registry
        if config.fleet.servers:
            connection = NatsConnection(config.fleet)
            stack.push_async_callback(connection.close)
            if not await connection.start(NATS_PATIENCE):
                servers = ", ".join(config.fleet.servers)
                raise RegistryUnavailable(f"the fleet's registry does not answer: NATS cannot be reached at {servers}")
            registry = fleet_registry(connection, config.fleet, clock=clock)
        else:
            registry = await open_registry(config.data_dir, must_exist=must_exist, clock=clock)
        stack.push_async_callback(registry.close)
        yield registry

"""What the relay's tests share: one NATS server, with room for each test of its own, and a relay's
connection handlers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import structlog

from arcbridge.relay.nats import NatsConnection
from arcbridge.settings.config import RelayConfig, RelayFleetConfig
from tests.identity.issuer import CONFIG
from tests.relay.station import Station, station
from tests.support.nats_server import NatsServer

_numbers = itertools.count()


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """The server that tests share; a test that stops its server takes `own_server`."""
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A server that the test may stop, freeze and empty."""
    with NatsServer(tmp_path / "nats") as server:
        yield server


def relay_config(directory: Path, policy: str, **settings: Any) -> RelayConfig:
    """Settings of a relay that takes the tokens of `tests.identity.issuer`."""
    files = {"authentication": directory / "authentication.yaml", "policy": directory / "policy.toml"}
    files["authentication"].write_text(CONFIG)
    files["policy"].write_text(policy)
    return RelayConfig(**{"public_address": "127.0.0.1:443", "data_dir": directory / "data", **files, **settings})


def settings(server: NatsServer, **more: object) -> RelayFleetConfig:
    """Settings for a relay at `server`."""
    return RelayFleetConfig(servers=(server.url,), **more)


class Connections:
    """Connections to one server, under one prefix; all closed at the end."""

    def __init__(self, config: RelayFleetConfig, stack: AsyncExitStack) -> None:
        self.config = config
        self._stack = stack

    async def make(self) -> NatsConnection:
        connection = NatsConnection(self.config)
        self._stack.push_async_callback(connection.close)
        assert await connection.start(30)
        return connection


@pytest.fixture
async def connections(nats_server: NatsServer) -> AsyncIterator[Connections]:
    """To the shared server, with a prefix and a bucket of the test's own."""
    name = f"test-{next(_numbers)}"
    async with AsyncExitStack() as stack:
        yield Connections(settings(nats_server, prefix=name, bucket=name), stack)


Connect = Callable[[NatsServer], Connections]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Connections to a server of the test's own."""
    async with AsyncExitStack() as stack:
        yield lambda server: Connections(settings(server), stack)


@pytest.fixture
def everything_logged() -> Iterator[list[str]]:
    """Collect all events of structlog and logging as text, down to debug."""
    lines: list[str] = []

    def keep(logger: object, name: str, event: structlog.typing.EventDict) -> str:
        lines.append(repr(event))
        raise structlog.DropEvent

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(logging.Formatter().format(record))

    before, root, handler = structlog.get_config(), logging.getLogger(), Keep()
    level = root.level
    structlog.configure(processors=[keep], cache_logger_on_first_use=False)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield lines
    root.setLevel(level)
    root.removeHandler(handler)
    structlog.configure(**before)


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Station]:
    """A relay with the cluster prod."""
    async with station(tmp_path, "prod") as made:
        yield made

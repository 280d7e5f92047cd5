"""What the relay's tests share: one NATS server, with room for each test of its own, and an HTTP API to ask."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import structlog

from arcbridge.config import RelayFleetConfig, RelayLoginConfig
from arcbridge.identity.policy import PolicyFile
from arcbridge.net.tls import ALPN_HTTP, outer_server_contexts
from arcbridge.pki.authority import Authority
from arcbridge.relay.access import Access
from arcbridge.relay.api import Limited, build_app
from arcbridge.relay.api_server import ApiServer
from arcbridge.relay.login_settings import login_document
from arcbridge.relay.nats import NatsConnection
from arcbridge.relay.registry.sqlite import SqliteRegistry
from tests.relay.api_station import POLICY, Clock, Relay, StubVerifier
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


def settings(server: NatsServer, **more: object) -> RelayFleetConfig:
    """Settings for a relay at `server`."""
    return RelayFleetConfig(servers=(server.url,), **more)  # type: ignore[arg-type]


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
async def relay(tmp_path: Path, everything_logged: list[str]) -> AsyncIterator[Relay]:
    async with asking(tmp_path, None) as relay:
        yield relay


@pytest.fixture
async def login_relay(tmp_path: Path, everything_logged: list[str]) -> AsyncIterator[Relay]:
    """A relay that says where clients log in."""
    config = RelayLoginConfig("https://login.example.org", "arcbridge", cluster_audience="arcbridge-{cluster}")
    async with asking(tmp_path, login_document(config)) as relay:
        yield relay


@asynccontextmanager
async def asking(tmp_path: Path, login: Mapping[str, object] | None) -> AsyncIterator[Relay]:
    """A relay's API that answers on loopback."""
    clock = Clock()
    authority = Authority.create("relay CA", clock=clock)
    registry = await SqliteRegistry.open(tmp_path, clock=clock)
    agents: dict[str, int] = {}
    limited = Limited()
    (tmp_path / "policy.toml").write_text(POLICY)
    access = Access(PolicyFile(tmp_path / "policy.toml"))
    access.learn_users({})

    async def count_agents(clusters: Sequence[str]) -> Mapping[str, int]:
        return {cluster: agents[cluster] for cluster in clusters if cluster in agents}

    copies: list[None] = []
    app = build_app(
        authority=authority,
        registry=registry,
        count_agents=count_agents,
        verifier=StubVerifier(),
        access=access,
        certificate_life=600.0,
        clock=clock,
        monotonic=clock,
        user_requests_per_minute=30,
        limited=limited,
        renewed_twice=lambda: copies.append(None),
        login=login,
    )
    server = ApiServer(app)
    await server.start()
    issued = authority.issue_server(["127.0.0.1"])
    context = outer_server_contexts(issued.certificate_pem, issued.key_pem, authority.certificate_pem)[ALPN_HTTP]
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0, ssl=context)
    port = listener.sockets[0].getsockname()[1]
    yield Relay(authority, registry, clock, server, port, limited, agents, access, context.spki, copies)
    listener.close()
    await server.close()
    await listener.wait_closed()
    await registry.close()

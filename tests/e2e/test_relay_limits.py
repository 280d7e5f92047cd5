"""A relay under attack, as a process: strangers who hold connections, and origins that a balancer names."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcbridge.errors import ArcbridgeError
from arcbridge.net.address import Address
from arcbridge.net.dialer import DIRECT, connect
from arcbridge.net.join import client_join
from arcbridge.net.tls import ALPN_HTTP, ALPN_JOIN, RelayTrust, outer_client_context
from arcbridge.wire.records import JoinRequest
from tests.relay.test_proxy_protocol import header, tlv
from tests.support.reports import metrics, records, until, wait_for_record
from tests.support.talk import Talk, TalkServer
from tests.support.world import ALICE, RELAY_AUDIENCE, ApiServer, User, World, fixed_port

ADDRESSES = [f"127.0.9.{number}" for number in range(1, 11)]
EACH = 100
REQUEST = b"GET /v1/ca HTTP/1.1\r\nHost: relay\r\n\r\n"


@pytest.fixture(params=[1, 2], ids=["one process", "two workers"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    (tmp_path / "token").write_text("an-unused-token")
    api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=tmp_path / "token")
    with World(api, directory=tmp_path / "world") as world:
        world.relay_settings = f"workers = {request.param}"
        yield world.start()


class Strangers:
    """Ten addresses with a hundred HTTPS connections each; every connection asks for the CA each 20 s and never ends by
    itself. One that is closed comes back. They run in a thread, as a process of its own would."""

    def __init__(self, world: World) -> None:
        self._port = world.relay_port
        self._context = ssl._create_unverified_context()
        self._context.set_alpn_protocols([ALPN_HTTP])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.tried: set[int] = set()
        """Those of the thousand that have come at least once."""

    def __enter__(self) -> Strangers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def _run(self) -> None:
        # So many handshakes at a time that the machine has something left for others.
        turns = asyncio.Semaphore(8)
        tasks = [
            asyncio.create_task(self._stranger(number, ADDRESSES[number % len(ADDRESSES)], turns))
            for number in range(len(ADDRESSES) * EACH)
        ]
        while not self._stop.is_set():
            await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _stranger(self, number: int, address: str, turns: asyncio.Semaphore) -> None:
        while True:
            writer: asyncio.StreamWriter | None = None
            try:
                async with turns:
                    reader, writer = await asyncio.open_connection(
                        "127.0.0.1", self._port, ssl=self._context, local_addr=(address, 0)
                    )
                    writer.write(REQUEST)
                    self.tried.add(number)
                while True:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(20):
                            while await reader.read(65536):
                                pass
                            break
                    writer.write(REQUEST)
            except OSError:
                self.tried.add(number)
            finally:
                if writer is not None:
                    writer.transport.abort()
            await asyncio.sleep(2)  # the pace of a stranger who comes again, which is what the test is about


class Caller:
    """An honest user, or one who is not: joins by hand, with a token for the relay and none for the cluster."""

    def __init__(self, world: World, user: User) -> None:
        self.world = world
        self.token = world.token(user, RELAY_AUDIENCE)
        ca = (world.relay_config.parent / "data" / "ca.crt").read_text()
        self._context = outer_client_context(RelayTrust(ca), ALPN_JOIN)
        self.http = outer_client_context(RelayTrust(ca), ALPN_HTTP)

    async def join(self) -> socket.socket:
        sock = await connect(Address("127.0.0.1", self.world.relay_port), deadline=10, proxy=DIRECT)
        request = JoinRequest(role="client", cluster=self.world.cluster, token=self.token)
        await client_join(sock, self._context, "127.0.0.1", request)
        return sock

    async def clusters(self) -> bytes:
        """Return the first line of what the HTTP API answers."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.world.relay_port, ssl=self.http)
        writer.write(f"GET /v1/clusters HTTP/1.1\r\nHost: relay\r\nAuthorization: Bearer {self.token}\r\n\r\n".encode())
        async with asyncio.timeout(10):
            line = await reader.readline()
        writer.transport.abort()
        return line


def relay_metrics(world: World) -> dict[str, float]:
    return {name.removeprefix("arcbridge_relay_"): value for name, value in metrics(world.relay_observe).items()}


@pytest.mark.timeout(240)  # a thousand handshakes before it begins
def test_idle_https_connections_shut_out_no_honest_caller(world: World) -> None:
    """docs/threats.md#J15: a thousand strangers from ten addresses; joins, requests and an agent beside them."""
    alice = Caller(world, ALICE)
    with Strangers(world) as strangers:
        until(lambda: len(strangers.tried) == len(ADDRESSES) * EACH, "all strangers have come", timeout=120)

        async def honest() -> list[str]:
            failures = []
            for number in range(60):
                try:
                    (await alice.join()).close()
                    if number % 6 == 0:
                        assert await alice.clusters() == b"HTTP/1.1 200 OK\r\n"
                except (ArcbridgeError, OSError, AssertionError) as error:
                    failures.append(f"{number}: {type(error).__name__}: {error}")
            return failures

        assert asyncio.run(honest()) == []
        # An agent that is started anew shakes hands for its control connection and is ready.
        world.agent.stop()
        world.start_agent()
        seen = relay_metrics(world)
    places = {name: value for name, value in seen.items() if name.startswith("connection_places")}
    assert places['connection_places{purpose="http"}'] <= 250
    assert sum(places.values()) <= 1000
    assert seen['connections_evicted_total{purpose="http"}'] > 0
    assert seen['connections_evicted_total{purpose="join"}'] == 0
    assert seen['connections_rejected_total{reason="cap_join"}'] == 0
    # The strangers leave, and nothing of them stays.
    until(lambda: relay_metrics(world)["connections_unauthenticated"] == 0, "the strangers have left", timeout=30)


class Balancer:
    """A TCP load balancer before the relay: says each connection's origin, then passes bytes. It gives every connection
    an address of its own, as if each came from another network."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.port = fixed_port()
        self.origins: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Balancer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def _run(self) -> None:
        async with await asyncio.start_server(self._serve, "127.0.0.1", self.port):
            while not self._stop.is_set():
                await asyncio.sleep(0.05)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        origin = f"2001:db8:0:{len(self.origins):x}::1"
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self.origins.append(origin)
        far_writer.write(header(origin, tlvs=tlv(0xEA, b"\x01vpce-1")))

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
                sink.write_eof()

        await asyncio.gather(pass_on(reader, far_writer), pass_on(far_reader, writer))
        for one in (writer, far_writer):
            one.close()


def test_behind_a_balancer(server: TalkServer, tmp_path: Path) -> None:
    """docs/threats.md#L2: agent and client reach the relay through a balancer alone, and the relay sees their own
    addresses: with two places for each address, which all of them together would exceed, everything works."""
    (tmp_path / "token").write_text("an-unused-token")
    api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=tmp_path / "token")
    with World(api, directory=tmp_path / "world") as world, Balancer(world.relay_port) as balancer:
        world.relay_settings = 'proxy_protocol_from = ["127.0.0.0/8"]'
        world.agent_routes = world.client_routes = [f"127.0.0.1:{balancer.port}"]
        world.targets["talk"] = (server.address, ALICE.groups)
        world.start_issuer()
        world.start_relay(extra="\n[limits]\nunauthenticated_per_address = 2\n")
        world.start_agent()
        _, port = world.start_forward("talk", ALICE)
        talk = Talk(port, world.relay_port, pause=0.002)
        talk.wait_moves(50_000)
        server.check(talk)
        joined = wait_for_record(world.relay, "joined")
        assert joined["source"] in balancer.origins
        assert len(records(world.relay, "joined")) == 1
        assert all(one["source"] in balancer.origins for one in records(world.relay, "agent enrolled"))
        seen = relay_metrics(world)
        assert seen['connections_rejected_total{reason="cap_address"}'] == 0
        # A connection that comes past the balancer has no header, and is refused.
        with socket.create_connection(("127.0.0.1", world.relay_port)) as sock:
            sock.settimeout(10)
            sock.sendall(b"\x16\x03\x01\x02\x00\x01")
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        assert relay_metrics(world)['connections_rejected_total{reason="proxy_missing"}'] == 1

"""Two relays, a near one and a far one: 10 and 150 ms lie before them, in the benchmarks' link.

Which one a client takes is asked of a hundred fresh clients in this process, and of whole processes; a session goes to
the far relay when the near one dies, and back again without a cut. The agent is beside both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from arcbridge.client.service import ClientContext, Terminal
from arcbridge.client.session import nearest_relay, session_manager
from arcbridge.settings.config import ClientConfig, LoginConfig
from bench.address import Address
from bench.load.build import NoCompiler
from bench.path.link import Link
from bench.path.link import Path as Way
from tests.client.echo_stream import Stream
from tests.client.session.test_session_manager import running
from tests.support.eventually import until
from tests.support.processes import require_or_skip, run
from tests.support.reports import wait_for_record
from tests.support.world import ALICE, ApiServer, World, arcbridge, fixed_port

NEAR_MS, FAR_MS = 10, 150
STARTS = 100


class Echo(socketserver.BaseRequestHandler):
    """A target that says everything back."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.request.recv(65536):
                self.request.sendall(data)


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def world(echo: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("nearest")
    (directory / "unused-token").write_text("an-unused-token")
    api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=directory / "unused-token")
    world = World(api, directory=directory, relays=2)
    world.targets["echo"] = (echo, ALICE.groups)
    # A hundred starts of one user within seconds.
    world.relay_settings = (
        "limits.requests_per_minute_per_user = 100_000\nlimits.connections_per_second_per_address = 10_000"
    )
    ways = zip((NEAR_MS, FAR_MS), world.relay_listens, strict=True)
    try:
        links = [Link(Way("way", ms), Address(*_host_and_port(listen))) for ms, listen in ways]
    except NoCompiler as error:
        require_or_skip("compiler", str(error))
    try:
        world.client_routes = [str(link.address) for link in links]
        with world:
            yield world.start()
    finally:
        for link in links:
            link.close()


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def config(world: World, directory: Path) -> ClientConfig:
    access, identity = world.login_files(ALICE, directory)
    return ClientConfig(
        relays=tuple(f"https://{route}" for route in reversed(world.client_routes)),
        relay_ca_pin=world.relay_pin,
        cluster=world.cluster,
        trust_first_use=True,
        state_dir=directory / "state",
        login=LoginConfig(access_token_file=access, id_token_file=identity),
    )


async def test_a_hundred_first_starts_take_the_near_relay(world: World, tmp_path: Path) -> None:
    settings = config(world, tmp_path)
    turns = asyncio.Semaphore(10)

    async def start(number: int) -> str:
        async with turns:
            fresh = ClientContext(replace(settings, state_dir=tmp_path / str(number)), Terminal(), environment={})
            session = fresh.session(world.cluster)
            await session.connector.nearest.learn()
            return str(session.connector.relays.order()[0].address)

    taken = await asyncio.gather(*map(start, range(STARTS)))
    assert taken.count(world.client_routes[0]) >= 0.95 * STARTS


def test_processes_take_it_and_show_it(world: World, tmp_path: Path) -> None:
    for _ in range(3):
        forward, _ = world.start_forward("echo")
        assert wait_for_record(forward, "session established")["relay"] == world.client_routes[0]
    found = json.loads(world.run_client(ALICE, "doctor", "-o", "json").stdout)
    (session,) = (one for one in found["hops"] if one["hop"] == "session")
    assert f"through https://{world.client_routes[0]}" in session["detail"]
    assert f"others are about https://{world.client_routes[1]}" in session["detail"]
    listed = run(arcbridge("--role", "relay", "session", "list", "--config", str(world.relay_config), "-o", "json"))
    sessions = json.loads(listed.stdout)
    assert len(sessions) >= 3
    assert all(0 < one["round_trip"] < 1 for one in sessions)


async def test_a_session_goes_back_to_the_near_relay_without_a_cut(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_manager, "FIRST_LOOK", 0.2)
    monkeypatch.setattr(session_manager, "LOOK", 0.2)
    monkeypatch.setattr(nearest_relay, "ASK_AGAIN", 0.5)
    near, far = world.client_routes
    session = ClientContext(config(world, tmp_path), Terminal(), environment={}).session(world.cluster)

    def through(route: str) -> bool:
        return session.relay is not None and str(session.relay.address) == route and not session.detached_count

    async with running(session):
        stream = await Stream.open(session)
        assert through(near)
        await stream.during(partial(asyncio.to_thread, world.kill_relay, 0))
        await until(lambda: session.counters.resumed == 1 and through(far), timeout=60)
        await stream.during(partial(asyncio.to_thread, world.start_relay, 0))
        await until(lambda: session.counters.moved == 1 and through(near), timeout=60)
        await stream.check(b"over the near one again")
        assert session.counters.resumed == 1, "the second time its connection was not lost"

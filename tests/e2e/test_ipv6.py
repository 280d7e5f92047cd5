"""All roles over IPv6: the relay listens there alone, and both ends are given its address in brackets."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from tests.e2e.test_upgrades import exchange
from tests.support.processes import require_or_skip
from tests.support.targets import EchoServer
from tests.support.world import ALICE, ApiServer, World, fixed_port


@pytest.fixture(scope="module")
def world(echo: EchoServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An organisation of which users use a TCP target alone: no API server is needed."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError as error:
        require_or_skip("ipv6", f"this machine has no IPv6 on loopback: {error}")
    directory = tmp_path_factory.mktemp("ipv6")
    (directory / "unused").write_text("token")
    api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=directory / "unused")
    world = World(api, directory=directory / "world")
    at = f"[::1]:{fixed_port()}"
    world.relay_listens, world.agent_routes, world.client_routes = [at], [at], [at]
    world.targets["echo"] = (echo.address, ("platform",))
    with world:
        yield world.start()


def test_bytes_pass_through_all_three(world: World) -> None:
    _, port = world.start_forward("echo")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        assert exchange(sock, b"over IPv6") == b"over IPv6"


def test_the_relay_is_listed_and_examined(world: World) -> None:
    assert world.run_client(ALICE, "clusters", "-o", "name", check=True).stdout == f"{world.cluster}\n"
    document = json.loads(world.run_client(ALICE, "doctor", "-o", "json").stdout)
    hops = {row["hop"]: row for row in document["hops"]}
    assert f"[::1]:{world.relay_port} accepts connections" in hops["TCP"]["detail"]
    assert document["cause"] == "api_server", "there is none, and all before it is well"

"""The small internet: who reaches whom, and what breaking it does."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from tests.support.netns import Network, missing
from tests.support.processes import require_or_skip


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := missing():
        require_or_skip("netns", reason)
    with Network(relays=1) as network:
        yield network


def reach(network: Network, source: str, destination: str, timeout: float = 5) -> socket.socket:
    """A connection from one place to a server at another."""
    server = network.socket(destination)
    with server:
        server.bind((network.address(destination), 7000))
        server.listen()
        sock = network.socket(source)
        sock.settimeout(timeout)
        try:
            sock.connect((network.address(destination), 7000))
        except BaseException:
            sock.close()
            raise
        return sock


def test_places_reach_each_other_and_nothing_else(network: Network) -> None:
    for source, destination in (("client", "relay0"), ("agent", "relay0"), ("relay0", "client")):
        reach(network, source, destination).close()
    with contextlib.closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))  # no other process listens there meanwhile
        with network.inside("client"):
            server = socket.create_server(held.getsockname())
        with server, pytest.raises(ConnectionRefusedError):  # another loopback
            socket.create_connection(held.getsockname(), timeout=5)


def test_a_black_hole_is_one_way_and_heals(network: Network) -> None:
    network.blackhole("client", "relay0")
    with pytest.raises(TimeoutError):
        reach(network, "client", "relay0", timeout=0.5)
    reach(network, "agent", "relay0").close()
    network.heal()
    reach(network, "client", "relay0").close()

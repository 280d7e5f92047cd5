"""The small internet: who reaches whom, and what breaking it does."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from tests.support.netns import PREFIX, Network, ip, missing
from tests.support.processes import require_or_skip
from tests.support.talk import Talk, TalkServer


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


def test_a_connection_outlives_an_unplugged_link_but_not_its_address(network: Network) -> None:
    listening = network.socket("relay0")
    listening.bind((network.address("relay0"), 7001))
    listening.listen()
    with TalkServer(listening) as server:
        sock = network.socket("client")
        sock.connect((network.address("relay0"), 7001))
        talk = Talk.over(sock, 1)
        talk.wait_moves(50_000)
        network.unplug("client")
        network.plug("client")
        talk.wait_moves(50_000)
        server.check(talk)
        before = network.address("client")
        network.move("client")
        assert network.address("client") != before
        sock = network.socket("client")
        sock.connect((network.address("relay0"), 7001))
        assert sock.getsockname()[0] == network.address("client")
        sock.close()


def test_nothing_is_left(network: Network) -> None:
    names = ip("netns", "list")
    assert network.name("client") in names
    network.close()
    assert network.name("client") not in ip("netns", "list")
    assert network.name("client").startswith(PREFIX)

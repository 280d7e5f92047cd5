"""Networks that go silent: black holes on each hop, a link that is down, another address. In network namespaces.

Nothing tells the ends here: no RST, no FIN, the kernels retransmit into nowhere. PING finds it within 25 seconds, the
session resumes through the other relay. Such rows take half a minute each; two of them run always, side by side, the
others with ARCBRIDGE_LONG=1.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.long import long_form
from tests.support.netns import Network, missing
from tests.support.processes import require_or_skip
from tests.support.reports import metrics, records, until
from tests.support.talk import Talk, TalkServer
from tests.support.world import ALICE, ApiServer, World, fixed_port

DEAD = 25.0
"""Seconds after which a silent connection is given up."""
LONGEST = 60.0
"""Seconds of standstill that are too many, on a machine however busy: the dead are found and the others are reached."""

LOST = "connection lost, waiting to resume"
BACK = "session resumed"
MOVED = "session moved to another connection"

slow = pytest.mark.skipif(not long_form(), reason="ARCBRIDGE_LONG=1 runs what takes minutes: more silence")


class Country:
    """A world in namespaces: a client, an agent and two relays, each on a link of its own."""

    _numbers = itertools.count(1)

    def __init__(self, directory: Path) -> None:
        self._stack = ExitStack()
        try:
            self._make(directory)
        except BaseException:
            self.close()
            raise

    def _make(self, directory: Path) -> None:
        self.network = network = self._stack.enter_context(Network(relays=2))
        listening = network.socket("agent")
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        self.server = self._stack.enter_context(TalkServer(listening))
        directory.mkdir()
        token = directory / "token"
        token.write_text("an-unused-token")
        api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=token)
        self.world = world = self._stack.enter_context(World(api, directory=directory / "world", relays=2))
        world.relay_listens = [f"{network.address(f'relay{index}')}:7443" for index in range(2)]
        world.agent_routes = list(world.relay_listens)
        world.client_routes = list(world.relay_listens)
        world.relay_prefixes = [network.prefix(f"relay{index}") for index in range(2)]
        world.agent_prefixes = [network.prefix("agent")]
        world.client_prefix = network.prefix("client")
        world.targets["talk"] = (self.server.address, ALICE.groups)
        world.start_issuer()
        for place in ("relay0", "relay1", "agent"):
            network.bridge(world.issuer.port, into=place)
        for index in range(2):
            network.bridge(world.relay_observes[index], out_of=f"relay{index}")
        network.bridge(world.agent_observe, out_of="agent")
        for index in range(2):
            world.start_relay(index)
        world.start_agent()
        until(lambda: all(self.relay_metric(index, "agents") for index in range(2)), "the agent is at both", timeout=60)
        self.forward, self._port = world.start_forward("talk")
        self.talks = [self.talk(pause=0.005), self.talk(pause=0.2)]
        for talk in self.talks:
            talk.wait_moves(20_000)

    def relay_metric(self, index: int, name: str) -> float:
        return metrics(self.world.relay_observes[index])[f"arcbridge_relay_{name}"]

    def talk(self, pause: float) -> Talk:
        sock = self.network.socket("client")
        sock.settimeout(20)
        sock.connect(("127.0.0.1", self._port))
        return Talk(sock, next(self._numbers), most=5000, pause=pause)

    @property
    def relay(self) -> int:
        """The relay through which the session passes."""
        (found,) = [index for index in range(2) if self.relay_metric(index, "pumps_open")]
        return found

    def silence(self, *ways: tuple[str, str]) -> None:
        """Drop packets silently; `relay` stands for the one through which the session passes."""
        name = f"relay{self.relay}"
        for source, destination in ways:
            self.network.blackhole(source.replace("relay", name), destination.replace("relay", name))

    def check(self) -> float:
        """End all talks in order and equal; return the longest standstill in seconds."""
        longest = 0.0
        for talk in self.talks:
            talk.wait_moves(10_000, timeout=LONGEST + 30)
            longest = max(longest, self.server.check(talk).longest_gap)
        return longest

    def close(self) -> None:
        for talk in getattr(self, "talks", []):
            talk.close()
        self._stack.close()


@pytest.fixture
def countries(tmp_path: Path) -> Iterator[Callable[[int], list[Country]]]:
    """Make the worlds in namespaces, which are gone after the test."""
    if reason := missing():
        require_or_skip("netns", reason)
    with ExitStack() as stack:

        def one(number: int) -> Country:
            country = Country(tmp_path / f"country-{number}")
            stack.callback(country.close)
            return country

        def make(count: int) -> list[Country]:
            with ThreadPoolExecutor(count) as pool:
                return list(pool.map(one, range(count)))

        yield make


def wait_for(country: Country, event: str, *, timeout: float) -> None:
    """Wait until the client has logged the event."""
    until(lambda: records(country.forward, event), f"{event}\n{country.forward.tail()}", timeout=timeout)


def resumed_through_the_other(country: Country, before: int) -> None:
    """The session was given up because nothing came, and passes through the other relay now."""
    wait_for(country, BACK, timeout=LONGEST + 20)
    assert country.relay_metric(1 - before, "pumps_open") == 1
    assert country.check() < LONGEST


HOPS = {
    "client to relay": [("client", "relay")],
    "relay to client": [("relay", "client")],
    "client and relay": [("client", "relay"), ("relay", "client")],
    "agent to relay": [("agent", "relay")],
    "relay to agent": [("relay", "agent")],
    "agent and relay": [("agent", "relay"), ("relay", "agent")],
}


@pytest.mark.timeout(300)  # four worlds, and half a minute of silence
def test_silence_another_address_and_a_link_that_is_down(countries: Callable[[int], list[Country]]) -> None:
    """The short form, side by side: the client's hop silent in one direction, the agent's in both; a client that moves,
    which it sees by itself; a link that is down for so short that TCP gets over it."""
    one, two, moving, unplugged = countries(4)
    before = [country.relay for country in (one, two)]
    one.silence(*HOPS["client to relay"])
    two.silence(*HOPS["agent and relay"])
    moving.network.move("client")
    unplugged.network.unplug("client")
    time.sleep(3)  # the length of that fault, whatever the others take: after 25 s a connection is given up
    unplugged.network.plug("client")
    wait_for(moving, MOVED, timeout=DEAD + 20)
    assert moving.check() < LONGEST
    for talk in unplugged.talks:
        talk.wait_moves(10_000, timeout=60)
    assert not records(unplugged.forward, LOST)
    unplugged.check()
    resumed_through_the_other(one, before[0])
    resumed_through_the_other(two, before[1])


@slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("hop", HOPS)
def test_silence_on_each_hop_in_each_direction(countries: Callable[[int], list[Country]], hop: str) -> None:
    (country,) = countries(1)
    before = country.relay
    country.silence(*HOPS[hop])
    resumed_through_the_other(country, before)


@slow
@pytest.mark.timeout(240)
def test_silence_everywhere_until_the_route_is_back(countries: Callable[[int], list[Country]]) -> None:
    (country,) = countries(1)
    for index in range(2):
        country.network.blackhole("client", f"relay{index}")
        country.network.blackhole(f"relay{index}", "client")
    wait_for(country, LOST, timeout=DEAD + 20)
    country.network.heal()
    wait_for(country, BACK, timeout=60)
    country.check()

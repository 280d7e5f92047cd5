"""Sessions that survive a frozen relay and cut or altered connections, and end with their agent or client.

Every byte of the talks in them is known.

Everything goes through `forward` to a TCP target; relays that are killed and stopped are in test_survival_kubectl.py,
silence in test_network.py. With ARCBRIDGE_LONG=1 the slow rows run, too.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.fault_proxy import FaultProxy, Plan
from tests.support.long import long_form
from tests.support.reports import metrics, records, until, wait_for_record
from tests.support.talk import Talk, TalkServer
from tests.support.world import ALICE, ApiServer, World, fixed_port

LOST, BACK = "connection lost, waiting to resume", "session resumed"

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def unused_api(tmp_path_factory: pytest.TempPathFactory) -> ApiServer:
    """The API server of an agent whose users only use TCP targets."""
    token = tmp_path_factory.mktemp("unused-api") / "token"
    token.write_text("an-unused-token")
    return ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=token)


def started(world: World, server: TalkServer) -> World:
    world.targets["talk"] = (server.address, ALICE.groups)
    return world.start()


@pytest.fixture(scope="module")
def world(unused_api: ApiServer, server: TalkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A relay and two agents."""
    with World(unused_api, directory=tmp_path_factory.mktemp("survival"), agents=2) as world:
        yield started(world, server)


def serving(world: World) -> int:
    """The agent that has the session."""
    found = [index for index, port in enumerate(world.agent_observes) if metrics(port)["arcbridge_agent_targets_open"]]
    assert len(found) == 1, found
    return found[0]


def talks(port: int, count: int = 4) -> list[Talk]:
    """Conversations that have begun: some small and chatty, some as fast as it goes."""
    found = [Talk(port, next(_numbers), pause=0 if index % 2 else 0.005) for index in range(count)]
    for talk in found:
        talk.wait_moves(50_000)
    return found


def go_on(server: TalkServer, under_way: list[Talk]) -> None:
    """Require that the talks move, end in order, and that both ends have seen the same."""
    for talk in under_way:
        talk.wait_moves(50_000)
    for talk in under_way:
        server.check(talk)


# -- agents and clients -----------------------------------------------------------------------------------------------


def test_a_killed_agent_resets_what_was_open_and_another_serves(world: World, server: TalkServer) -> None:
    until(
        lambda: metrics(world.relay_observe)["arcbridge_relay_agents"] == 2, "both agents are at the relay", timeout=60
    )
    forward, port = world.start_forward("talk")
    under_way = talks(port)
    mark = forward.mark()
    world.agents[serving(world)].kill()
    for talk in under_way:
        assert talk.wait_end(60) == "rst"  # never an end as if it were complete
        talk.close()
    record = wait_for_record(forward, "session could not be resumed", after=mark)
    assert record["reason"]
    assert record["after"] < 60  # at once, when the agent is known to be gone, not when 120 s are over
    go_on(server, talks(port, 2))


def test_a_client_that_ends_takes_its_streams_along(world: World, server: TalkServer) -> None:
    forward, port = world.start_forward("talk")
    under_way = talks(port, 2)
    forward.signal(signal.SIGTERM)
    assert forward.wait() == 0
    for talk in under_way:
        assert talk.wait_end(30) == "rst"
        assert server.side(talk.number).done.wait(30), "the agent closes the connection to the target at once"
        talk.close()


def test_a_frozen_relay_goes_on(world: World, server: TalkServer) -> None:
    forward, port = world.start_forward("talk")
    under_way = talks(port)
    world.relay.signal(signal.SIGSTOP)
    try:
        time.sleep(3)  # the length of the fault; after 25 s a connection is given up
    finally:
        world.relay.signal(signal.SIGCONT)
    go_on(server, under_way)
    assert not records(forward, LOST)


# -- the connections between ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hops(
    unused_api: ApiServer, server: TalkServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[World, FaultProxy, FaultProxy]]:
    """One relay, a fault proxy before it for the client, and another for the agent."""
    world = World(unused_api, directory=tmp_path_factory.mktemp("hops"))
    with (
        FaultProxy(("127.0.0.1", world.relay_port)) as client_side,
        FaultProxy(("127.0.0.1", world.relay_port)) as agent_side,
        world,
    ):
        world.client_routes, world.agent_routes = [client_side.address], [agent_side.address]
        yield started(world, server), client_side, agent_side


@pytest.mark.timeout(1000 if long_form() else 120)
@pytest.mark.parametrize("hop", ["client", "agent"] if long_form() else ["client"])
def test_connections_that_are_cut_and_altered_at_any_byte(
    hops: tuple[World, FaultProxy, FaultProxy], server: TalkServer, hop: str
) -> None:
    """Each connection is cut, or one bit of it is flipped, at a byte somewhere from its TLS handshakes on."""
    world, client_side, agent_side = hops
    proxy = client_side if hop == "client" else agent_side
    forward, port = world.start_forward("talk")
    under_way = talks(port)
    first = len(proxy.passages)
    plans = [Plan(cut_up=900, how="rst"), Plan(flip_down=900)]
    if long_form():
        plans += [Plan(cut_up=at, how="rst") for at in range(200, 3000, 200)]
        plans += [Plan(cut_down=at, how="fin") for at in range(100, 5000, 300)]
        plans += [Plan(flip_up=at) for at in (600, 1500, 2300)]
        plans += [Plan(flip_down=at) for at in (600, 2500, 4000)]
    proxy.plan = lambda number: plans[number - first] if number - first < len(plans) else Plan()
    try:
        proxy.cut("rst")
        proxy.wait(lambda: len(proxy.passages) > first + len(plans), timeout=900 if long_form() else 90)
        until(lambda: records(forward, BACK), "the client is back", timeout=60)
        go_on(server, under_way)
    finally:
        proxy.plan = lambda number: Plan()
    forward.stop()


def test_a_session_that_is_away_when_its_agent_is_told_to_stop_comes_back_and_ends_in_order(
    hops: tuple[World, FaultProxy, FaultProxy], server: TalkServer
) -> None:
    """Nothing of the client's waits for the agent to be gone: the relay asks one that drains for its own sessions."""
    world, client_side, _ = hops
    forward, port = world.start_forward("talk")
    under_way = talks(port)
    client_side.plan = lambda number: Plan(cut_up=0)
    try:
        client_side.cut("rst")
        wait_for_record(world.agent, "session detached")
        world.agent.signal(signal.SIGTERM)
        wait_for_record(world.agent, "agent stopping", step="waiting")
    finally:
        client_side.plan = lambda number: Plan()
    until(lambda: records(forward, BACK), "the client is back", timeout=30)
    until(lambda: records(forward, "the agent drains the session"), "the client knows that the agent goes")
    go_on(server, under_way)
    assert world.agent.wait(30) == 0
    forward.stop()

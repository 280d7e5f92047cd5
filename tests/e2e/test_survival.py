"""Sessions that survive: relays and agents are killed, stopped and cut off under talks whose every byte is known.

Everything goes through `forward` to a TCP target; what kubectl sees of the same is in test_survival_kubectl.py, silence
in test_network.py. With ARCBRIDGE_LONG=1 the slow rows run, too.
"""

from __future__ import annotations

import itertools
import signal
import socket
import time
from collections.abc import Iterator
from datetime import datetime

import pytest

from tests.support.fault_proxy import FaultProxy, Plan
from tests.support.long import long_form
from tests.support.processes import START, ManagedProcess, Mark
from tests.support.reports import metrics, records, until, wait_for_record
from tests.support.talk import Talk, TalkServer
from tests.support.world import ALICE, ApiServer, World, fixed_port

LOST = "connection lost, waiting to resume"
BACK = "session resumed"

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server() -> Iterator[TalkServer]:
    with TalkServer() as server:
        yield server


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
    """Two relays, two agents; each test leaves them running."""
    with World(unused_api, directory=tmp_path_factory.mktemp("survival"), relays=2, agents=2) as world:
        yield started(world, server)


@pytest.fixture
def whole(world: World) -> Iterator[World]:
    """The same, with every agent connected to both relays and no session left of the test before."""
    for index in range(2):
        if not world.relays[index].running:
            world.start_relay(index)
    # Agents whose connections never last wait longer and longer between two tries; fresh ones do not.
    for agent in world.agents:
        agent.kill()
    for index in range(2):
        world.start_agent(index, wait=False)
    until(lambda: connected(world, 0) == connected(world, 1) == 2, "both agents are at both relays", timeout=60)
    until(lambda: not pumping(world), "no session is left", timeout=60)
    yield world
    for process in world.processes:
        if process.name.startswith("forward") and process.running:
            process.stop()


def connected(world: World, relay: int) -> int:
    """Return how many agents a relay has."""
    return int(metrics(world.relay_observes[relay])["arcbridge_relay_agents"])


def pumping(world: World) -> list[int]:
    """The relays through which sessions pass."""
    running = [index for index, relay in enumerate(world.relays) if relay.running]
    return [index for index in running if metrics(world.relay_observes[index])["arcbridge_relay_pumps_open"]]


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


def refused(port: int) -> None:
    """Connect, and wait to be cut off, which raises ConnectionResetError."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        assert sock.recv(1) == b""


def resumed(forward: ManagedProcess, after: Mark, times: int = 1) -> None:
    """Require that the client logged the loss and then the resumption, which has the id of both connections."""
    until(lambda: len(records(forward, BACK, after=after)) >= times, "the client is back", timeout=60)
    begun = {record["session"] for record in records(forward, "session established")}
    for record in records(forward, BACK, after=after):
        assert record["first_session"] in begun
        assert record["session"] not in begun
    events = [record["event"] for record in records(forward, after=after)]
    assert events.index(LOST) < events.index(BACK)


def go_on(server: TalkServer, under_way: list[Talk]) -> None:
    """Require that the talks move, end in order, and that both ends have seen the same."""
    for talk in under_way:
        talk.wait_moves(50_000)
    for talk in under_way:
        server.check(talk)


# -- relays -----------------------------------------------------------------------------------------------------------


def missed(relay: ManagedProcess) -> float:
    """For how many seconds a relay has answered that it has other agents, but not the one with the session."""
    failed = records(relay, "join failed", code="NO_INSTANCE")
    times = [datetime.fromisoformat(record["timestamp"]) for record in failed]
    return (times[-1] - times[0]).total_seconds() if times else 0.0


@pytest.mark.timeout(240)
def test_after_an_outage_the_agent_may_come_back_long_after_another_one(whole: World, server: TalkServer) -> None:
    """Each agent has a backoff of its own. Without an outage, one that is missing is given up after ten seconds."""
    forward, port = whole.start_forward("talk")
    under_way = talks(port)
    mark, agent = forward.mark(), whole.agents[serving(whole)]
    for index in range(2):
        whole.kill_relay(index)
    with pytest.raises(ConnectionResetError):
        refused(port)  # the client has met the outage, too
    agent.signal(signal.SIGSTOP)
    try:
        whole.start_relay(1)
        until(lambda: connected(whole, 1) == 1, "the other agent is back", timeout=60)
        until(lambda: missed(whole.relays[1]) > 10, "it has been missing for more than ten seconds", timeout=60)
        assert [talk.side.end for talk in under_way] == ["open"] * len(under_way)
    finally:
        agent.signal(signal.SIGCONT)
    go_on(server, under_way)
    resumed(forward, mark)


# -- agents and clients -----------------------------------------------------------------------------------------------


def test_a_killed_agent_resets_what_was_open_and_another_serves(whole: World, server: TalkServer) -> None:
    forward, port = whole.start_forward("talk")
    under_way = talks(port)
    mark = forward.mark()
    agent = serving(whole)
    whole.agents[agent].kill()
    for talk in under_way:
        assert talk.wait_end(60) == "rst"  # never an end as if it were complete
        talk.close()
    record = wait_for_record(forward, "session could not be resumed", after=mark)
    assert record["reason"]
    assert record["after"] < 60  # at once, when the agent is known to be gone, not when 120 s are over
    go_on(server, talks(port, 2))
    assert serving_now(whole) == {1 - agent}


def serving_now(world: World) -> set[int]:
    return {
        index
        for index, agent in enumerate(world.agents)
        if agent.running and metrics(world.agent_observes[index])["arcbridge_agent_sessions"]
    }


def test_a_frozen_relay_goes_on(whole: World, server: TalkServer) -> None:
    forward, port = whole.start_forward("talk")
    under_way = talks(port)
    (relay,) = pumping(whole)
    whole.relays[relay].signal(signal.SIGSTOP)
    try:
        if long_form():
            resumed(forward, START)
            go_on(server, under_way)
            under_way = talks(port)
        else:
            pause(3)
    finally:
        whole.relays[relay].signal(signal.SIGCONT)
    go_on(server, under_way)


def pause(seconds: float) -> None:
    """The length of a fault. Nothing is expected to have happened when it is over."""
    time.sleep(seconds)


@pytest.mark.timeout(240)
@pytest.mark.skipif(not long_form(), reason="ARCBRIDGE_LONG=1 runs what takes minutes: a killed client")
def test_a_killed_client_is_forgotten(whole: World, server: TalkServer) -> None:
    forward, port = whole.start_forward("talk")
    under_way = talks(port)
    agent = serving(whole)
    forward.kill()
    for talk in under_way:
        # The agent cannot tell a dead client from a broken network: it keeps the session for two minutes.
        assert server.side(talk.number).done.wait(180)
        talk.close()
    until(lambda: not metrics(whole.agent_observes[agent])["arcbridge_agent_sessions"], "session gone")


@pytest.mark.timeout(300)
@pytest.mark.skipif(not long_form(), reason="ARCBRIDGE_LONG=1 runs what takes minutes: relays away for too long")
def test_relays_that_are_away_for_too_long(whole: World, server: TalkServer) -> None:
    forward, port = whole.start_forward("talk")
    under_way = talks(port)
    for index in range(2):
        whole.kill_relay(index)
    for talk in under_way:
        assert talk.wait_end(200) == "rst"
        assert server.side(talk.number).done.wait(60)
        talk.close()
    assert wait_for_record(forward, "session could not be resumed")["after"] >= 100
    whole.start_relay(0)
    until(lambda: connected(whole, 0), "an agent is back", timeout=60)
    pause(1.5)  # for a second a caller is told what the last attempt met
    go_on(server, talks(port, 1))


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

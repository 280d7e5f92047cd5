"""The relay's CA and a cluster's CA are rotated under what people have open; and the relay's is replaced at once."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcbridge.relay.data_dir import read_rotation
from tests.e2e.test_survival_kubectl import Everything, Loop
from tests.support.cluster import KUBECTL_MINORS, Cluster, Kubectl
from tests.support.processes import run
from tests.support.reports import metrics, until, wait_for_record
from tests.support.world import ALICE, ApiServer, Client, World, arcbridge

MIB = 1 << 20
NEWEST = 'arcbridge_relay_cluster_agents_newest_ca{{ca="relay",cluster="{cluster}"}}'
BEHIND, STEP_AT = "arcbridge_relay_ca_rotation_agents_behind", "arcbridge_relay_ca_rotation_step_timestamp_seconds"


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A relay of two workers, and two agents of one cluster."""
    world = World(api, directory=tmp_path_factory.mktemp("rotation"), agents=2)
    world.relay_settings = "workers = 2"
    with world:
        yield world.start()


@pytest.fixture
def alice(world: World) -> Iterator[Client]:
    client = world.start_client(ALICE)
    yield client
    client.process.stop()


@pytest.fixture
def kubectl(cluster: Cluster, alice: Client) -> Kubectl:
    return cluster.kubectl_for(KUBECTL_MINORS[0], alice.kubeconfig)


@pytest.fixture
def everything(kubectl: Kubectl, cluster: Cluster, tmp_path: Path) -> Iterator[Everything]:
    with Everything(kubectl, cluster, tmp_path, 4 * MIB) as found:
        found.wait_moves()
        yield found


def ca(world: World, role: str, *words: str, check: bool = True) -> tuple[int, str, str]:
    """Run a command on the CA of the relay or of the agents' cluster."""
    config = world.relay_config if role == "relay" else world.agent_config
    done = run(arcbridge("--role", role, "ca", *words, "--config", str(config)), check=check, timeout=180)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def step(world: World, role: str, name: str, *words: str) -> None:
    """Take a step as soon as it may be taken, and try no sooner where the relay's metrics say when that is."""
    if role == "relay":
        until(lambda: metrics(world.relay_observe)[BEHIND] == 0, "agents have followed the step before", timeout=200)
    until(lambda: ca(world, role, name, *words, check=False)[0] == 0, f"{role} ca {name}", timeout=300)
    if role == "agent":
        for agent in world.agents:
            mark = agent.mark()
            agent.signal(signal.SIGHUP)  # they would read their store within minutes
            wait_for_record(agent, "settings reloaded", after=mark)


def cluster_pins(world: World) -> tuple[list[str], str]:
    """The pins that the relay gives for the cluster: all that followed each other, and the oldest that counts."""
    words = ("--role", "relay", "cluster", "list", "-o", "json", "--config", str(world.relay_config))
    done = run(arcbridge(*words), timeout=180)
    (row,) = json.loads(done.stdout)
    return row["relay_ca"].split(), row["cluster_ca_pin"]


@pytest.mark.timeout(900)
def test_both_cas_rotate_under_load(
    world: World, alice: Client, cluster: Cluster, kubectl: Kubectl, everything: Everything
) -> None:
    data = world.relay_config.parent / "data"
    first, (_, first_cluster) = read_rotation(data).list.pins[0], cluster_pins(world)
    loop = Loop(kubectl, pause=1.0)  # it shares the machine with all that is under way
    try:
        # The relay's own, as an operator does it; each step is refused until all have followed.
        everything.copy()
        step(world, "relay", "next")
        code, _, error = ca(world, "relay", "retire", check=False)
        assert code
        assert "does not come now" in error
        step(world, "relay", "activate")
        everything.copy()
        until(lambda: metrics(world.relay_observe)[BEHIND] == 0, "agents have renewed", timeout=200)
        assert metrics(world.relay_observe)[STEP_AT] > 0
        until(lambda: metrics(world.relay_observe)[NEWEST.format(cluster=world.cluster)] == 2, "both agents know it")
        followed = "followed by 1 of 1 clusters, 2 of 2 agents"
        until(lambda: followed in ca(world, "relay", "status")[1], "status says that both have renewed", timeout=200)
        assert "of 1 users" in ca(world, "relay", "status")[1], "of alice, by her last join"
        step(world, "relay", "retire")
        until(lambda: metrics(world.relay_observe)[STEP_AT] == 0, "the rotation is over", timeout=30)
        everything.wait_moves()
        second = read_rotation(data).list.pins[-1]
        assert second != first
        assert cluster_pins(world)[0] == [second[:19]]
        # A cluster's: it waits for a time instead, because its users are not known.
        step(world, "agent", "next")
        code, _, error = ca(world, "agent", "activate", check=False)
        assert code
        assert "are left. Wait for them" in error
        everything.copy()
        step(world, "agent", "activate", "--force")
        step(world, "agent", "retire", "--force")
        until(lambda: cluster_pins(world)[1] != first_cluster, "the relay gives the new CA", timeout=60)
    finally:
        loop.stop()
    acts = [json.loads(line) for line in (data / "audit.jsonl").read_text().splitlines()]
    done = [(one["act"], one.get("worker")) for one in acts if one.get("outcome") == "done"]
    for act in ("ca next", "ca activate", "ca retire"):
        assert [one for one, _ in done].count(act) == 1, act
    assert [done.count(("ca follow", worker)) for worker in (0, 1)] == [3, 3], "each worker, each step"
    assert [one for one, _ in done].count("cluster ca follow") >= 3
    assert not loop.failures
    assert loop.done > 3
    # Each connection is made anew.
    world.stop_relay()
    world.start_relay()
    everything.wait_moves()
    everything.check()
    kept = alice.directory / "state" / "arcbridge" / "successions"
    assert {one.stem for one in kept.glob("*.pem")} == {first.partition(":")[2], first_cluster.partition(":")[2]}
    # One that was away all the time, and knows nothing but the first pins, follows and says nothing.
    late = world.start_client(ALICE, "--cluster-ca-pin", first_cluster)
    cluster.kubectl_for(KUBECTL_MINORS[0], late.kubeconfig).run("get", "namespaces")
    late.process.stop()
    # So does an agent that starts with the settings of the first day.
    world.agents[1].stop()
    world.start_agent(1)


@pytest.mark.timeout(300)
def test_the_relay_s_ca_is_replaced_at_once(world: World, alice: Client, cluster: Cluster, kubectl: Kubectl) -> None:
    """Without overlap, as docs/how-to/rotate-a-ca.md says; the cluster's CA stays."""
    kubectl.run("get", "namespaces")
    former, (_, cluster_pin) = world.relay_pin, cluster_pins(world)
    world.stop_relay()
    for file in (world.relay_config.parent / "data").glob("ca*"):
        file.unlink()
    world.start_relay()
    for index in (0, 1):
        world.agents[index].stop()
        world.start_agent(index)  # with the new pin and a join token, of which one is enough for both
    assert world.relay_pin != former
    until(lambda: f"found {world.relay_pin}" in refused(kubectl), "the former client names both pins", timeout=60)
    again = world.start_client(ALICE, "--cluster-ca-pin", cluster_pin)
    cluster.kubectl_for(KUBECTL_MINORS[0], again.kubeconfig).run("get", "namespaces")
    again.process.stop()


def refused(kubectl: Kubectl) -> str:
    done = kubectl.run("get", "namespaces", check=False)
    assert done.returncode
    return str(done.stderr)

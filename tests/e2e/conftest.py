"""One real cluster and one organisation for all end-to-end tests; each gets clients of its own where it matters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, Kubectl, Unavailable, kubectl_versions
from tests.support.processes import require_or_skip
from tests.support.talk import TalkServer
from tests.support.targets import EchoServer
from tests.support.world import ALICE, ApiServer, Client, World


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real kube-apiserver with etcd and a node; the agent has the shipped manifests, and may act as any user."""
    try:
        cluster = Cluster(directory=tmp_path_factory.mktemp("cluster"))
    except Unavailable as error:
        require_or_skip("apiserver", str(error))
    with cluster:
        cluster.install_agent()
        cluster.grant("cluster-admin", group="platform")
        cluster.grant("view", group="developers")
        yield cluster


@pytest.fixture(scope="session")
def api(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> ApiServer:
    """How the agent reaches the cluster: the ServiceAccount token of the shipped manifests."""
    token = tmp_path_factory.mktemp("agent") / "token"
    token.write_text(cluster.service_account_token("arcbridge", "arcbridge-agent"))
    return ApiServer(cluster.api_url, Path(cluster.ca_file), token)


@pytest.fixture(scope="session")
def echo() -> Iterator[EchoServer]:
    """A TCP server on loopback that echoes, for the agent's TCP targets."""
    with EchoServer() as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[TalkServer]:
    """A target that counts and checks what talks send."""
    with TalkServer() as server:
        yield server


@pytest.fixture(scope="session")
def world(api: ApiServer, echo: EchoServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Issuer, relay and agent as processes."""
    world = World(api, directory=tmp_path_factory.mktemp("world"))
    world.targets["echo"] = (echo.address, ("platform",))
    world.targets["closed"] = ("127.0.0.1:9", ("platform",))
    with world:
        yield world.start()


@pytest.fixture(scope="session")
def alice(world: World) -> Client:
    """A client of a person who may do everything in the cluster."""
    return world.start_client(ALICE)


@pytest.fixture(scope="session", params=sorted(kubectl_versions()) or ["none"])
def kubectl_version(request: pytest.FixtureRequest) -> str:
    """Each kubectl that this machine has."""
    if request.param == "none":
        require_or_skip("kubectl", "no kubectl: install the dev dependencies, or Go to build one")
    return str(request.param)


@pytest.fixture(scope="session")
def kubectl(cluster: Cluster, alice: Client, kubectl_version: str) -> Kubectl:
    """kubectl through client, relay and agent."""
    return cluster.kubectl_for(kubectl_version, alice.kubeconfig)


@pytest.fixture(scope="session")
def direct(cluster: Cluster, kubectl_version: str) -> Kubectl:
    """The same kubectl straight to the API server, as administrator."""
    return cluster.kubectl_for(kubectl_version)

"""Both ends behind real proxies with credentials: the relay and the issuer are reached through them alone.

One agent goes through tinyproxy (HTTP CONNECT), another one of the same cluster through microsocks (SOCKS 5), and
clients through each of the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from tests.support.cluster import Cluster, Kubectl
from tests.support.proxies import PASSWORD, PROXIES, OutboundProxy
from tests.support.reports import until
from tests.support.world import ALICE, ApiServer, World, arcbridge

SCHEMES = ("http", "socks5")
VARIABLE = {"http": "HTTPS_PROXY", "socks5": "ALL_PROXY"}


@pytest.fixture(scope="module")
def proxies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, OutboundProxy]]:
    running = {scheme: PROXIES[scheme](tmp_path_factory.mktemp(scheme)) for scheme in SCHEMES}
    yield running
    for proxy in running.values():
        proxy.process.stop()


@pytest.fixture(scope="module")
def world(
    api: ApiServer, proxies: dict[str, OutboundProxy], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    world = World(api, directory=tmp_path_factory.mktemp("proxied"), agents=2)
    world.agent_prefixes = [("env", f"{VARIABLE[scheme]}={proxies[scheme].url()}") for scheme in SCHEMES]
    with world:
        yield world.start()


def test_agents_reach_the_relay_through_both(world: World, proxies: dict[str, OutboundProxy]) -> None:
    issuer = urlsplit(world.issuer.url).port
    assert issuer is not None
    for scheme in SCHEMES:
        for port in (world.relay_port, issuer):
            until(partial(proxies[scheme].carried, port), f"the {scheme} proxy was asked for {port}")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kubectl_through_a_proxy(
    scheme: str, world: World, proxies: dict[str, OutboundProxy], cluster: Cluster
) -> None:
    before = proxies[scheme].carried(world.relay_port)
    client = world.start_client(ALICE, env={VARIABLE[scheme]: proxies[scheme].url()})
    try:
        answer = Kubectl(cluster.binaries.kubectl, client.kubeconfig, client.directory / "home").run(
            "get", "namespaces", "-o", "name"
        )
        assert "namespace/default" in answer.stdout.split()
        until(lambda: proxies[scheme].carried(world.relay_port) > before, "the relay was reached through the proxy")
    finally:
        client.process.stop()
    assert PASSWORD not in client.process.output()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_login_and_list_through_a_proxy(
    scheme: str, world: World, proxies: dict[str, OutboundProxy], tmp_path: Path
) -> None:
    """What asks by aiohttp: the issuer's endpoints, and the relay's list of clusters."""
    arguments = world.login_arguments()
    environment = {**world.client_env(tmp_path, None), VARIABLE[scheme]: proxies[scheme].url()}
    process = world._start(f"login-{scheme}", arcbridge(*arguments, "login", "--wait", "100s"), env=environment)
    world.approve(process)
    port = urlsplit(world.issuer.url).port
    assert port is not None
    assert until(lambda: proxies[scheme].carried(port), "the issuer was reached through the proxy")
    clusters = world._start(f"clusters-{scheme}", arcbridge(*arguments, "clusters"), env=environment)
    assert clusters.wait(30) == 0, clusters.tail()
    assert world.cluster in clusters.output()
    assert PASSWORD not in process.output() + clusters.output()


def test_no_log_has_the_credentials(world: World, proxies: dict[str, OutboundProxy]) -> None:
    """Of all roles, and of what was tried above."""
    texts = [path.read_text(errors="replace") for path in world.logs.rglob("*.log")]
    assert texts
    for text in texts:
        assert PASSWORD not in text
        assert quote(PASSWORD, safe="") not in text

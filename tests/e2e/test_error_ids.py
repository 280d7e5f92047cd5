"""What kubectl shows of our own refusals: the reason, and an id by which the logs have it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Kubectl, kubectl_binary
from tests.support.reports import agent_again, audited, rewrite, until, wait_for_record
from tests.support.world import ALICE, ApiServer, World, fixed_port


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An organisation whose agent cannot reach its API server."""
    nowhere = ApiServer(f"https://127.0.0.1:{fixed_port()}", api.ca_file, api.token_file)
    with World(nowhere, directory=tmp_path_factory.mktemp("ids")) as world:
        world.start_issuer()
        world.start_relay()
        world.start_agent(wait=False)
        yield world


def kubectl(kubeconfig: Path, directory: Path) -> Kubectl:
    return Kubectl(kubectl_binary("1.36"), kubeconfig, directory / "home")


def test_an_agent_s_refusal_has_the_request_s_id(world: World, tmp_path: Path) -> None:
    until(lambda: any(row["agents"] for row in json.loads(listed(world))), "the agent is connected", timeout=40)
    client = world.start_client(ALICE)
    done = kubectl(client.kubeconfig, tmp_path).run("get", "--raw", "/api/v1/namespaces", check=False)
    assert done.returncode == 1
    found = re.search(r"arcbridge: .+ \(request ([\w-]+)\)$", done.stderr.strip())
    assert found is not None, done.stderr
    assert audited(world, "the refusal", request=found[1])["status"] == 503
    assert found[1].startswith(wait_for_record(client.process, "session established")["session"])


def listed(world: World) -> str:
    return world.run_client(ALICE, "clusters", "-o", "json", check=True).stdout


def test_a_client_s_refusal_has_the_session_s_id_and_the_reason(world: World, tmp_path: Path) -> None:
    until(lambda: any(row["agents"] for row in json.loads(listed(world))), "the agent is connected", timeout=40)
    client = world.start_client(ALICE)
    rewrite(client.directory / "id-token", world.token(ALICE, "another-cluster"))
    world.agent.stop()
    agent_again(world, wait=False)
    # The client comes back by itself, after a delay that grows while there is no agent.
    refused = wait_for_record(world.agent, "session refused", timeout=40)
    assert "audience" in str(refused["reason"])
    done = kubectl(client.kubeconfig, tmp_path).run("get", "--raw", "/version", check=False)
    assert done.returncode == 1
    found = re.search(
        r"does not accept the token: \S+ is for audience \"another-cluster\", its agent wants .* \(session ([\w.-]+)\)",
        done.stderr,
    )
    assert found is not None, done.stderr
    wait_for_record(world.agent, "session refused", session=found[1])

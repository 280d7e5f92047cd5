"""Token mode: the caller's own ServiceAccount token goes to the API server unchanged, and no user is impersonated."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import yaml

from tests.support.cluster import KUBECTL_MINORS, Cluster, Kubectl
from tests.support.reports import audited, rewrite, until
from tests.support.world import ALICE, Client, World

NAMESPACE = "token-mode"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:robot"


@pytest.fixture(scope="module")
def token(cluster: Cluster) -> str:
    """The token of a service account that may read everything, and nothing else."""
    text = cluster.service_account_token(NAMESPACE, "robot")
    cluster.grant("view", service_account=(NAMESPACE, "robot"))
    return text


@pytest.fixture(scope="module")
def robot(world: World, token: str) -> Iterator[Client]:
    """A client whose cluster token comes from a file."""
    path = world.directory / "robot-token"
    path.write_text(token)
    path.chmod(0o600)
    client = world.start_client(ALICE, "--token-file", str(path))
    yield client
    client.process.stop()


@pytest.fixture(scope="module")
def kubectl(cluster: Cluster, robot: Client) -> Kubectl:
    return cluster.kubectl_for(KUBECTL_MINORS[0], robot.kubeconfig)


def test_the_api_server_sees_the_service_account_itself(kubectl: Kubectl, cluster: Cluster, world: World) -> None:
    info = json.loads(kubectl.run("auth", "whoami", "-o", "json").stdout)["status"]["userInfo"]
    assert info["username"] == ACCOUNT
    assert f"system:serviceaccounts:{NAMESPACE}" in info["groups"]
    assert not any("arcbridge" in key for key in info.get("extra", {}))
    events = until(
        lambda: [event for event in cluster.audit_events() if event["user"].get("username") == ACCOUNT],
        "the API server has recorded it",
    )
    assert all("impersonatedUser" not in event for event in events)
    audited(world, "the account", user=ACCOUNT)


def test_rights_are_those_of_the_account(kubectl: Kubectl) -> None:
    assert kubectl.run("get", "pods", "-A", check=False).returncode == 0
    refused = kubectl.run("create", "namespace", "not-by-a-robot", check=False)
    assert refused.returncode == 1
    assert f'User "{ACCOUNT}" cannot create resource "namespaces"' in refused.stderr


def test_a_wrong_token_is_401_at_once(kubectl: Kubectl, world: World, robot: Client, token: str) -> None:
    """kubectl sends what its kubeconfig says; the API server judges it for each request."""
    config = yaml.safe_load(robot.kubeconfig.read_text())
    user = config["users"][0]["user"]
    del user["tokenFile"]
    user["token"] = token[:-8] + "AAAAAAAA"
    path = robot.directory / "wrong"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(config))
    refused = Kubectl(kubectl.binary, path, robot.directory / "wrong-home").run("get", "pods", check=False)
    assert refused.returncode == 1
    assert "You must be logged in to the server" in refused.stderr
    # A request without a token must not borrow the agent's own.
    del user["token"]
    path.write_text(yaml.safe_dump(config))
    refused = Kubectl(kubectl.binary, path, robot.directory / "wrong-home").run(
        "get", "--raw", "/api/v1/namespaces", check=False
    )
    assert refused.returncode == 1
    assert "namespaces" in refused.stderr or "logged in" in refused.stderr


def test_a_new_token_in_the_file_is_taken(world: World, cluster: Cluster, robot: Client, kubectl: Kubectl) -> None:
    def answers() -> bool:
        return ACCOUNT in kubectl.run("auth", "whoami", check=False).stdout

    # One that nobody takes first: the file is what counts, and not the token that the client was started with.
    rewrite(world.directory / "robot-token", "not-a-token-of-this-cluster")
    until(lambda: not answers(), "the file's token is refused")
    rewrite(world.directory / "robot-token", cluster.service_account_token(NAMESPACE, "robot", lifetime=7200))
    until(answers, "the new token works", timeout=30)

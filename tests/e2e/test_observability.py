"""Operators see metrics, health and one id from end to end; no output shows a secret."""

from __future__ import annotations

import base64
import re
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.cluster import KUBECTL_MINORS, Cluster, Kubectl
from tests.support.reports import page, until, wait_for_record
from tests.support.world import ALICE, CLUSTER_AUDIENCE, ApiServer, Client, World, fixed_port

NAMESPACE = "observed"


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An organisation of this module's own: all it says is counted."""
    with World(api, directory=tmp_path_factory.mktemp("observed")) as world:
        yield world.start()


@pytest.fixture(scope="module")
def client_observe() -> int:
    return fixed_port()


@pytest.fixture(scope="module")
def alice(world: World, client_observe: int) -> Iterator[Client]:
    flags = ("--observe-listen", f"127.0.0.1:{client_observe}", "--log-format", "json")
    client = world.start_client(ALICE, *flags)
    client.process.wait_for_line("Press Ctrl")
    yield client
    client.process.stop()  # first: a relay waits for sessions


@pytest.fixture
def kubectl(cluster: Cluster, alice: Client) -> Kubectl:
    return cluster.kubectl_for(KUBECTL_MINORS[0], alice.kubeconfig)


@pytest.fixture
def ports(world: World, alice: Client, client_observe: int) -> dict[str, int]:
    return {"relay": world.relay_observe, "agent": world.agent_observe, "client": client_observe}


@pytest.mark.parametrize("role", ["relay", "agent", "client"])
def test_pages_of_each_role(ports: dict[str, int], role: str) -> None:
    families = list(text_string_to_metric_families(page(ports[role])))
    assert families
    for family in families:
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram", "info")
    ours = {family.name for family in families if family.name.startswith("arcbridge_")}
    assert any(name.startswith(f"arcbridge_{role}_") for name in ours)
    for path in ("/healthz", "/livez", "/readyz"):
        assert page(ports[role], path)
    with pytest.raises(urllib.error.HTTPError) as caught:
        page(ports[role], "/no-such-page")
    assert caught.value.code == 404
    caught.value.close()


def test_one_session_id_in_all_logs(world: World, alice: Client) -> None:
    session = wait_for_record(alice.process, "session established")["session"]
    assert len(session) == 16
    assert wait_for_record(world.relay, "joined", session=session)["user"] == ALICE.email
    assert wait_for_record(world.agent, "session opened", session=session)["user"] == ALICE.email


def test_one_request_id_to_the_api_servers_audit(
    world: World, alice: Client, kubectl: Kubectl, cluster: Cluster
) -> None:
    session = wait_for_record(alice.process, "session established")["session"]
    kubectl.run("get", "--raw", "/api/v1/namespaces/default/configmaps/looked-for", check=False)

    def ours() -> list[str]:
        return [str(one["request"]) for one in world.audit_records() if one.get("name") == "looked-for"]

    (request,) = until(ours, "the request is audited")
    assert request.startswith(f"{session}-")
    events = until(
        lambda: [event for event in cluster.audit_events() if event["auditID"] == request],
        "the API server has audited it under the same id",
    )
    assert {event["impersonatedUser"]["username"] for event in events} == {ALICE.email}


def test_readiness_says_what_is_missing(world: World, ports: dict[str, int], alice: Client) -> None:
    """An agent without a relay is alive and not ready; it becomes ready by itself."""
    world.relay.kill()

    def reason() -> str:
        try:
            page(ports["agent"], "/readyz")
        except urllib.error.HTTPError as error:
            return f"{error.code} {error.read().decode()}"
        return ""

    told = until(reason, "the agent is not ready")
    assert told.startswith("503 ")
    assert "control" in told
    assert page(ports["agent"], "/healthz")
    world.start_relay()
    until(lambda: not reason(), "the agent is ready again", timeout=40)


def test_no_secret_is_anywhere(
    world: World, alice: Client, kubectl: Kubectl, cluster: Cluster, ports: dict[str, int]
) -> None:
    """Canaries: every secret that the run used, looked for in all that was written or can be seen."""
    bearer = cluster.service_account_token(NAMESPACE, "canary")
    token_file = world.directory / "canary-token"
    token_file.write_text(bearer)
    robot = world.start_client(ALICE, "--token-file", str(token_file), "--log-level", "debug")
    robot.process.wait_for_line("Press Ctrl")
    cluster.kubectl_for(KUBECTL_MINORS[0], robot.kubeconfig).run("get", "--raw", "/version")
    refused = world.issuer.mint(sub="alice", aud=CLUSTER_AUDIENCE, email=ALICE.email, foreign=True)
    (world.directory / "refused").write_text(refused)
    world.run_client(ALICE, "--access-token-file", str(world.directory / "refused"), "run", "--", "true")
    world.run_client(ALICE, "--id-token-file", str(world.directory / "refused"), "run", "--", "true")
    until(lambda: kubectl.run("get", "--raw", "/version", check=False).returncode == 0, "kubectl works", timeout=40)
    kubectl.run("create", "secret", "generic", "canary", "--from-literal=key=canary-in-a-secret")
    kubectl.run("get", "secret", "canary", "-o", "yaml")
    kubectl.run("delete", "secret", "canary")
    kubectl.run("get", "--raw", "/api/v1/namespaces?token=canary-in-a-query", check=False)

    secrets = {"bearer": bearer, "refused": refused}
    secrets["body"], secrets["encoded body"] = "canary-in-a-secret", "Y2FuYXJ5LWluLWEtc2VjcmV0"
    secrets["query"] = "canary-in-a-query"
    secrets["join token"] = (world.agent_config.parent / "join-token").read_text().strip().partition(".")[2]
    secrets["agent's own token"] = (world.api.token_file or Path()).read_text().strip()
    for path in world.directory.rglob("*-token"):
        if path.is_file():
            secrets[str(path)] = path.read_text().strip()
    keys = 0
    for path in world.directory.rglob("*"):
        text = path.read_text(errors="replace") if path.is_file() else ""
        # The agent's state and kubeconfigs hold keys in base64.
        for word in re.findall(r"[A-Za-z0-9+/]{100,}", text):
            text += base64.b64decode(word[: len(word) // 4 * 4]).decode(errors="replace")
        for block in re.findall(r"-----BEGIN [A-Z ]*PRIVATE KEY-----\n(.*?)-----END", text, re.DOTALL):
            keys += 1
            for number, line in enumerate(block.split()):
                if len(line) == 64 and number:  # the first line names the algorithm, as any key's does
                    secrets[f"key {keys} of {path}, line {number}"] = line
    assert keys >= 8  # issuer, relay, agent, cluster, clients
    assert all(len(secret) >= 16 for secret in secrets.values())
    # Of a signed token the signature alone is the secret part; the others may not be there either.
    pieces = {
        name: {part for part in secret.split(".") if len(part) > 40} | {secret} for name, secret in secrets.items()
    }

    places = {str(path): path.read_text(errors="replace") for path in world.logs.iterdir()}
    places["audit"] = world.audit_log.read_text()
    for role, port in ports.items():
        places[f"metrics of the {role}"] = page(port)
    for process in world.processes:
        if process.running:
            for name in ("cmdline", "comm"):
                places[f"{name} of {process.name}"] = Path(f"/proc/{process.pid}/{name}").read_text()
    assert len(places) > 10
    found = [
        (name, place)
        for place, text in places.items()
        for name, parts in pieces.items()
        if any(part in text for part in parts)
    ]
    assert found == []
    robot.process.stop()

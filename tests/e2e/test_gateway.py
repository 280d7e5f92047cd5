"""The gateway with real users, a real relay that restarts, kubectl, and a program that reads an inventory.

No caller gets another caller's answer: each answer says whose request the API server saw.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import ssl
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
import yaml

from arcbridge.client.serving.gateway.caller_tokens import RELAY_HEADER
from tests.readme.blocks import blocks
from tests.support.cluster import Cluster
from tests.support.kube_programs import Unavailable, inventory_reader
from tests.support.long import long_form
from tests.support.processes import ManagedProcess, require_or_skip, run
from tests.support.world import (
    ALICE,
    BOB,
    CLUSTER,
    CLUSTER_AUDIENCE,
    MALLORY,
    RELAY_AUDIENCE,
    ApiServer,
    User,
    World,
    arcbridge,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "gateway.md"
REQUESTS, RESTARTS = (10_000, 10) if long_form() else (500, 1)
REVIEW = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}


class Gateway:
    """A gateway as a process, its CA, and the tokens of its callers."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        ca = trustme.CA()
        leaf = ca.issue_cert("127.0.0.1")
        self.ca_file = directory / "ca.crt"
        ca.cert_pem.write_to_path(str(self.ca_file))
        certificate, key = directory / "tls.crt", directory / "tls.key"
        leaf.cert_chain_pems[0].write_to_path(str(certificate))
        leaf.private_key_pem.write_to_path(str(key))
        config = directory / "gateway.toml"
        config.write_text(
            f'relays = ["{world.relay_url}"]\nrelay_ca_pin = "{world.relay_pin}"\ntrust_first_use = true\n'
            "[login]\none_token = true\n"
        )
        words = ("gateway", "--listen", "127.0.0.1:0", "--certificate", str(certificate), "--key", str(key))
        self.process = ManagedProcess(
            arcbridge("--role", "client", "--config", str(config), *words),
            log_dir=directory,
            name="gateway",
            env=world.client_env(directory),
        )
        self.url = self.process.wait_for_line(r"Gateway is listening on (\S+)", timeout=30)[1]
        self.tls = ssl.create_default_context(cafile=str(self.ca_file))

    def token(self, user: User) -> str:
        """One token of a user that relay and cluster take."""
        audiences = [RELAY_AUDIENCE, CLUSTER_AUDIENCE]
        return self.world.issuer.mint(sub=user.name, aud=audiences, groups=list(user.groups), email=user.email)

    def headers(self, user: User, *, two: bool = False) -> dict[str, str]:
        if not two:
            return {"Authorization": f"Bearer {self.token(user)}"}
        return {
            "Authorization": f"Bearer {self.world.token(user, CLUSTER_AUDIENCE)}",
            RELAY_HEADER: f"Bearer {self.world.token(user, RELAY_AUDIENCE)}",
        }

    def server(self) -> str:
        return f"{self.url}/clusters/{CLUSTER}"

    def kubeconfig(self, user: User, file: Path) -> Path:
        entry = {"server": self.server(), "certificate-authority": str(self.ca_file)}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "hub",
            "clusters": [{"name": "hub", "cluster": entry}],
            "users": [{"name": "hub", "user": {"token": self.token(user)}}],
            "contexts": [{"name": "hub", "context": {"cluster": "hub", "user": "hub"}}],
        }
        file.write_text(yaml.safe_dump(document))
        return file


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(api, directory=tmp_path_factory.mktemp("gateway-world")) as world:
        yield world.start()


@pytest.fixture(scope="module")
def gateway(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gateway = Gateway(world, tmp_path_factory.mktemp("gateway"))
    with gateway.process:
        yield gateway


class Callers:
    """Many requests of several users by few connections, and what each answer says."""

    def __init__(self, gateway: Gateway, client: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self.client = client
        self.headers = {
            ALICE: [gateway.headers(ALICE), gateway.headers(ALICE, two=True)],
            BOB: [gateway.headers(BOB), gateway.headers(BOB, two=True)],
            MALLORY: [gateway.headers(MALLORY)],
        }
        self.counts: Counter[tuple[str, str]] = Counter()
        self.again = 0
        """Answers that said to come again, as while the relay was away."""

    async def ask(self, user: User, method: str, path: str, document: object = None) -> tuple[int, Any]:
        """Ask until the answer is not that relay or agent are away."""
        headers = random.choice(self.headers[user])
        async with asyncio.timeout(90):
            while True:
                try:
                    async with self.client.request(
                        method, f"{self.gateway.server()}{path}", json=document, headers=headers
                    ) as answer:
                        body = await answer.json()
                        if answer.status not in (502, 503):
                            return answer.status, body
                except aiohttp.ClientConnectionError:
                    pass  # an answer that was cut
                self.again += 1
                await asyncio.sleep(0.1)  # as a client does that is told to come again

    async def one(self) -> None:
        """Send one request of a random user, and check its answer."""
        user = random.choices([ALICE, BOB, MALLORY], [10, 10, 1])[0]
        what = random.choice(["review", "pods", "secrets"])
        self.counts[user.name, what] += 1
        if what == "review":
            status, body = await self.ask(user, "POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", REVIEW)
        else:
            status, body = await self.ask(user, "GET", f"/api/v1/namespaces/default/{what}")
        text = json.dumps(body)
        others = {one.email for one in (ALICE, BOB, MALLORY)} - {user.email}
        assert not [other for other in others if other in text], (user.name, what, text)
        if user is MALLORY:
            assert status == 403, text
            assert "you may not reach it" in body["message"]
        elif what == "review":
            assert status == 201, text
            assert body["status"]["userInfo"]["username"] == user.email
        elif what == "secrets" and user is BOB:
            assert status == 403, text
            assert user.email in body["message"]
        else:
            assert status == 200, text
            assert body["kind"] == ("PodList" if what == "pods" else "SecretList")


@pytest.mark.timeout(1800 if long_form() else 120)
async def test_no_answer_is_another_callers(gateway: Gateway, world: World) -> None:
    """Two users of different rights and a third without any, mixed on few connections, over relay restarts."""
    connector = aiohttp.TCPConnector(ssl=gateway.tls, limit=16)
    async with aiohttp.ClientSession(connector=connector) as client:
        callers = Callers(gateway, client)
        over = asyncio.Event()
        """Whether the relay was restarted for the last time, and has its agent again."""

        async def worker() -> None:
            while callers.counts.total() < REQUESTS or not over.is_set():
                await callers.one()

        async def restarts() -> None:
            for part in range(1, RESTARTS + 1):
                while callers.counts.total() < part * REQUESTS // (RESTARTS + 1):
                    await asyncio.sleep(0.01)
                world.kill_relay()
                await asyncio.to_thread(world.start_relay)
                await asyncio.to_thread(world.wait_for_agent)
            over.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(restarts())
            for _ in range(24):
                group.create_task(worker())
    established = gateway.process.output("stderr").count("session established")  # four before the first restart
    resumed = gateway.process.output("stderr").count("session resumed")
    assert established + resumed > 4, "the relay was away, and no session has noticed"
    # The audit knows each caller as if it had come by itself.
    users = Counter(str(record.get("user")) for record in world.audit_records())
    assert users[ALICE.email] > REQUESTS // 4 < users[BOB.email]
    assert MALLORY.email not in users


async def test_what_the_gateway_refuses(gateway: Gateway) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=gateway.tls)) as client:

        async def asked(path: str, headers: dict[str, str]) -> tuple[int, str]:
            async with client.get(gateway.url + path, headers=headers) as answer:
                return answer.status, (await answer.json())["message"]

        status, message = await asked(f"/clusters/{CLUSTER}/api", {})
        assert (status, "Authorization: Bearer TOKEN" in message) == (401, True)
        forged = gateway.world.issuer.mint(
            sub=ALICE.name, aud=[RELAY_AUDIENCE, CLUSTER_AUDIENCE], email=ALICE.email, foreign=True
        )
        status, message = await asked(f"/clusters/{CLUSTER}/api", {"Authorization": f"Bearer {forged}"})
        assert (status, "is not signed with a key" in message) == (401, True), message
        for claimed in (ALICE, BOB):  # the relay's token of one user, the cluster's of another: two users, no session
            mixed = gateway.headers(claimed, two=True) | {RELAY_HEADER: f"Bearer {gateway.token(MALLORY)}"}
            status, message = await asked(f"/clusters/{CLUSTER}/api", mixed)
            assert (status, "you may not reach it" in message) == (403, True), message
        status, message = await asked("/clusters/nowhere/api", gateway.headers(ALICE))
        assert (status, "does not exist or you may not reach it" in message) == (403, True), message
        async with client.get(f"{gateway.url}/readyz") as answer:
            assert answer.status == 200


def test_kubectl_through_the_gateway(gateway: Gateway, cluster: Cluster, tmp_path: Path) -> None:
    cluster.add_pod("behind-the-gateway")
    kubectl = cluster.kubectl_for("1.36", gateway.kubeconfig(ALICE, tmp_path / "alice"))
    assert "alice@example.com" in kubectl.run("auth", "whoami").stdout
    assert "pod/behind-the-gateway" in kubectl.run("get", "pods", "-o", "name").stdout
    for protocol in ("true", "false"):  # WebSocket, then SPDY
        said = kubectl.run(
            "exec", "-i", "behind-the-gateway", "--", "cat", input="through\n",
            env={"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": protocol},
        )  # fmt: skip
        assert said.stdout == "through\n"
    bob = cluster.kubectl_for("1.36", gateway.kubeconfig(BOB, tmp_path / "bob"))
    refused = bob.run("exec", "behind-the-gateway", "--", "true", check=False)
    assert refused.returncode != 0
    assert "bob@example.com" in refused.stderr
    assert "cannot" in bob.run("get", "secrets", check=False).stderr
    cluster.delete_pod("behind-the-gateway")


def read_inventory(profiles: str, providers: Path, env: dict[str, str]) -> list[str]:
    try:
        reader = inventory_reader()
    except Unavailable as error:
        require_or_skip("inventory", str(error))
    done = run([reader, providers], input=profiles.encode(), env=env, timeout=60)
    return done.stdout.decode().splitlines()


def test_an_inventory_leads_through_the_gateway(gateway: Gateway, world: World, tmp_path: Path) -> None:
    words = ("--gateway", gateway.url, "--gateway-ca-file", str(gateway.ca_file))
    listed = world.run_client(BOB, "clusters", "-o", "clusterprofile", *words, check=True).stdout
    credential = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": gateway.token(BOB)},
    }
    printed = tmp_path / "credential.json"
    printed.write_text(json.dumps(credential))
    plugin = {"apiVersion": credential["apiVersion"], "command": "cat", "args": [str(printed)]}
    providers = tmp_path / "providers.json"
    providers.write_text(json.dumps({"providers": [{"name": "arcbridge-gateway", "execConfig": plugin}]}))
    (line,) = read_inventory(listed, providers, dict(os.environ))
    assert line.startswith(f"{CLUSTER} bob@example.com ")


def test_an_inventory_leads_to_what_is_connected_here(world: World, tmp_path: Path) -> None:
    """By the file of providers that the page shows."""
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env = {**os.environ, **world.client_env(tmp_path), "KUBECONFIG": str(tmp_path / "kubeconfig"), **path}
    flags = world.client_arguments(ALICE, tmp_path)
    run(arcbridge(*flags, "connect"), env=env, timeout=60)
    try:
        listed = run(arcbridge(*flags, "clusters", "-o", "clusterprofile"), env=env, timeout=60).stdout.decode()
        providers = tmp_path / "providers.json"
        providers.write_text(blocks_of_page()["providers"])
        (line,) = read_inventory(listed, providers, env)
        assert line.startswith(f"{CLUSTER} alice@example.com ")
    finally:
        run(arcbridge("stop"), env=env, check=False)


def blocks_of_page() -> dict[str, str]:
    return {block.machine: block.text for block in blocks(PAGE) if block.kind == "run"}


def test_the_other_blocks_of_the_page(world: World, cluster: Cluster, tmp_path: Path) -> None:
    page = blocks_of_page()
    assert set(page) == {"gateway", "settings", "manifest", "profiles", "providers"}
    settings = page["settings"].replace("https://relay.example.org", world.relay_url)
    (tmp_path / "gateway.toml").write_text(re.sub(r"sha256:[\w-]+", world.relay_pin, settings))
    (tmp_path / "pins.toml").write_text("[clusters]\n")
    checked = run(
        arcbridge("--role", "client", "config", "check", "--config", str(tmp_path / "gateway.toml")),
        env={**os.environ, **world.client_env(tmp_path)},
        check=False,
    )
    assert checked.returncode == 0, checked
    words = page["profiles"].split()[1:]
    words[words.index("ca.crt")] = str(world.issuer.ca_file)
    (profile,) = json.loads(world.run_client(ALICE, *words, check=True).stdout)["items"]
    server = profile["status"]["accessProviders"][0]["cluster"]["server"]
    assert server == f"https://gateway.example.org:8443/clusters/{CLUSTER}"
    words = page["gateway"].split()[1:]
    refused = run(arcbridge(*words), cwd=tmp_path, env={**os.environ, **world.client_env(tmp_path)}, check=False)
    assert b"--certificate: cannot read tls.crt" in refused.stderr, refused
    cluster.ensure_namespace("arcbridge-gateway")
    (tmp_path / "manifest.yaml").write_text(page["manifest"])
    applied = cluster.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", str(tmp_path / "manifest.yaml"))
    assert "deployment.apps/arcbridge-gateway" in applied.stdout
    deployment = next(yaml.safe_load_all(page["manifest"]))
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert "gateway" in container["args"]


async def test_a_gateway_ends_in_order(world: World, tmp_path: Path) -> None:
    other = Gateway(world, tmp_path)
    with other.process as process:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=other.tls)) as client,
            client.get(f"{other.server()}/api", headers=other.headers(ALICE)) as answer,
        ):
            assert answer.status == 200
        assert "session established" in process.output("stderr")
        process.stop()
        assert process.returncode == 0

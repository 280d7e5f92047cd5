"""Which credential opens which door, asked of a real relay and a real agent: every path and protocol, each credential.

Nothing opens two doors that belong to different parts (docs/threats.md#T11): what one of them sees is worth nothing at
another one. And a copy of an agent's credential is found when it is renewed (docs/threats.md#E11).
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from arcbridge.agent.relay_http import post
from arcbridge.errors import EnrolmentRefused, JoinRefused
from arcbridge.net.address import parse_address
from arcbridge.net.dialer import connect
from arcbridge.net.join import client_join
from arcbridge.net.tls import (
    ALPN_CONTROL,
    ALPN_HOP,
    ALPN_HTTP,
    ALPN_JOIN,
    RelayTrust,
    fetch_relay_cas,
    outer_client_context,
)
from arcbridge.pki.authority import Authority
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.relay.http import api
from arcbridge.wire.records import JoinRequest
from tests.support.cluster import Cluster
from tests.support.processes import run
from tests.support.reports import metrics, until, wait_for_record
from tests.support.world import ALICE, CLUSTER, CLUSTER_AUDIENCE, RELAY_AUDIENCE, ApiServer, World, arcbridge

# What is carried in words, and what in the TLS handshake.
TOKENS = ("access token", "id token", "service account token", "join token", "nonsense")
CERTIFICATES = ("none", "agent", "another cluster's agent", "self-made")

NO_CALLER: frozenset[str] = frozenset()
EVERY_CALLER = frozenset({*TOKENS, *CERTIFICATES})
OPENS: dict[str, frozenset[str]] = {
    "GET /v1/ca": EVERY_CALLER,
    "GET /v1/login": EVERY_CALLER,
    "POST /v1/join-token": frozenset({"join token"}),
    "POST /v1/enrol": frozenset({"join token"}),  # which uses it up
    "POST /v1/renew": frozenset({"agent", "another cluster's agent"}),  # each its own certificate
    "GET /v1/clusters": frozenset({"access token"}),
    "GET /v1/clusters/{name}": frozenset({"access token"}),
    "POST /v1/admin": frozenset({"access token"}),  # of a person whom [[admin]] names
    f"{ALPN_JOIN} as client": frozenset({"access token"}),
    f"{ALPN_JOIN} as agent": NO_CALLER,  # it takes a certificate and the dial token of that very moment
    ALPN_CONTROL: frozenset({"agent", "another cluster's agent"}),
    ALPN_HOP: NO_CALLER,  # a relay's own certificate, and this relay is none of a fleet
}


@dataclass(frozen=True)
class Credentials:
    tokens: dict[str, str]
    certificates: dict[str, tuple[str, str] | None]
    ca_pem: str
    cluster_ca: str


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An organisation of this module's own: one of its clusters is revoked."""
    with World(api, directory=tmp_path_factory.mktemp("scope")) as world:
        world.policy += '[[admin]]\ngroups = ["platform"]\nclusters = ["*"]\nwhat = ["read"]\n'
        world.start_issuer()
        world.start_relay(extra=f'[login]\nissuer = "{world.issuer.url}"\nclient_id = "cli"\n')
        world.start_agent()
        yield world


def stored(directory: Path) -> dict[str, str]:
    document = json.loads((directory / "credential.json").read_text())
    return {name: base64.b64decode(value).decode() for name, value in document["data"].items()}


@pytest.fixture(scope="module")
def credentials(world: World, cluster: Cluster) -> Credentials:
    return asyncio.run(_credentials(world, cluster))


async def _credentials(world: World, cluster: Cluster) -> Credentials:
    relay = parse_address(world.relay_url)
    ca_pem = (await fetch_relay_cas(relay, world.relay_pin)).trusted
    own = stored(world.agent_config.parent / "state")
    authority = Authority.create("another cluster")

    async def enrolled(cluster: str, cluster_ca: str) -> tuple[str, str]:
        key, (token, _) = make_key(), world.join_token(cluster)
        enrolment = {"join_token": token, "csr": make_csr(key), "cluster_ca": cluster_ca}
        return (await post(relay, "/v1/enrol", enrolment, RelayTrust(ca_pem)))["certificate"], key

    made = Authority.create("relay").issue_client(CLUSTER)
    return Credentials(
        {
            "access token": world.token(ALICE, RELAY_AUDIENCE),
            "id token": world.token(ALICE, CLUSTER_AUDIENCE),
            "service account token": cluster.service_account_token("default", "robot"),
            "join token": world.join_token("scope")[0],
            "nonsense": "x" * 40,
        },
        {
            "none": None,
            "agent": await enrolled(CLUSTER, own["cluster-ca.crt"]),
            "another cluster's agent": await enrolled("another", authority.certificate_pem),
            "self-made": (made.certificate_pem, made.key_pem),
        },
        ca_pem,
        authority.certificate_pem,
    )


def test_the_table_has_every_path_of_the_relay() -> None:
    paths = set(re.findall(r"^ +((?:GET|POST) +/v1/\S+)", str(api.__doc__), re.MULTILINE))
    assert {re.sub(" +", " ", path) for path in paths} == {door for door in OPENS if "/v1/" in door}


@pytest.mark.parametrize("door", [door for door in OPENS if "/v1/" in door])
async def test_paths(world: World, credentials: Credentials, door: str) -> None:
    method, path = door.split(" ")
    url = world.relay_url + path.replace("{name}", CLUSTER)
    opened = set()
    for name in (*TOKENS, *CERTIFICATES):
        context = outer_client_context(
            RelayTrust(credentials.ca_pem), ALPN_HTTP, client_certificate=credentials.certificates.get(name)
        )
        token = credentials.tokens.get(name, "")
        pair = credentials.certificates.get(name)
        body = {
            "join_token": token,
            "csr": make_csr(make_key() if pair is None or method != "POST" else pair[1]),
            "cluster_ca": credentials.cluster_ca,
        }
        if path == "/v1/admin":
            body = {"command": "policy list"}
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            async with (
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
                session.request(method, url, headers=headers, json=body if method == "POST" else None) as answer,
            ):
                # 429: too many bad join tokens of this address.
                assert answer.status in (200, 401, 403, 429), f"{name}: {answer.status} {await answer.text()}"
                if answer.status == 200:
                    opened.add(name)
        except (aiohttp.ClientError, ssl.SSLError, ConnectionError):
            assert name == "self-made", name  # TLS knows no CA of it, whatever the path
    assert opened == OPENS[door] - {"self-made"}


@pytest.mark.parametrize("role", ["client", "agent"])
async def test_joins(world: World, credentials: Credentials, role: str) -> None:
    """Each token with each certificate: a certificate makes no client's token of another one, and the other way."""
    relay, opened = parse_address(world.relay_url), set()
    for certificate in ("none", "agent", "another cluster's agent"):
        context = outer_client_context(
            RelayTrust(credentials.ca_pem), ALPN_JOIN, client_certificate=credentials.certificates[certificate]
        )
        for name in TOKENS:
            request = JoinRequest(role=role, cluster=CLUSTER, token=credentials.tokens[name])
            sock = await connect(relay, deadline=10)
            try:
                await client_join(sock, context, relay.host, request)
            except JoinRefused:
                continue
            opened.add((name, certificate))
            sock.close()
    # An agent's certificate does not keep its holder from being a client with a token of the relay.
    assert {name for name, _ in opened} == OPENS[f"{ALPN_JOIN} as {role}"]
    assert ("access token", "none") in opened or role == "agent"


@pytest.mark.parametrize("alpn", [ALPN_CONTROL, ALPN_HOP])
async def test_protocols_that_take_a_certificate(world: World, credentials: Credentials, alpn: str) -> None:
    """The relay's first bytes are its HELLO; a caller that has no place there gets none."""
    relay, opened = parse_address(world.relay_url), set()
    for name in CERTIFICATES:
        context = outer_client_context(
            RelayTrust(credentials.ca_pem), alpn, client_certificate=credentials.certificates[name]
        )
        sock = await connect(relay, deadline=10)
        try:
            reader, writer = await asyncio.open_connection(sock=sock, ssl=context, server_hostname=relay.host)
            chosen = writer.get_extra_info("ssl_object").selected_alpn_protocol()
            data = await asyncio.wait_for(reader.read(1), 15)
            writer.transport.abort()
        except (OSError, ssl.SSLError):
            sock.close()
            continue
        if data and chosen == alpn:
            opened.add(name)
    assert opened == OPENS[alpn]


@pytest.mark.parametrize("wrong", ["access token", "service account token", "join token", "nonsense"])
def test_the_agent_takes_the_cluster_s_token_alone(world: World, cluster: Cluster, tmp_path: Path, wrong: str) -> None:
    """As what it is shown to a client: in the place of an id token. The access token is another user's, or the client
    itself would refuse to show one token twice."""
    tokens = {
        "access token": world.issuer.mint(sub="bob", aud=RELAY_AUDIENCE, email="bob@example.com"),
        "service account token": cluster.service_account_token("default", "robot"),
        "join token": world.join_token("scope")[0],
        "nonsense": "x" * 40,
    }
    file = tmp_path / "id-token"
    file.write_text(tokens[wrong])
    done = world.run_client(ALICE, "--id-token-file", str(file), "run", "--", "true")
    assert done.returncode != 0
    assert "does not accept the token" in done.stdout + done.stderr
    assert tokens[wrong] not in done.stdout + done.stderr + world.agent.output() + world.relay.output()


async def test_a_copy_of_a_credential_is_found_and_both_are_out(world: World, cluster: Cluster, tmp_path: Path) -> None:
    """The thief has the agent's state of this moment and renews; the owner renews; within ten seconds the cluster is
    cut off, and what dials again stays out, until it enrols anew."""
    copy = tmp_path / "copy"
    shutil.copytree(world.agent_config.parent / "state", copy)
    relay, thief = parse_address(world.relay_url), stored(copy)
    trust, pair = RelayTrust(thief["relay-ca.crt"]), (thief["tls.crt"], thief["tls.key"])

    async def renew(request: str) -> dict[str, object]:
        return await post(relay, "/v1/renew", {"csr": request, "stored": "yes"}, trust, certificate=pair)

    client = world.start_client(ALICE)
    ask = ("get", "--raw", "/version", f"--kubeconfig={client.kubeconfig}")
    assert cluster.kubectl(*ask).returncode == 0
    own, mark = make_csr(thief["tls.key"]), world.relay.mark()
    first = await renew(own)
    assert (await renew(own))["cluster"] == first["cluster"], "an answer that was lost"
    with pytest.raises(EnrolmentRefused, match="renewed twice"):
        await renew(make_csr(thief["tls.key"]))
    alarm = wait_for_record(world.relay, "agent certificate renewed twice", after=mark)
    assert alarm["cluster"] == CLUSTER
    assert metrics(world.relay_observe)["arcbridge_relay_certificates_renewed_twice_total"] == 1
    until(lambda: metrics(world.relay_observe)["arcbridge_relay_agents"] == 0, "the agent is cut off", timeout=10)
    for held in (pair, (str(first["certificate"]), thief["tls.key"])):
        with pytest.raises(EnrolmentRefused, match="revoked"):
            await post(relay, "/v1/renew", {"csr": own}, trust, certificate=held)
    assert cluster.kubectl(*ask, check=False).returncode != 0

    # The operator restores the cluster: neither certificate comes back with it.
    restore = arcbridge("--role", "relay", "cluster", "restore", CLUSTER, "--config", str(world.relay_config))
    assert b"is restored" in run(restore).stdout
    with pytest.raises(EnrolmentRefused, match="void"):
        await post(relay, "/v1/renew", {"csr": own}, trust, certificate=(str(first["certificate"]), thief["tls.key"]))

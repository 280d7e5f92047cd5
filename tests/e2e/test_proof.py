"""Tokens that are bound to a key in each of the three ways, with real processes: the holder of the key works through
kubectl, and a thief of the tokens alone gets nothing, at the relay and at the agent (docs/threats.md#T30).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from arcbridge.errors import ExitCode
from arcbridge.identity.proof import ProofKey
from tests.support.cluster import KUBECTL_MINORS, Cluster
from tests.support.reports import audited, metrics, wait_for_record
from tests.support.world import ALICE, BOB, CLUSTER_AUDIENCE, RELAY_AUDIENCE, World

WAYS: dict[str, Callable[[ProofKey, str], dict[str, object]]] = {
    "cnf.jkt": lambda key, audience: {"cnf": {"jkt": key.thumbprint}},
    "nonce": lambda key, audience: {"nonce": key.nonce()},
    "audience": lambda key, audience: {"aud": [audience, key.audience()]},
}


@dataclass
class Login:
    """The files of a person whose tokens are bound to a key."""

    way: str
    directory: Path
    access: Path
    identity: Path

    def files(self, *, access: Path | None = None) -> list[str]:
        return ["--access-token-file", str(access or self.access), "--id-token-file", str(self.identity)]

    def with_key(self, name: str = "key.jwk", *, access: Path | None = None) -> list[str]:
        settings = self.directory / f"{name}.toml"
        settings.write_text(f'[login]\nproof_key_file = "{name}"\n')
        return ["--config", str(settings), *self.files(access=access)]


@pytest.fixture(scope="module", params=WAYS)
def login(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Login:
    directory = tmp_path_factory.mktemp("bound")
    key = ProofKey.generate()
    for name, one in (("key.jwk", key), ("another.jwk", ProofKey.generate())):
        (directory / name).touch(0o600)
        (directory / name).write_bytes(one.to_jwk())
    found = Login(request.param, directory, directory / "access", directory / "identity")
    for path, audience in ((found.access, RELAY_AUDIENCE), (found.identity, CLUSTER_AUDIENCE)):
        claims = WAYS[request.param](key, audience)
        path.write_text(
            world.issuer.mint(sub=ALICE.name, aud=audience, groups=list(ALICE.groups), email=ALICE.email, claims=claims)
        )
    return found


def refused(world: World, *arguments: str) -> str:
    """Run a client that cannot come in; return what it says."""
    done = world.run_client(ALICE, *arguments, "--file", os.devnull, "--port", "0")
    assert done.returncode == ExitCode.LOGIN, done.stderr
    return done.stderr


def test_the_key_opens_and_the_tokens_alone_do_not(world: World, cluster: Cluster, login: Login) -> None:
    client = world.start_client(ALICE, *login.with_key())
    try:
        kubectl = cluster.kubectl_for(KUBECTL_MINORS[0], client.kubeconfig)
        assert kubectl.run("auth", "whoami", "-o", "jsonpath={.status.userInfo.username}").stdout == ALICE.email
        assert "default" in kubectl.run("get", "namespaces", "-o", "name").stdout
    finally:
        client.process.stop()
    audited(world, "how the token is bound", bound=login.way)
    wait_for_record(world.relay, "joined", user=ALICE.email, bound=login.way)

    at_relay = metrics(world.relay_observe).get('arcbridge_relay_proofs_refused_total{reason="missing"}', 0.0)
    said = refused(world, *login.files())
    assert "the relay does not accept the access token" in said
    assert "came without a proof" in said
    assert "log in again on this machine" in said
    after = metrics(world.relay_observe)['arcbridge_relay_proofs_refused_total{reason="missing"}']
    assert after > at_relay

    # The thief has a token of his own for the relay, and the victim's for the cluster.
    own = login.directory / "own-access"
    own.write_text(world.token(BOB, RELAY_AUDIENCE))
    said = refused(world, *login.files(access=own))
    assert "does not accept the token" in said
    assert "came without a proof" in said
    assert "log in again on this machine" in said
    said = refused(world, *login.with_key("another.jwk", access=own))
    assert "came without a proof" in said, "a client sends no proof of a key that the token does not name"
    audited(world, "the thief", outcome="refused", bound=login.way)
    stolen = [one for one in world.audit_records() if one.get("outcome") == "refused" and one["bound"] == login.way]
    assert {(one["user"], one["verb"]) for one in stolen} == {(ALICE.email, "authenticate")}

    # So has the list of clusters.
    assert world.cluster in world.run_client(ALICE, *login.with_key(), "clusters", check=True).stdout
    without = world.run_client(ALICE, *login.files(), "clusters")
    assert without.returncode == ExitCode.LOGIN
    assert world.cluster not in without.stdout
    assert "came without a proof" in without.stderr

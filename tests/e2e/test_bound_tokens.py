"""Tokens that are bound to a key, with one audience per cluster: had from a real issuer, shown to real processes.

Relay and agents take nothing else (`proof = "required"`), so whatever works here is bound. Two clusters share the
relay, the issuer and one API server: what one agent has seen is tried at the other.
"""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from arcbridge.client.credentials import proof_keys
from arcbridge.client.credentials.jwt_unverified import claims_unverified
from arcbridge.identity.proof import BindingKind, binding
from tests.support.cluster import Cluster
from tests.support.processes import ManagedProcess
from tests.support.reports import wait_for_record
from tests.support.world import RELAY_AUDIENCE, ApiServer, World, arcbridge, login_ports

A, B = "berlin", "munich"
PER_CLUSTER = "arcbridge-{cluster}"
STRICT = """\
proof = "required"
max_token_lifetime = "2h"
"""


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(api, cluster=A, directory=tmp_path_factory.mktemp("bound"), agents=2)
    world.agent_clusters = [A, B]
    world.cluster_audience = PER_CLUSTER
    world.relay_settings = STRICT
    world.agent_settings = f'{STRICT}forbidden_audiences = ["{RELAY_AUDIENCE}"]\n'
    with world:
        world.start()
        world.issuer.settings(auto_login="alice", dpop="required", dpop_nonce=True, device_interval=0)
        yield world


class Person:
    """A home of its own in which clients are started."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world = world
        self.directory = directory
        self.kubeconfig = directory / "kubeconfig"
        self.started: list[ManagedProcess] = []

    def run(
        self, *arguments: str, env: Mapping[str, str] | None = None, clusters: tuple[str, ...] = ()
    ) -> ManagedProcess:
        named = [word for cluster in clusters for word in ("--cluster", cluster)]
        common = ["--role", "client", "--relay", self.world.relay_url, "--relay-ca-pin", self.world.relay_pin]
        process = ManagedProcess(
            arcbridge(*common, "--trust-first-use", *named, *arguments),
            log_dir=self.directory / f"logs-{len(self.started)}",
            name="client",
            env=self.world.client_env(self.directory, env),
        )
        self.started.append(process)
        return process

    def proxy(self, *arguments: str, env: Mapping[str, str] | None = None) -> ManagedProcess:
        process = self.run(*arguments, "--file", str(self.kubeconfig), clusters=(A, B), env=env)
        process.wait_for_line("Press Ctrl.C to close proxy", timeout=30)
        return process

    @property
    def login(self) -> list[str]:
        issuer = self.world.issuer
        return [
            *("--oidc-issuer-url", issuer.url, "--oidc-client-id", "cli", "--oidc-ca-file", str(issuer.ca_file)),
            *("--oidc-audience", RELAY_AUDIENCE, "--cluster-audience", PER_CLUSTER),
        ]

    def kept(self) -> tuple[Path, Path]:
        """The files of the login: tokens and key."""
        (tokens,) = self.directory.rglob("tokens/*.json")
        return tokens, tokens.with_suffix(".key")


@pytest.fixture
def person(world: World, tmp_path: Path) -> Iterator[Person]:
    person = Person(world, tmp_path)
    yield person
    for process in reversed(person.started):
        process.stop()


def log_in_by_device(person: Person, *arguments: str) -> None:
    login = person.run(*person.login, *arguments, "--grant-type", "device-code", "login")
    code = login.wait_for_line(r"enter the code (\S+)", timeout=30)[1]
    person.world.issuer.approve(code)
    assert login.wait(30) == 0, login.tail()


def refused(person: Person, cluster: str, access: str, identity: str, *arguments: str) -> str:
    """Show two tokens from files, as a thief does who copied them; return what the client says."""
    for name, text in (("access", access), ("id", identity)):
        (person.directory / name).write_text(text)
    files = ["--access-token-file", str(person.directory / "access"), "--id-token-file", str(person.directory / "id")]
    process = person.run(*files, *arguments, "run", "--", "true", clusters=(cluster,))
    assert process.wait(30) != 0, process.tail()
    return process.output()


@pytest.mark.parametrize("by", ["resource", "exchange"])
def test_a_login_has_a_token_for_each_cluster_and_all_are_bound(
    world: World, cluster: Cluster, person: Person, by: str
) -> None:
    settings = person.directory / "settings.toml"
    settings.write_text(f'[login]\ncluster_audience_by = "{by}"\n')
    log_in_by_device(person, "--config", str(settings))
    person.proxy("--config", str(settings), *person.login)
    for context in (A, B):
        answer = cluster.kubectl("auth", "whoami", f"--kubeconfig={person.kubeconfig}", f"--context={context}")
        assert "alice@example.com" in answer.stdout
    tokens, key_file = person.kept()
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tokens, key_file)} == {0o600}
    document, key = json.loads(tokens.read_text()), proof_keys.load(key_file)
    assert key is not None
    own = {name: one["access_token"] for name, one in document["by_audience"].items()}
    assert set(own) == {f"arcbridge-{A}", f"arcbridge-{B}"}
    for token in (*own.values(), document["access_token"]):
        assert binding(claims_unverified(token)).names(key.thumbprint)
        assert token not in world.relay.output() + world.agents[0].output() + world.agents[1].output()

    # Agent A has seen the token for A, and the relay the access token. Even with the user's key it is no good at B.
    mark = world.agents[1].mark()
    stolen, proved = own[f"arcbridge-{A}"], ("--proof-key-file", str(key_file))
    said = refused(person, B, document["access_token"], stolen, *proved)
    assert f'cluster "{B}" does not accept the token' in said
    assert wait_for_record(world.agents[1], "session refused", after=mark)["rule"] == "token.aud"
    # Without the key it is good nowhere, and neither is the relay's.
    assert "bound to a key and came without a proof" in refused(person, A, document["access_token"], stolen)


def test_the_authorization_code_flow_binds_the_id_token_by_its_nonce(
    world: World, cluster: Cluster, person: Person
) -> None:
    """The browser is a program that does as browsers do: it follows the issuer's redirect to the client's port."""
    world.issuer.settings(nonce_at_refresh=True)
    browser = person.directory / "browser"
    browser.write_text(
        f"#!{sys.executable}\n"
        "import ssl, sys, urllib.request\n"
        f"context = ssl.create_default_context(cafile={str(world.issuer.ca_file)!r})\n"
        "urllib.request.urlopen(sys.argv[1], context=context).read()\n"
    )
    browser.chmod(0o700)
    # The id token is for the client that logs in; this one has the name of A's audience.
    issuer = world.issuer
    arguments = ["--oidc-issuer-url", issuer.url, "--oidc-client-id", f"arcbridge-{A}", "--grant-type", "authcode"]
    arguments += ["--oidc-ca-file", str(issuer.ca_file)]
    with login_ports():
        login = person.run(*arguments, "login", env={"BROWSER": f"{browser} %s", "DISPLAY": ""})
        assert login.wait(30) == 0, login.tail()
    tokens, key_file = person.kept()
    document, key = json.loads(tokens.read_text()), proof_keys.load(key_file)
    assert key is not None
    bound = binding(claims_unverified(document["id_token"]))
    assert (bound.kind, bound.names(key.thumbprint)) == (BindingKind.NONCE, True)
    status = person.run(*arguments, "doctor", clusters=(A,))
    assert status.wait(30) == 0, status.tail()
    assert "end to end as alice@example.com" in status.output()
    said = refused(person, A, document["access_token"], document["id_token"])
    assert "bound to a key and came without a proof" in said


@pytest.mark.parametrize(
    ("audience", "headers", "lifetime", "rule"),
    [
        ([f"arcbridge-{A}", RELAY_AUDIENCE], {}, 600, "token.aud.forbidden"),
        (f"arcbridge-{A}", {"typ": "logout+jwt"}, 600, "token.typ"),
        (f"arcbridge-{A}", {}, 7201, "token.life"),
    ],
)
def test_tokens_that_an_end_refuses_whoever_holds_them(
    world: World, person: Person, audience: str | list[str], headers: dict[str, str], lifetime: int, rule: str
) -> None:
    """For relay and cluster, of another purpose, or too long; the relay has the same rules, but for the first."""
    key_file = person.directory / "key"
    bound = {"cnf": {"jkt": proof_keys.load_or_make(key_file).thumbprint}}
    proved = "--proof-key-file", str(key_file)

    def token(audience: str | list[str], headers: dict[str, str] | None = None, lifetime: int = 600) -> str:
        return world.issuer.mint(sub="alice", aud=audience, claims=bound, headers=headers, lifetime=lifetime)

    mark = world.agents[0].mark()
    said = refused(person, A, token(RELAY_AUDIENCE), token(audience, headers, lifetime), *proved)
    assert "does not accept the token" in said
    assert wait_for_record(world.agents[0], "session refused", after=mark)["rule"] == rule
    if rule != "token.aud.forbidden":
        said = refused(person, A, token(RELAY_AUDIENCE, headers, lifetime), token(f"arcbridge-{A}"), *proved)
        assert "the relay does not accept the access token" in said

"""Tokens that are bound to a key, with one audience per cluster: had from a real issuer, shown to real processes.

Relay and agents take nothing else (`proof = "required"`), so whatever works here is bound. Two clusters share the
relay, the issuer and one API server: what one agent has seen is tried at the other.
"""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcbridge.client.credentials import proof_keys
from arcbridge.client.credentials.jwt_unverified import claims_unverified
from arcbridge.identity.proof import BindingKind, binding
from tests.support.cluster import Cluster
from tests.support.machine import Machine
from tests.support.reports import wait_for_record
from tests.support.world import RELAY_AUDIENCE, ApiServer, World, login_ports

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
        world.issuer.settings(auto_login="alice", dpop="required", dpop_nonce=True)
        yield world


class Person(Machine):
    """A machine that knows the relay, and no cluster by its pin."""

    @property
    def kubeconfig(self) -> Path:
        return self.directory / "kubeconfig"

    def proxy(self, *arguments: str) -> None:
        process = self.begin(*arguments, "--file", str(self.kubeconfig), "--cluster", A, "--cluster", B)
        process.wait_for_line("Press Ctrl.C to close proxy", timeout=30)

    @property
    def login(self) -> list[str]:
        issuer = self.world.issuer
        return [
            *("--oidc-issuer-url", issuer.url, "--oidc-client-id", "cli", "--oidc-ca-file", str(issuer.ca_file)),
            *("--oidc-audience", RELAY_AUDIENCE, "--cluster-audience", PER_CLUSTER),
        ]


@pytest.fixture
def person(world: World, tmp_path: Path) -> Iterator[Person]:
    settings = f'relays = ["{world.relay_url}"]\nrelay_ca_pin = "{world.relay_pin}"\ntrust_first_use = true\n'
    (tmp_path / "client.toml").write_text(settings)
    before = len(world.processes)
    yield Person(world, "person", tmp_path, tmp_path / "client.toml")
    for process in reversed(world.processes[before:]):
        process.stop()


def log_in_by_device(person: Person) -> None:
    login = person.begin(*person.login, "--grant-type", "device-code", "login", "--wait", "100s")
    code = login.wait_for_line(r"enter the code (\S+)", timeout=30)[1]
    person.world.issuer.approve(code)
    assert login.wait(30) == 0, login.tail()


def refused(person: Person, cluster: str, access: str, identity: str, *arguments: str) -> str:
    """Show two tokens from files, as a thief does who copied them; return what the client says."""
    for name, text in (("access", access), ("id", identity)):
        (person.directory / name).write_text(text)
    files = ["--access-token-file", str(person.directory / "access"), "--id-token-file", str(person.directory / "id")]
    process = person.begin(*files, *arguments, "--cluster", cluster, "run", "--", "true")
    assert process.wait(30) != 0, process.tail()
    return process.output()


@pytest.mark.parametrize("by", ["resource", "exchange"])
def test_a_login_has_a_token_for_each_cluster_and_all_are_bound(
    world: World, cluster: Cluster, person: Person, by: str
) -> None:
    with (person.directory / "client.toml").open("a") as settings:
        settings.write(f'[login]\ncluster_audience_by = "{by}"\n')
    log_in_by_device(person)
    person.proxy(*person.login)
    for context in (A, B):
        answer = cluster.kubectl("auth", "whoami", f"--kubeconfig={person.kubeconfig}", f"--context={context}")
        assert "alice@example.com" in answer.stdout
    files, document, key = person.directory.rglob("tokens/*.*"), person.kept, proof_keys.load(person.key_file)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert key is not None
    own = {name: one["access_token"] for name, one in document["by_audience"].items()}
    assert set(own) == {f"arcbridge-{A}", f"arcbridge-{B}"}
    for token in (*own.values(), document["access_token"]):
        assert binding(claims_unverified(token)).names(key.thumbprint)
        assert token not in world.relay.output() + world.agents[0].output() + world.agents[1].output()

    # Agent A has seen the token for A, and the relay the access token. Even with the user's key it is no good at B.
    mark = world.agents[1].mark()
    stolen, proved = own[f"arcbridge-{A}"], ("--proof-key-file", str(person.key_file))
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
        person.environment |= {"BROWSER": f"{browser} %s", "DISPLAY": ""}
        login = person.begin(*arguments, "login", "--wait", "100s")
        assert login.wait(30) == 0, login.tail()
    document, key = person.kept, proof_keys.load(person.key_file)
    assert key is not None
    bound = binding(claims_unverified(document["id_token"]))
    assert (bound.kind, bound.names(key.thumbprint)) == (BindingKind.NONCE, True)
    assert "end to end as alice@example.com" in person.run(*arguments, "--cluster", A, "doctor")[1]
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

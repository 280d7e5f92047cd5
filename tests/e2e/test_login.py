"""`arcbridge login https://RELAY`, and every other command without a flag."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.processes import ManagedProcess
from tests.support.reports import records, until
from tests.support.world import (
    ALICE,
    CLUSTER,
    CLUSTER_AUDIENCE,
    RELAY_AUDIENCE,
    ApiServer,
    World,
    arcbridge,
    fixed_port,
)

BRIEF = 12
"""Seconds of a token: a proxy renews it within six."""


class Organisation(World):
    """An organisation whose relay says where one logs in."""

    def start_issuer(self) -> None:
        super().start_issuer()
        self.issuer.settings(device_interval=0, dpop="on")
        self.relay_settings += (
            f'login.issuer = "{self.issuer.url}"\n'
            # The audience of an id token is the client's id.
            f'login.client_id = "{CLUSTER_AUDIENCE}"\n'
        )

    def authentication(self, audience: str) -> str:
        """The relay knows people by their subject, because programs have no e-mail address."""
        text = super().authentication(audience)
        return text.replace('"claim": "email"', '"claim": "sub"') if audience == RELAY_AUDIENCE else text


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Organisation(api, directory=tmp_path_factory.mktemp("one")) as world:
        yield world.start()


class Person:
    """A person's machine: nothing is set but the home."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kubeconfig = directory / "kubeconfig"
        self.started: list[ManagedProcess] = []

    def start(self, world: World, *arguments: str, env: Mapping[str, str] | None = None) -> ManagedProcess:
        process = ManagedProcess(
            arcbridge(*arguments),
            log_dir=self.directory / f"logs-{len(self.started)}",
            name="client",
            env=world.client_env(self.directory, env),
        )
        self.started.append(process)
        return process

    def run(self, world: World, *arguments: str) -> tuple[int, str]:
        process = self.start(world, *arguments)
        return process.wait(30), process.output()

    def log_in(self, world: World, *arguments: str, user: str = "alice") -> str:
        """By a code on another device, as a script that was told the pin, the issuer and the client."""
        issuer = world.issuer
        process = self.start(
            world,
            *("login", world.relay_url, "--relay-ca-pin", world.relay_pin, "--oidc-issuer-url", issuer.url),
            *("--oidc-client-id", CLUSTER_AUDIENCE, "--oidc-ca-file", str(issuer.ca_file)),
            *("--grant-type", "device-code", *arguments),
        )
        code = process.wait_for_line(r"enter the code (\S+)", timeout=30)[1]
        issuer.approve(code, user)
        assert process.wait(30) == 0, process.tail()
        return process.output()

    def proxy(self, world: World, *arguments: str) -> ManagedProcess:
        process = self.start(
            world,
            *("proxy", "-n", world.cluster, "--trust-first-use", "-f", str(self.kubeconfig)),
            # One of its own, because other tests run on this machine; a port that is named is kept as a chosen one is.
            *("--port", str(fixed_port()), *arguments),
        )
        process.wait_for_line("Press Ctrl.C to close proxy", timeout=30)
        return process

    def whoami(self, cluster: Cluster, context: str) -> str:
        """Whom the API server sees."""
        done = cluster.kubectl("auth", "whoami", f"--kubeconfig={self.kubeconfig}", f"--context={context}")
        return done.stdout


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    person = Person(tmp_path)
    yield person
    for process in reversed(person.started):
        process.stop()


def test_after_a_login_no_command_needs_a_flag(world: World, cluster: Cluster, person: Person) -> None:
    assert "Logged in as alice@example.com" in person.log_in(world)
    assert person.run(world, "clusters", "-o", "name") == (0, f"{CLUSTER}\n")
    status, shown = person.run(world, "doctor", "-n", CLUSTER, "--trust-first-use")
    assert (status, "failed" in shown) == (0, False), shown
    person.proxy(world)
    assert "alice@example.com" in person.whoami(cluster, CLUSTER)
    status, shown = person.run(world, "whoami", "--check")
    assert (status, f"{world.relay_url} takes the login" in shown) == (0, True)

    # With the login goes everything that it gave; what the user trusts stays.
    assert person.run(world, "logout") == (0, "Logged out.\n")
    assert world.issuer.requests("/revoke") == 1
    status, shown = person.run(world, "clusters")
    assert (status, f"run `arcbridge login {world.relay_url}`" in shown) == (3, True), shown


def test_tokens_are_renewed_under_what_runs(world: World, cluster: Cluster, person: Person) -> None:
    world.issuer.settings(lifetime=BRIEF)
    try:
        person.log_in(world)
        proxy = person.proxy(world)
        (file,) = person.directory.rglob("tokens/*.json")
        first = json.loads(file.read_text())
        watch = cluster.kubectl_for(kubeconfig=person.kubeconfig).start("get", "namespaces", "--watch-only")
        until(lambda: time.time() > first["expires_at"], "the end of the first tokens", timeout=4 * BRIEF)
        assert "alice@example.com" in person.whoami(cluster, CLUSTER)
        assert json.loads(file.read_text())["access_token"] != first["access_token"]
        assert watch.running, "what ran goes on"
        assert len(records(proxy, "session established")) == 1
        watch.stop()
    finally:
        world.issuer.settings(lifetime=3600)


def test_swapped_token_files(world: World, person: Person) -> None:
    access, identity = world.login_files(ALICE, person.directory / "files")
    trust = ["--relay", world.relay_url, "--relay-ca-pin", world.relay_pin]
    files = ["--access-token-file", str(identity), "--id-token-file", str(access)]
    for command in (["clusters"], ["proxy", "-n", CLUSTER, "--trust-first-use", "--port", "0"]):
        status, shown = person.run(world, *command, *trust, *files)
        assert status == 3
        assert f'{identity} is for audience "{CLUSTER_AUDIENCE}", the relay wants "{RELAY_AUDIENCE}"' in shown

"""`arcbridge login https://RELAY`, and every other command without a flag."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.machine import Machine
from tests.support.processes import ManagedProcess
from tests.support.reports import records, until
from tests.support.world import ALICE, CLUSTER, CLUSTER_AUDIENCE, RELAY_AUDIENCE, ApiServer, World, fixed_port

BRIEF = 12
"""Seconds of a token: a proxy renews it within six."""


class Organisation(World):
    """An organisation whose relay says where one logs in."""

    def start_issuer(self) -> None:
        super().start_issuer()
        self.issuer.settings(dpop="on")
        self.relay_settings += (
            f'login.issuer = "{self.issuer.url}"\n'
            # The audience of an id token is the client's id.
            f'login.client_id = "{CLUSTER_AUDIENCE}"\n'
        )


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Organisation(api, directory=tmp_path_factory.mktemp("one")) as world:
        yield world.start()


class Person(Machine):
    """A person's machine."""

    def log_in(self) -> str:
        """By a code on another device, as a script that was told the pin, the issuer and the client."""
        world, issuer = self.world, self.world.issuer
        process = self.begin(
            *(
                "login",
                "--wait",
                "100s",
                world.relay_url,
                "--relay-ca-pin",
                world.relay_pin,
                "--oidc-issuer-url",
                issuer.url,
            ),
            *("--oidc-client-id", CLUSTER_AUDIENCE, "--oidc-ca-file", str(issuer.ca_file)),
            *("--grant-type", "device-code"),
        )
        issuer.approve(process.wait_for_line(r"enter the code (\S+)", timeout=30)[1])
        assert process.wait(30) == 0, process.tail()
        return process.output()

    @property
    def kubeconfig(self) -> Path:
        return self.directory / "kubeconfig"

    def proxy(self) -> ManagedProcess:
        process = self.begin(
            *("proxy", "-n", self.world.cluster, "--trust-first-use", "-f", str(self.kubeconfig)),
            # One of its own, because other tests run on this machine; a port that is named is kept as a chosen one is.
            *("--port", str(fixed_port())),
        )
        process.wait_for_line("Press Ctrl.C to close proxy", timeout=30)
        return process

    def whoami(self, cluster: Cluster, context: str) -> str:
        """Whom the API server sees."""
        done = cluster.kubectl("auth", "whoami", f"--kubeconfig={self.kubeconfig}", f"--context={context}")
        return done.stdout


@pytest.fixture
def person(world: World, tmp_path: Path) -> Iterator[Person]:
    before = len(world.processes)
    yield Person(world, "person", tmp_path, None)
    for process in reversed(world.processes[before:]):
        process.stop()


def test_after_a_login_no_command_needs_a_flag(world: World, cluster: Cluster, person: Person) -> None:
    assert "Logged in as alice@example.com" in person.log_in()
    assert person.run("clusters", "-o", "name", check=False) == (0, f"{CLUSTER}\n")
    status, shown = person.run("doctor", "-n", CLUSTER, "--trust-first-use", check=False)
    assert (status, "failed" in shown) == (0, False), shown
    person.proxy()
    assert "alice@example.com" in person.whoami(cluster, CLUSTER)
    status, shown = person.run("whoami", "--check", check=False)
    assert (status, f"{world.relay_url} takes the login" in shown) == (0, True)

    # With the login goes everything that it gave; what the user trusts stays.
    assert person.run("logout", check=False) == (0, f"Logged out at {world.relay_url} as alice@example.com.\n")
    assert world.issuer.requests("/revoke") == 1
    status, shown = person.run("clusters", check=False)
    assert (status, f"run `arcbridge login {world.relay_url}`" in shown) == (3, True), shown


def test_an_uninstallation_logs_out_and_leaves_no_file(world: World, person: Person) -> None:
    person.log_in()
    proxy = person.proxy()
    status, shown = person.run("uninstall", "--yes", check=False)
    assert (status, "serves a context: end it (Ctrl-C), and try again" in shown) == (1, True), shown
    proxy.stop()
    before = world.issuer.requests("/revoke")
    status, shown = person.run("uninstall", "--yes", check=False)
    assert (status, f"removed: the login at {world.relay_url}\n" in shown) == (0, True), shown
    assert f'removed: context "{CLUSTER}"' in shown
    assert world.issuer.requests("/revoke") == before + 1
    assert {path.name for path in person.directory.rglob("*") if path.is_file()} <= {
        *("kubeconfig", "kubeconfig.before-arcbridge"),
        *(path.name for path in person.directory.glob("*.log")),
    }
    status, shown = person.run("whoami", check=False)
    assert status == 3, shown


def test_tokens_are_renewed_under_what_runs(world: World, cluster: Cluster, person: Person) -> None:
    world.issuer.settings(lifetime=BRIEF)
    try:
        person.log_in()
        proxy = person.proxy()
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
        status, shown = person.run(*command, *trust, *files, check=False)
        assert status == 3
        assert f'{identity} is for audience "{CLUSTER_AUDIENCE}", the relay wants "{RELAY_AUDIENCE}"' in shown

"""A new user without internet and without Python: one file from the relay, a login, and kubectl works.

The client is the one that `make dist` builds of the last commit; it runs in an empty directory, in an environment that
has nothing but a home.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from arcbridge import __version__
from arcbridge.client.relay.update_notice import platform_name
from tests.support.cluster import Cluster, Kubectl
from tests.support.processes import ManagedProcess, require_or_skip
from tests.support.release import shared_release
from tests.support.reports import until, wait_for_record
from tests.support.world import ApiServer, World

# The release is built first.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def offered(index: None, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The directory that the relay serves: a release, as an operator copies it."""
    directory = tmp_path_factory.mktemp("offered") / "client"
    shutil.copytree(shared_release(tmp_path_factory, worker_id), directory)
    directory.chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def world(api: ApiServer, offered: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(api, directory=tmp_path_factory.mktemp("download"))
    world.relay_settings = f'client.directory = "{offered}"'
    with world:
        yield world.start()


@pytest.fixture(scope="module")
def curl(world: World) -> list[str]:
    """A command line that trusts the relay's CA, as its operator gives it to users."""
    program = shutil.which("curl")
    if program is None:
        require_or_skip("curl", "curl is not installed")
    ca = world.relay_config.parent / "data" / "ca.crt"
    return [program, "--fail", "--silent", "--show-error", "--cacert", str(ca)]


@pytest.fixture(scope="module")
def client(world: World, curl: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The downloaded file, checked as docs/how-to/install.md says, in a directory of its own."""
    directory = tmp_path_factory.mktemp("colleague") / "empty"
    directory.mkdir()
    url = f"{world.relay_url}/client/{platform_name()}"
    subprocess.run([*curl, "--output", "arcbridge", url], cwd=directory, check=True, timeout=60)
    told = subprocess.run([*curl, f"{url}.sha256"], check=True, capture_output=True, timeout=60).stdout
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet"], cwd=directory, input=told, check=True)
    (directory / "arcbridge").chmod(0o755)
    return directory / "arcbridge"


class Colleague:
    """A person with the file and a home, and nothing else."""

    def __init__(self, client: Path, world: World) -> None:
        self.client = client
        self.world = world
        self.home = client.parent.parent / "home"
        self.home.mkdir(exist_ok=True)

    def start(
        self, name: str, *arguments: str, terminal: bool = False, env: Mapping[str, str] | None = None
    ) -> ManagedProcess:
        variables = [f"{key}={value}" for key, value in {"HOME": str(self.home), **(env or {})}.items()]
        return ManagedProcess(
            ["env", "-i", *variables, str(self.client), *self.world.login_arguments(), *arguments],
            log_dir=self.world.logs,
            name=f"colleague-{name}",
            cwd=self.client.parent,
            terminal=(24, 200) if terminal else None,
        )


@pytest.fixture(scope="module")
def colleague(client: Path, world: World) -> Colleague:
    """Logged in by the device code."""
    person = Colleague(client, world)
    login = person.start("login", "login", "--wait", "100s")
    world.approve(login)
    assert "Logged in as" in login.output()
    return person


def test_kubectl_get(colleague: Colleague, cluster: Cluster) -> None:
    kubeconfig = colleague.home / "kubeconfig"
    proxy = colleague.start("proxy", "--file", str(kubeconfig), "--port", "0")
    try:
        proxy.wait_for_line("Press Ctrl.C to close proxy", timeout=30)
        answer = Kubectl(cluster.binaries.kubectl, kubeconfig, colleague.home / "kubectl").run(
            "get", "namespaces", "-o", "name"
        )
        assert "namespace/default" in answer.stdout.split()
    finally:
        proxy.stop()


def test_an_old_client_is_told_of_a_newer_one(colleague: Colleague, offered: Path, world: World) -> None:
    """Once, on a terminal; in a pipe nothing but the answer."""
    name = f"arcbridge-{platform_name()}"
    newer = (offered / name).read_bytes().replace(f"# arcbridge {__version__},".encode(), b"# arcbridge 99.0.0,", 1)
    (offered / "new").write_bytes(newer)
    (offered / "new").rename(offered / name)

    piped = colleague.start("piped", "clusters", "-o", "name")
    assert piped.wait(30) == 0, piped.tail()
    assert piped.output().split() == [world.cluster]

    def told() -> str:
        """The relay looks at its directory every two seconds."""
        process = colleague.start("terminal", "clusters", terminal=True)
        assert process.wait(30) == 0, process.tail()
        return next((line for line in process.output().splitlines() if line.startswith("notice:")), "")

    line = until(told, "the client tells that there is a newer one", timeout=60)
    assert line.strip() == (
        f"notice: this client is {__version__}, the relay offers 99.0.0: {world.relay_url}/client/{platform_name()} "
        "(ARCBRIDGE_NO_UPDATE_NOTICE=1 hides this)"
    )
    wait_for_record(world.relay, "client offered", version="99.0.0")
    assert told() == "", "it was told today"

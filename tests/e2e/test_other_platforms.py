"""The client where POSIX modules are missing, as on Windows, and on asyncio's own loop (docs/how-to/install.md).

Windows is simulated (`tests/support/windows.py`); it shows what a client imports and calls, not how Windows behaves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, Kubectl
from tests.support.processes import ManagedProcess
from tests.support.world import World

ROOT = Path(__file__).resolve().parents[2]
UNIT_TESTS = (
    *("commands/test_directory", "kubeconfig/test_entries", "kubeconfig/test_file", "credentials/test_login"),
    *("credentials/test_login_tokens", "credentials/test_token_cache", "session/test_trust", "test_state"),
    "relay/test_update_notice",
)
"""Of tests/client: what keeps files, takes locks and asks servers; sessions and the endpoint run above."""


class Person:
    """A person on a simulated Windows."""

    def __init__(self, world: World, home: Path) -> None:
        self.world = world
        self.home = home
        home.mkdir()

    def start(self, name: str, *arguments: str) -> ManagedProcess:
        return ManagedProcess(
            [sys.executable, "-m", "tests.support.windows", "arcbridge", *self.world.login_arguments(), *arguments],
            log_dir=self.world.logs,
            name=f"windows-{name}",
            cwd=ROOT,
            env={
                "HOME": None,
                "USERPROFILE": str(self.home),
                "LOCALAPPDATA": str(self.home / "local"),
                "KUBECONFIG": "",
            }
            | {f"XDG_{kind}_HOME": None for kind in ("CONFIG", "STATE", "CACHE")},
        )


_IMPORTS = """
from tests.support.windows import pretend; pretend(windows=True)
import importlib, pkgutil
import arcbridge.client
names = [one.name for one in pkgutil.walk_packages(arcbridge.client.__path__, "arcbridge.client.")]
commands = ("background", "client", "credential", "login", "run", "uninstall")
for name in [*names, *(f"arcbridge.cli.{one}" for one in commands)]:
    importlib.import_module(name)
print(len(names))
"""


def test_every_module_of_the_client_can_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORTS], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60


@pytest.fixture(scope="module")
def person(world: World, tmp_path_factory: pytest.TempPathFactory) -> Person:
    """Logged in."""
    person = Person(world, tmp_path_factory.mktemp("windows") / "alice")
    world.approve(person.start("login", "login", "--wait", "100s"))
    return person


@pytest.mark.parametrize("command", ["clusters", "doctor"])
def test_commands_that_answer(person: Person, command: str) -> None:
    process = person.start(command, command)
    assert process.wait(60) == 0, process.tail()
    assert person.world.cluster in process.output()


def test_a_proxy_and_what_it_keeps(person: Person, cluster: Cluster) -> None:
    kubeconfig = person.home / "kubeconfig"
    proxy = person.start("proxy", "--file", str(kubeconfig), "--port", "0")
    try:
        proxy.wait_for_line("Press Ctrl.C to close proxy", timeout=30)
        answer = Kubectl(cluster.binaries.kubectl, kubeconfig, person.home / "kubectl").run(
            "get", "namespaces", "-o", "name"
        )
        assert "namespace/default" in answer.stdout.split()
    finally:
        proxy.stop()
    assert (person.home / "local" / "arcbridge" / "pins.toml").is_file()
    assert (person.home / "local" / "arcbridge" / "Cache").is_dir()
    assert not (person.home / ".local").exists()


def test_the_simulation_has_no_posix(person: Person) -> None:
    """What is blocked is blocked: the client of the other tests did without it."""
    code = (
        "from tests.support.windows import pretend\npretend(windows=True)\n"
        "exec(compile('import fcntl', 'x', 'exec'), {'__name__': 'arcbridge.x'})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "No module named 'fcntl'" in done.stderr


@pytest.mark.timeout(300)
def test_unit_tests_of_the_client_without_posix_modules() -> None:
    """On asyncio's loop, which pytest-asyncio takes."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.support.windows", "pytest", "-q", "-p", "no:cacheprovider", "-x"),
            *(f"tests/client/{name}.py" for name in UNIT_TESTS),
        ],
        cwd=ROOT,
        env={**os.environ, "ARCBRIDGE_LOOP": "asyncio"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

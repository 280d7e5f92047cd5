"""Roles of an earlier version beside those of this one, in every mixture, as during every upgrade.

The earlier version is the newest release that git knows, and before there is one, the commit below.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import pytest

from arcbridge.errors import ExitCode
from tests.support.cluster import Cluster, Kubectl
from tests.support.processes import require_or_skip, run
from tests.support.reports import until
from tests.support.targets import EchoServer
from tests.support.world import ALICE, ApiServer, World, arcbridge

ROOT = Path(__file__).resolve().parents[2]
BEFORE_ANY_RELEASE = "0e86ebf"
NAMESPACE = "skew"
MIXED: tuple[tuple[str, ...], ...] = ((), ("relay",), ("agent",), ("relay", "agent"))
"""Which of relay and agent are of the earlier version. With clients of both these are six mixtures."""


def earlier() -> str:
    """The newest release's tag, or the commit that stands for one."""
    tags = subprocess.run(
        ["git", "tag", "--list", "v*", "--sort=-version:refname"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    return tags[0] if tags else BEFORE_ANY_RELEASE


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree_of(earlier(), tmp_path_factory.mktemp("earlier"))


def tree_of(commit: str, directory: Path) -> Path:
    """Write the product as it was at a commit to `directory`; its dependencies are those of this environment."""
    done = subprocess.run(["git", "archive", commit, "arcbridge"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        require_or_skip("history", f"git has no {commit} here: {done.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as tree:
        tree.extractall(directory, filter="data")
    where = [*in_tree(directory), sys.executable, "-c", "import arcbridge; print(arcbridge.__file__)"]
    assert run(where).stdout.decode().startswith(f"{directory}/"), "the earlier version is what would run"
    return directory


def in_tree(directory: Path) -> tuple[str, ...]:
    """What a command begins with to run the modules of a tree: of `python -m`, the working directory comes first."""
    return ("env", "-C", str(directory))


@pytest.fixture(scope="module")
def pod(cluster: Cluster) -> Iterator[str]:
    cluster.add_pod("shell", NAMESPACE)
    yield "shell"
    cluster.delete_pod("shell", NAMESPACE)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("roles", MIXED, ids=lambda roles: "-and-".join(roles) or "client")
def test_roles_of_two_versions(
    tmp_path: Path, cluster: Cluster, api: ApiServer, echo: EchoServer, pod: str, old: Path, roles: tuple[str, ...]
) -> None:
    """kubectl, exec, a forward, and a session that outlives its relay, by a client of each version that makes a mixture
    of these relays and agents."""
    before = in_tree(old)
    versions: list[tuple[str, ...]] = [before] if len(roles) < 2 else []
    if roles:
        versions.append(())
    with World(api, directory=tmp_path / "world") as world, ExitStack() as sockets:
        world.relay_prefixes = [before if "relay" in roles else ()]
        world.agent_prefixes = [before if "agent" in roles else ()]
        world.targets["echo"] = (echo.address, ALICE.groups)
        world.start()
        if "relay" in roles:
            # An operator's commands are of this version as soon as it is installed.
            line = arcbridge("--role", "relay", "--config", str(world.relay_config), "doctor", "-o", "json")
            found = {row["code"] for row in json.loads(run(line, check=False).stdout)["hops"]}
            assert "relay_not_running" not in found
            assert "relay_older" in found or earlier() != BEFORE_ANY_RELEASE
        people = []
        for version in versions:
            world.client_prefix = version
            kubectl = cluster.kubectl_for(kubeconfig=world.start_client(ALICE).kubeconfig)
            assert "namespace/default" in kubectl.run("get", "namespaces", "-o", "name").stdout
            assert kubectl.run("auth", "whoami", "-o", "jsonpath={.status.userInfo.username}").stdout == ALICE.email
            done = kubectl.run("exec", "-n", NAMESPACE, pod, "--", "sh", "-c", "echo out; exit 7", check=False)
            assert (done.stdout, done.returncode) == ("out\n", 7)
            shell = kubectl.start("exec", "-i", "-n", NAMESPACE, pod, "--", "cat", stdin=True)
            shell.send("before\n")
            shell.wait_for_line("before")
            address = ("127.0.0.1", world.start_forward("echo")[1])
            sock = sockets.enter_context(socket.create_connection(address, timeout=60))
            assert echoed(sock, b"before") == b"before"
            people.append((kubectl, shell, sock))

        if "agent" in roles and () in versions:  # it knows no restrictions, and would serve all rights
            world.client_prefix = ()
            refused = world.run_client(ALICE, "run", "--read-only", "--", "kubectl", "version")
            assert (refused.returncode, refused.stdout) == (ExitCode.RUN_FAILED, "")
            assert "is older and cannot restrict a session" in refused.stderr

        world.kill_relay()
        world.start_relay()
        for kubectl, shell, sock in people:
            assert echoed(sock, b"resumed") == b"resumed"
            shell.send("resumed\n")
            shell.wait_for_line("resumed", timeout=60)
            shell.close_stdin()
            assert shell.wait(30) == 0
            until(lambda kubectl=kubectl: works(kubectl), "new requests work", timeout=30)


def works(kubectl: Kubectl) -> bool:
    return kubectl.run("get", "namespaces", check=False).returncode == 0


def echoed(sock: socket.socket, words: bytes) -> bytes:
    sock.sendall(words)
    return sock.recv(len(words), socket.MSG_WAITALL)

"""The demonstration API, asked by the kubectl that is here: what it lacks is refused in words."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Kubectl, kubectl_versions
from tests.support.processes import ManagedProcess

ROOT = Path(__file__).parents[2]


class Api:
    """The running API, and a kubectl that asks it directly with the agent's token."""

    def __init__(self, process: ManagedProcess, directory: Path, kubectl: Path) -> None:
        self.process = process
        self._url = process.wait_for_line(r"listening on (https://\S+)")[1]
        self._directory = directory
        self._kubectl = kubectl

    def asked_by(self, user: str, group: str) -> Kubectl:
        """Return kubectl for a person of a group."""
        home = self._directory / user
        home.mkdir(exist_ok=True)
        kubeconfig = home / "kubeconfig"
        token = (self._directory / "token").read_text()
        kubeconfig.write_text(
            "apiVersion: v1\nkind: Config\ncurrent-context: demo\n"
            f"clusters: [{{name: demo, cluster: {{server: '{self._url}', "
            f"certificate-authority: '{self._directory}/ca.pem'}}}}]\n"
            f"users: [{{name: demo, user: {{token: '{token}', as: {user}, as-groups: [{group}]}}}}]\n"
            "contexts: [{name: demo, context: {cluster: demo, user: demo, namespace: shop}}]\n"
        )
        return Kubectl(self._kubectl, kubeconfig, home)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    directory = tmp_path_factory.mktemp("api")
    argv = [sys.executable, "-m", "tests.demo.api", "--directory", str(directory)]
    with ManagedProcess(argv, log_dir=directory, name="api", cwd=ROOT) as process:
        yield Api(process, directory, next(iter(kubectl_versions(build=False).values())))


@pytest.fixture
def alice(api: Api) -> Kubectl:
    return api.asked_by("alice", "platform")


def test_pods_are_listed_shown_and_described(alice: Kubectl) -> None:
    assert "Running" in alice.run("get", "pods", "-A").stdout
    assert alice.run("get", "pod", "till", "-o", "jsonpath={.status.phase}").stdout == "Running"
    assert alice.run("get", "po,cm,ns", "-o", "name").stdout.split() == [
        *("pod/till", "pod/stockroom", "configmap/opening-hours"),
        *("namespace/default", "namespace/kube-system", "namespace/shop"),
    ]
    assert "Name:         till" in alice.run("describe", "pod", "till").stdout
    assert 'pods "nosuch" not found' in alice.run("get", "pod", "nosuch", check=False).stderr


def test_logs_follow(alice: Kubectl) -> None:
    with alice.start("logs", "-f", "--tail", "1", "stockroom") as following:
        following.wait_for_line("the stockroom is open|sale|alice")
        alice.run("exec", "stockroom", "--", "true", "what was done here")
        following.wait_for_line("alice runs true what was done here")


def test_exec_on_a_terminal(alice: Kubectl) -> None:
    with alice.start("exec", "-it", "till", "--", "sh", terminal=(31, 97)) as shell:
        shell.wait_for_line("till \\(demonstration\\)")
        shell.send("stty size\n")
        shell.wait_for_line("31 97$")
        shell.resize(44, 88)
        shell.send("until [ \"$(stty size)\" = '44 88' ]; do :; done; echo resi''zed\n")
        shell.wait_for_line("resized$")
        # One process that says so itself: the shell's own word may come before what it starts has the terminal.
        shell.send("sh -c 'echo as\"\"leep; exec sleep 1000'\n")
        shell.wait_for_line("asleep$")
        interrupted = shell.mark()
        shell.send("\x03")
        shell.wait_for_line("till \\(demonstration\\)", after=interrupted)
        shell.send("exit 7\n")
        assert shell.wait() == 7


def test_developers_may_only_look(api: Api) -> None:
    bob = api.asked_by("bob", "developers")
    assert "till" in bob.run("get", "pods").stdout
    assert "the till is open" in bob.run("logs", "till").stdout
    for command in (("exec", "till", "--", "true"), ("delete", "pod", "till")):
        assert "is forbidden" in bob.run(*command, check=False).stderr, command
    mallory = api.asked_by("mallory", "interns")
    assert "Forbidden" in mallory.run("get", "pods", check=False).stderr


def test_it_takes_its_commands_with_it(tmp_path: Path) -> None:
    kubectl = next(iter(kubectl_versions(build=False).values()))
    argv = [sys.executable, "-m", "tests.demo.api", "--directory", str(tmp_path)]
    with ManagedProcess(argv, log_dir=tmp_path, name="api", cwd=ROOT) as process:
        alice = Api(process, tmp_path, kubectl).asked_by("alice", "platform")
        with alice.start("exec", "till", "--", "sh", "-c", "echo pid $$; exec sleep 1000") as running:
            pid = int(running.wait_for_line(r"pid (\d+)")[1])
            process.signal(signal.SIGTERM)
            assert process.wait() == 0
            assert not Path(f"/proc/{pid}").exists()

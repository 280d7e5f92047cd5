"""Rollouts, drains and evictions of the agent's pods under people at work, for a DaemonSet and a Deployment: Helm and
Kubernetes' own controllers and scheduler decide, and a node runs the agents as its kubelet would."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_daemonset import MINUTES, NAMESPACE, RELEASE, Loop, Place, kubectl_of, place
from tests.e2e.test_survival_kubectl import NAMESPACE as PEOPLE
from tests.e2e.test_survival_kubectl import Everything, Ticks
from tests.support.reports import until
from tests.support.world import ALICE, Client

MIB = 1 << 20
LABEL = "arcbridge.node-restriction.kubernetes.io/agent"


class People:
    """A session at each of the release's agents, and in one of them all that people do."""

    def __init__(self, here: Place, directory: Path, copied: int) -> None:
        self._here = here
        self._stack = ExitStack()
        directory.mkdir()
        clients = one_for_each_agent(here)
        self.first = kubectl_of(here, clients[0])
        self._hurry = directory.parent / "hurry"
        self.everything = Everything(self.first, here.cluster, directory, copied)
        self._stack.callback(self.everything.stop)
        self.followers: list[Ticks] = []
        for client in clients[1:]:
            follower = kubectl_of(here, client).start("logs", "-f", "-n", PEOPLE, self.everything.pod)
            self._stack.callback(follower.stop)
            self.followers.append(Ticks(follower))
        self.copy = self.everything.copy()
        self.wait_moves()

    def wait_moves(self) -> None:
        """Require that all of it goes on."""
        assert self.copy.running or self.copy.wait() == 0  # on a slow machine three minutes are over
        self.everything.wait_moves()
        for follower in self.followers:
            follower.wait_moves()

    def check(self) -> None:
        """Require that all of it ends in order, with nothing missing."""
        self._hurry.touch()
        self.everything.check()
        for follower in self.followers:
            follower.check()

    def close(self) -> None:
        self._stack.close()


def one_for_each_agent(here: Place) -> list[Client]:
    """Start clients until each of the agents' pods has the session of one.

    A relay asks the agents in turn, and sessions of others, which move to another agent within seconds, take turns as
    well.
    """
    clients, agents = [], set[str]()
    wanted = len(here.pods())
    while len(agents) < wanted:
        assert len(clients) < 5 * wanted
        clients.append(here.world.start_client(ALICE))
        session = clients[-1].process.wait_for_line(r'"session established".*"session":"(\w+)"')[1]
        joined = here.world.relay.wait_for_line(rf'"joined".*"session":"{session}".*"agent":"([^"]+)"')
        agents.add(joined[1])
    return clients


@pytest.fixture(autouse=True)
def _slow_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{write_slow_tar(tmp_path)}:{os.environ['PATH']}")


def write_slow_tar(directory: Path) -> Path:
    """Return a folder for PATH, from which pods have a `tar` that takes half a mebibyte a second until the file `hurry`
    is there, so that a copy runs for as long as a test wants: any slower, and kubectl's pings wait behind the copy for
    longer than it waits for them.

    A `tar` of a copy out of the pod ends only when the copy is whole: an API server closes once it has written all, and
    a ping that comes after that has its kernel throw away what is unread.
    """
    pace = (
        "import os, sys, time\n"
        "while chunk := sys.stdin.buffer.read(65536):\n"
        "    sys.stdout.buffer.write(chunk)\n"
        "    time.sleep(0 if os.path.exists(sys.argv[1]) else 1 / 8)\n"
    )
    (directory / "pace.py").write_text(pace)
    tar = directory / "bin" / "tar"
    tar.parent.mkdir()
    tar.write_text(
        f"""#!/bin/sh
{sys.executable} {directory}/pace.py {directory}/hurry | {shutil.which("tar")} "$@" || exit
case $1 in c*) for file; do :; done; until cmp -s "$file" "${{file%/*}}/back"; do sleep 0.1; done ;; esac
"""
    )
    tar.chmod(0o755)
    return tar.parent


@contextmanager
def cluster(directory: Path, kind: str, agents: int) -> Iterator[Place]:
    """Start a cluster: node-1 runs what people work with, `agents` further ones the agents."""
    with place(directory, "constrained", nodes=1 + agents) as here:
        here.cluster.grant("edit", group=ALICE.groups[0])
        here.cluster.kubectl("label", "node", *(f"node-{2 + n}" for n in range(agents)), f"{LABEL}=true")
        here.values = {"workload": {"kind": kind}, "nodeSelector": {LABEL: "true"}}
        here.helm_does("install")
        yield here


def ending(here: Place) -> dict[str, Any]:
    """The agent's pods that are being ended and are not gone, by name."""
    return {pod["metadata"]["name"]: pod for pod in here.all_pods() if "deletionTimestamp" in pod["metadata"]}


def ready(here: Place) -> set[str]:
    """The names of the agent's pods that are ready and are not being ended."""
    found = here.pods()
    states = {pod["metadata"]["name"]: pod["status"].get("conditions", ()) for pod in found}
    return {
        name for name, of in states.items() if {"Ready": "True"}.items() <= {c["type"]: c["status"] for c in of}.items()
    }


def evict(here: Place, pod: str) -> None:
    """Evict a pod as a drain does. Raises `ApiError` where the disruption budget forbids it."""
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": NAMESPACE}}
    here.cluster.request("POST", f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction", body)


def names(here: Place) -> set[str]:
    return {pod["metadata"]["name"] for pod in here.pods()}


def took(began: float, what: str) -> None:
    """Say how long it took; nothing is decided by it."""
    print(f"{what}: {time.monotonic() - began:.1f} s")


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", ["DaemonSet", "Deployment"])
def test_no_drain_eviction_upgrade_or_rollback_ends_or_awaits_a_session(tmp_path: Path, kind: str) -> None:
    """One cluster for all of it, one after the other, because starting one takes longer than each of them."""
    with cluster(tmp_path, kind, 3) as here:
        pods = {pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in here.pods()}
        old = set(pods)
        evicted, node = next(iter(pods.items()))
        with closing(People(here, tmp_path / "first", 64 * MIB)) as first, Loop(first.first) as loop:
            began = time.monotonic()
            drain = here.cluster.kubectl_for().start("drain", node, "--ignore-daemonsets", "--delete-emptydir-data")
            if kind == "DaemonSet":
                assert drain.wait(60) == 0
                took(began, f"{kind}: drain with sessions")
                evict(here, evicted)
            until(lambda: len(ready(here) - old) == 1, "another pod is ready", timeout=60)
            took(began, f"{kind}: replacement with sessions")
            loop.go_on()
            for count, pod in enumerate(list(pods)[1:], 2):
                # Within the budget: the one before has been replaced, and counts no more although it serves on.
                evict(here, pod)
                until(lambda wanted=count: len(ready(here) - old) == wanted, "one more is ready", timeout=60)
            assert set(ending(here)) == old
            first.wait_moves()
            loop.go_on()

            here.kubectl("uncordon", node)
            replaced = names(here)
            began = time.monotonic()
            here.helm_does("upgrade", logLevel="warning")
            took(began, f"{kind}: upgrade with sessions")
            here.kubectl("rollout", "status", f"{kind.lower()}/{RELEASE}", "--timeout=1s")
            # Helm was through while every old pod served on. Nothing else ends but the pods that had replaced them.
            assert old <= set(ending(here)) <= old | replaced
            new = names(here)
            assert len(new) == len(old)
            assert not new & replaced
            with closing(People(here, tmp_path / "second", 32 * MIB)) as second:
                began = time.monotonic()
                here.helm.run("rollback", RELEASE, "--namespace", NAMESPACE, "--wait", MINUTES, timeout=320)
                took(began, f"{kind}: rollback with sessions")
                assert old | new <= set(ending(here)) <= old | new | replaced
                first.wait_moves()
                second.wait_moves()
                loop.go_on()
                second.check()
            first.check()
            assert loop.failures == []
        if kind == "Deployment":
            assert drain.wait(60) == 0
        until(lambda: not ending(here), "the old pods end with their sessions", timeout=60)
        assert "failed" not in here.helm.run("history", RELEASE, "--namespace", NAMESPACE).stdout

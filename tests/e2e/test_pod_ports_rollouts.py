"""`forward deploy/NAME` through `rollout restart`: controllers replace the pods, and a program connects all the time.

ARCBRIDGE_ROLLOUTS says through how many (2), and that the machine is quiet: then what is measured is held to the bound
of a quiet machine. ARCBRIDGE_ROLLOUTS_OUT names a file for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster, Unavailable, require_isolation
from tests.support.processes import require_or_skip
from tests.support.reports import until
from tests.support.world import ALICE, ApiServer, World

NAMESPACE = "shop"
IMAGE = "registry.example.org/web"
ROLLOUTS = int(os.environ.get("ARCBRIDGE_ROLLOUTS", "2"))
BOUND = 2.0 if "ARCBRIDGE_ROLLOUTS" in os.environ else 20.0
"""Seconds from a new pod's readiness to a connection that works; beside other tests they are mostly theirs."""
SERVER = """
import os, signal, socketserver
class Name(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(os.environ['HOSTNAME'].encode() + b"\\n")
        self.request.recv(1)
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
socketserver.ThreadingTCPServer.daemon_threads = True
socketserver.ThreadingTCPServer(("127.0.0.1", 80), Name).serve_forever()
"""
PROBE = "import socket; socket.create_connection(('127.0.0.1', 80), timeout=1)"


def deployment(name: str, strategy: str) -> dict[str, Any]:
    container = {
        "name": "web",
        "image": f"{IMAGE}:1",
        "args": ["-c", SERVER],
        "ports": [{"name": "http", "containerPort": 80}],
        "readinessProbe": {"exec": {"command": [sys.executable, "-c", PROBE]}, "periodSeconds": 1},
    }
    labels = {"app": name}
    spec = {"terminationGracePeriodSeconds": 1, "containers": [container]}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "replicas": 1,
            "strategy": {"type": strategy},
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


class Caller:
    """Connects again and again, in a thread, and notes when which pod answered, and when none did."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._over = threading.Event()
        self.answers: list[tuple[float, float, str]] = []
        """When each connection began and ended, and the pod that it reached; empty: it was cut."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            began, name = time.time(), ""
            with (
                contextlib.suppress(ConnectionError),
                socket.create_connection(("127.0.0.1", self._port), timeout=60) as sock,
            ):
                name = sock.makefile().readline().strip()
            self.answers.append((began, time.time(), name))

    def close(self) -> None:
        self._over.set()
        self._thread.join(60)

    def first(self, pod: str) -> float | None:
        """When a connection to a pod first worked."""
        return next((ended for _, ended, name in list(self.answers) if name == pod), None)


class Rollouts:
    """Restarts one deployment, and measures from each new pod's readiness to the first connection that works."""

    def __init__(self, cluster: Cluster, name: str, caller: Caller) -> None:
        self._name = name
        self._caller = caller
        self._kubectl = cluster.kubectl_for()
        columns = (
            "NAME:.metadata.name,READY:.status.conditions[?(@.type=='Ready')].status,END:.metadata.deletionTimestamp"
        )
        self._watch = self._kubectl.start(
            *("get", "pods", "-n", NAMESPACE, "-l", f"app={name}", "--watch", "--no-headers"),
            *("-o", f"custom-columns={columns}"),
        )
        self._pods: set[str] = set()
        self.next_pod()
        self.seconds: list[float] = []

    def next_pod(self) -> tuple[str, float]:
        """Wait until a further pod is ready; return its name and when that was seen."""
        others = "".join(f"(?!{pod} )" for pod in self._pods)
        pod = self._watch.wait_for_line(rf"^{others}(\S+) +True +<none>", stream="stdout", timeout=90)[1]
        self._pods.add(pod)
        return pod, time.time()

    def restart(self) -> None:
        self._kubectl.run("rollout", "restart", "-n", NAMESPACE, f"deployment/{self._name}")
        pod, ready = self.next_pod()
        answered = until(lambda: self._caller.first(pod), f"a connection reaches {pod}", timeout=60)
        # The pod before may still answer, which is as good.
        works = min(
            ended for began, ended, name in list(self._caller.answers) if name and ended >= min(ready, answered)
        )
        self.seconds.append(max(0.0, works - ready))

    def close(self) -> None:
        self._watch.stop()


@pytest.mark.timeout(120 + 60 * ROLLOUTS)
def test_the_next_connection_works_soon_after_a_new_pod_is_ready(tmp_path: Path) -> None:
    """With the old pod there until the new one is ready, and with none in between."""
    try:
        require_isolation()
    except Unavailable as error:
        require_or_skip("pods", str(error))
    if Path(sys.prefix).is_relative_to("/tmp"):
        require_or_skip("pods", "the checkout is under /tmp, and pods have a volume of their own there: move it")
    try:
        cluster = Cluster(directory=tmp_path / "cluster", images={IMAGE: (sys.executable,)})
    except Unavailable as error:
        require_or_skip("apiserver", str(error))
    with cluster, contextlib.ExitStack() as stack:
        cluster.install_agent()
        cluster.grant("edit", group=ALICE.groups[0], namespace=NAMESPACE)
        token = tmp_path / "token"
        token.write_text(cluster.service_account_token("arcbridge", "arcbridge-agent"))
        world = stack.enter_context(
            World(ApiServer(cluster.api_url, cluster.ca_file, token), directory=tmp_path / "world")
        )
        world.start()
        for name, strategy in (("rolling", "RollingUpdate"), ("recreated", "Recreate")):
            cluster.apply(deployment(name, strategy))
        words = ("deploy/rolling", ":80", "deployments/recreated", ":http", "-n", NAMESPACE)
        process, ports = world.start_pod_forward(*words, ports=2)
        callers = [Caller(port) for port in ports]
        both = [Rollouts(cluster, name, caller) for name, caller in zip(("rolling", "recreated"), callers, strict=True)]
        for rollouts, caller in zip(both, callers, strict=True):
            stack.callback(rollouts.close)
            stack.callback(caller.close)
        for _ in range(ROLLOUTS):
            for rollouts in both:
                rollouts.restart()
        measured = {}
        for name, rollouts, caller in zip(("rolling", "recreated"), both, callers, strict=True):
            cut = sum(not answer[2] for answer in caller.answers)
            measured[name] = {
                "rollouts": len(rollouts.seconds),
                "seconds_from_ready_to_a_connection": {
                    "median": round(statistics.median(rollouts.seconds), 3),
                    "most": round(max(rollouts.seconds), 3),
                    "all": [round(one, 3) for one in rollouts.seconds],
                },
                "connections": len(caller.answers),
                "cut": cut,
            }
        print(json.dumps(measured))
        if out := os.environ.get("ARCBRIDGE_ROLLOUTS_OUT"):
            settings = f"ARCBRIDGE_ROLLOUTS={ROLLOUTS} ARCBRIDGE_ROLLOUTS_OUT=…"
            command = f"{settings} python -m pytest tests/e2e/{Path(__file__).name}"
            document = {"command": command, "cores": os.cpu_count(), "load": os.getloadavg(), **measured}
            Path(out).write_text(json.dumps(document, indent=1) + "\n")
        assert process.running
        assert max(both[0].seconds + both[1].seconds) <= BOUND, process.tail(60)

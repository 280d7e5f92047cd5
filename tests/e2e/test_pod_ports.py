"""`forward svc/NAME`: ports of pods through three processes and a real API server, while the pods come and go.

Port N of every pod is port N of 127.0.0.1 here, so that each pod serves at another one, which it calls `http`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from arcbridge.errors import ExitCode
from tests.e2e.test_upgrades import exchange
from tests.support.cluster import Cluster
from tests.support.processes import ManagedProcess
from tests.support.reports import audited, until
from tests.support.targets import EchoServer
from tests.support.world import ALICE, BOB, User, World, fixed_port

NAMESPACE = "ports"
SERVER = """
import socketserver, sys
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(sys.argv[2].encode() + b"\\n")
        while data := self.request.recv(65536):
            self.request.sendall(data)
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("127.0.0.1", int(sys.argv[1])), Echo).serve_forever()
"""
"""Says its name, then everything back."""


class Web:
    """A service and the pods behind it."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster = cluster
        self.name = name
        cluster.ensure_namespace(NAMESPACE)
        ports = [{"name": "web", "port": 80, "targetPort": "http"}, {"name": "dns", "port": 53, "protocol": "UDP"}]
        self._post("services", {"metadata": {"name": name}, "spec": {"selector": {"app": name}, "ports": ports}})

    def _post(self, kind: str, document: object) -> Any:
        return self._cluster.request("POST", f"/api/v1/namespaces/{NAMESPACE}/{kind}", document)

    def add(self, name: str, served_at: int = 0) -> None:
        """Add a pod and wait until it serves; `served_at`: its port is served by a process that outlives it."""
        port = served_at or fixed_port()
        container = {
            "name": "main",
            "image": "local",
            "command": ["sleep", "infinity"] if served_at else [sys.executable, "-c", SERVER, str(port), name],
            "ports": [{"name": "http", "containerPort": port}],
        }
        self._post(
            "pods",
            {
                "metadata": {"name": name, "labels": {"app": self.name}},
                "spec": {"nodeName": "node-1", "terminationGracePeriodSeconds": 0, "containers": [container]},
            },
        )

        def serves() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
            return False

        until(serves, f"{name} serves", timeout=30)

    def remove(self, name: str) -> None:
        self._cluster.delete_pod(name, NAMESPACE)


@pytest.fixture
def web(cluster: Cluster) -> Iterator[Web]:
    name = f"web-{os.urandom(4).hex()}"
    yield Web(cluster, name)
    cluster.kubectl("delete", "pods,services", "-n", NAMESPACE, "--all", "--grace-period=0", "--force")


def greeting(port: int, host: str = "127.0.0.1") -> str:
    """Connect and return what the pod says; empty where the connection was cut."""
    with contextlib.suppress(ConnectionError), socket.create_connection((host, port), timeout=40) as sock:
        return sock.makefile().readline().strip()
    return ""


def said(process: ManagedProcess, pod: str) -> None:
    process.wait_for_line(rf"new connections go to pod {pod}$", timeout=30)


def test_a_port_of_a_service_follows_its_pods(world: World, web: Web) -> None:
    web.add("one")
    process, (port, web_port, pod_port) = world.start_pod_forward(
        f"svc/{web.name}", ":80", "-n", NAMESPACE, ":web", "pod/one", ":http", ports=3
    )
    assert (greeting(port), greeting(web_port, "::1"), greeting(pod_port)) == ("one",) * 3
    data = os.urandom(3_000_000)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        assert exchange(sock, data) == b"one\n" + data  # the end of one direction does not end the other
    many = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(30)]
    for number, sock in enumerate(many):
        sock.sendall(b"hello %d\n" % number)
    for number, sock in enumerate(many):
        assert sock.makefile().read(len(f"one\nhello {number}")) == f"one\nhello {number}"
    for sock in many[1:]:
        sock.close()

    web.add("two")
    assert greeting(port) == "one", "it stays with a pod for as long as that serves"
    web.remove("one")
    with many[0] as sock, contextlib.suppress(ConnectionResetError):  # its process has ended, and the connection too
        assert sock.makefile().read() == ""
    said(process, "two")
    assert greeting(port) == "two"

    web.remove("two")
    process.wait_for_line("has no pods; connections wait", timeout=20)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:  # it waits for a pod
        web.add("three")
        assert sock.makefile().readline() == "three\n"

    record = audited(world, "it", name="three", subresource="portforward", stage="ended")
    assert (record["user"], record["upgrade"], len(record["ports"])) == (ALICE.email, "SPDY/3.1", 1)


def test_a_connection_to_a_pod_that_is_gone_is_cut_with_a_reason(world: World, web: Web, echo: EchoServer) -> None:
    """Nothing ends it by itself, as where a node has died: kubectl's port-forward hangs (kubernetes#59816)."""
    web.add("stuck", int(echo.address.rpartition(":")[2]))
    process, (port,) = world.start_pod_forward(f"svc/{web.name}", ":80", "-n", NAMESPACE)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(b"hello")
        assert sock.recv(5, socket.MSG_WAITALL) == b"hello"
        web.remove("stuck")
        web.add("next")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    process.wait_for_line("connection cut.*pod stuck is gone; the next connection goes to another one", timeout=20)
    assert greeting(port) == "next"


def test_what_is_open_survives_the_death_of_the_relay(world: World, web: Web) -> None:
    web.add("steady")
    _, (port,) = world.start_pod_forward(f"svc/{web.name}", ":80", "-n", NAMESPACE)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        lines = sock.makefile("rw")
        assert lines.readline() == "steady\n"
        world.kill_relay()
        world.start_relay()
        lines.write("still there?\n")
        lines.flush()
        assert lines.readline() == "still there?\n"
    assert greeting(port) == "steady"


@pytest.mark.parametrize(
    ("user", "words", "code", "said"),
    [
        (ALICE, ("svc/nosuch", ":80"), ExitCode.FAILURE, "there is no svc/nosuch in namespace ports"),
        (ALICE, ("svc/WEB", ":81"), ExitCode.USAGE, "svc/WEB has no TCP port '81'; it has 80 (web)"),
        (ALICE, ("svc/WEB", ":dns"), ExitCode.USAGE, "svc/WEB has no TCP port 'dns'; it has 80 (web)"),
        (ALICE, ("svc/WEB", "TAKEN:80"), ExitCode.USAGE, "Port TAKEN is already in use"),
        (ALICE, ("svc/WEB",), ExitCode.USAGE, "svc/WEB: give its ports, as 8080:80, :80 or 80"),
    ],
)
def test_what_cannot_be_is_said_before_a_port_is_served(
    world: World, web: Web, user: User, words: tuple[str, ...], code: ExitCode, said: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1])
        typed = [word.replace("WEB", web.name).replace("TAKEN", number) for word in words]
        done = world.run_client(user, "forward", "-n", NAMESPACE, *typed)
    assert (done.returncode, done.stdout) == (code, "")
    assert said.replace("WEB", web.name).replace("TAKEN", number) in done.stderr


def test_a_missing_right_is_said_when_a_connection_comes(world: World, web: Web, cluster: Cluster) -> None:
    """A user who may look at pods need not be allowed to reach into them."""
    cluster.grant("view", user=BOB.email, namespace=NAMESPACE)
    web.add("closed")
    process, (port,) = world.start_pod_forward(f"svc/{web.name}", ":80", "-n", NAMESPACE, user=BOB)
    assert greeting(port) == ""
    process.wait_for_line(r"cannot create resource \S*pods/portforward", stream="stderr", timeout=20)

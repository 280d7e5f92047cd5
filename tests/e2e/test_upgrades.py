"""exec, attach, logs -f, cp and port-forward through three processes, over WebSocket and over SPDY."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, Kubectl
from tests.support.reports import audited
from tests.support.targets import EchoServer
from tests.support.world import World

NAMESPACE = "upgrades"
SIZE = 30_000_000

PROTOCOLS = {
    "websocket": {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "true", "KUBECTL_PORT_FORWARD_WEBSOCKETS": "true"},
    "spdy": {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "false", "KUBECTL_PORT_FORWARD_WEBSOCKETS": "false"},
}


@pytest.fixture(scope="module")
def pod(cluster: Cluster) -> Iterator[str]:
    """A pod that counts, slowly, and reads its input."""
    cluster.add_pod(
        "till",
        NAMESPACE,
        command=("sh", "-c", "i=0; while read line; do i=$((i+1)); echo line $i: $line; done; sleep infinity"),
        stdin=True,
    )
    yield "till"
    cluster.delete_pod("till", NAMESPACE)


@pytest.fixture(params=sorted(PROTOCOLS))
def protocol(request: pytest.FixtureRequest) -> dict[str, str]:
    """kubectl's environment for one of the two protocols."""
    return PROTOCOLS[str(request.param)]


def test_exec_gives_output_and_exit_code(kubectl: Kubectl, pod: str, protocol: dict[str, str]) -> None:
    done = kubectl.run(
        *("exec", "-n", NAMESPACE, pod, "--", "sh", "-c", "echo out; echo err >&2; exit 7"), check=False, env=protocol
    )
    assert done.returncode == 7
    assert done.stdout == "out\n"
    assert done.stderr.startswith("err\n")


def test_exec_passes_stdin_and_its_end(kubectl: Kubectl, pod: str, protocol: dict[str, str]) -> None:
    """The end of stdin must not end stdout: what comes after it still arrives."""
    data = os.urandom(1_000_000)
    done = kubectl.run_bytes(
        *("exec", "-i", "-n", NAMESPACE, pod, "--", "sh", "-c", "sha256sum; head -c 1048576 /dev/zero"),
        input=data,
        env=protocol,
    )
    digest, _, rest = done.stdout.partition(b"\n")
    assert digest.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert rest == bytes(1048576)


def test_exec_on_a_terminal(kubectl: Kubectl, pod: str, protocol: dict[str, str]) -> None:
    with kubectl.start("exec", "-it", "-n", NAMESPACE, pod, "--", "sh", terminal=(31, 97), env=protocol) as shell:
        # kubectl tells the size in its own time: ask until it has.
        shell.send('until [ "$(stty size)" = "31 97" ]; do sleep 0.05; done; echo mark-$((40+2))\n')
        shell.wait_for_line("mark-42", timeout=20)
        shell.send("exit 3\n")
        assert shell.wait(20) == 3


def test_attach_and_logs_follow(kubectl: Kubectl, cluster: Cluster, protocol: dict[str, str]) -> None:
    name = "attached-" + os.urandom(4).hex()
    cluster.add_pod(name, NAMESPACE, command=("sh", "-c", "while read line; do echo got $line; done"), stdin=True)
    try:
        with (
            kubectl.start("logs", "-f", "-n", NAMESPACE, name) as logs,
            kubectl.start("attach", "-i", "-n", NAMESPACE, name, stdin=True, env=protocol) as attach,
        ):
            attach.send("one\n")
            attach.wait_for_line("got one", timeout=20)
            logs.wait_for_line("got one", timeout=20)
            attach.send("two\n")
            logs.wait_for_line("got two", timeout=20)
    finally:
        cluster.delete_pod(name, NAMESPACE)


def test_copy_both_ways(kubectl: Kubectl, pod: str, protocol: dict[str, str], tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(os.urandom(SIZE))
    remote = f"{tmp_path}/in-the-pod"
    kubectl.run("cp", "-n", NAMESPACE, str(source), f"{pod}:{remote}", env=protocol)
    kubectl.run("cp", "-n", NAMESPACE, f"{pod}:{remote}", str(back), env=protocol)
    assert hashlib.sha256(back.read_bytes()).digest() == hashlib.sha256(source.read_bytes()).digest()


def test_port_forward(
    kubectl: Kubectl, cluster: Cluster, echo: EchoServer, protocol: dict[str, str], world: World
) -> None:
    name = "ported-" + os.urandom(4).hex()
    port = int(echo.address.rsplit(":", 1)[1])
    cluster.add_pod(name, NAMESPACE, ports=[port])
    try:
        with kubectl.start("port-forward", "-n", NAMESPACE, f"pod/{name}", f":{port}", env=protocol) as forward:
            local = int(forward.wait_for_line(r"Forwarding from 127\.0\.0\.1:(\d+)", timeout=20)[1])
            data = os.urandom(300_000)
            for _ in range(2):
                with socket.create_connection(("127.0.0.1", local), timeout=20) as sock:
                    assert exchange(sock, data) == data
        # The port is in no path and no query: it was read behind the 101 (docs/threats.md#A26).
        record = audited(world, "it", name=name, subresource="portforward", stage="ended")
        assert record["ports"] == [str(port)]
        assert "more" not in record
        assert record["client_says"]["command"] == "kubectl port-forward"
        stages = [line["stage"] for line in world.audit_lines() if line.get("request") == record["request"]]
        assert stages == ["begun", "details", "ended"]
    finally:
        cluster.delete_pod(name, NAMESPACE)


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send all, end the direction and read to the end, at once, so that neither side has to buffer it all."""
    received = bytearray()
    view = memoryview(data)
    sock.settimeout(20)
    while view:
        view = view[sock.send(view[:65536]) :]
        if len(data) - len(view) - len(received) > 200_000:
            received += sock.recv(65536)
    sock.shutdown(socket.SHUT_WR)
    while chunk := sock.recv(65536):
        received += chunk
    return bytes(received)


def test_a_refused_exec_says_why(kubectl: Kubectl, protocol: dict[str, str]) -> None:
    done = kubectl.run("exec", "-n", NAMESPACE, "no-such-pod", "--", "true", check=False, env=protocol)
    assert done.returncode == 1
    assert "not found" in done.stderr

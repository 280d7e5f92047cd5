"""The cluster is what it claims to be: every kubectl works straight against it, before anything of ours is between."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import select
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import KUBECTL_MINORS, Cluster, Kubectl, Unavailable, kubectl_binary
from tests.support.processes import ManagedProcess, require_or_skip
from tests.support.reports import until

TRANSPORTS = ("websocket", "spdy")
SPDY = {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "false", "KUBECTL_PORT_FORWARD_WEBSOCKETS": "false"}
MEGABYTE = 1 << 20

# A cold build of Kubernetes takes minutes; once built, everything here takes seconds.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        cluster = Cluster()
    except Unavailable as error:
        require_or_skip("apiserver", str(error))
    with cluster:
        cluster.add_pod("web", command=["sh", "-c", "echo one; echo two; exec sleep infinity"], ports=[8080])
        cluster.add_pod("echo", command=["sh", "-c", 'while read line; do echo "echo:$line"; done'], stdin=True)
        yield cluster


@pytest.fixture(params=[(minor, transport) for minor in KUBECTL_MINORS for transport in TRANSPORTS], ids="-".join)
def kubectl(request: pytest.FixtureRequest, cluster: Cluster, tmp_path: Path) -> Kubectl:
    """Each kubectl, with each way of streaming, in a home of its own."""
    minor, transport = request.param
    try:
        binary = kubectl_binary(minor)
    except Unavailable as error:
        require_or_skip("kubectl", str(error))
    return Kubectl(binary, cluster.kubeconfig, tmp_path / "home", env=SPDY if transport == "spdy" else {})


def test_kubectl_is_the_version_it_is_taken_for(cluster: Cluster) -> None:
    for minor in KUBECTL_MINORS:
        answer = cluster.kubectl("version", version=minor).stdout
        assert f"Client Version: v{minor}." in answer
        assert "Server Version: v1.36.3" in answer


def test_get_apply_and_delete(cluster: Cluster, kubectl: Kubectl) -> None:
    assert re.search(r"^node-1 +Ready ", kubectl.run("get", "nodes").stdout, re.MULTILINE)
    assert re.search(r"^web +1/1 +Running ", kubectl.run("get", "pods").stdout, re.MULTILINE)
    manifest = '{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "applied"}, "data": {"k": "v"}}'
    assert kubectl.run("apply", "-f", "-", input=manifest).stdout == "configmap/applied created\n"
    assert kubectl.run("get", "configmap", "applied", "-o", "jsonpath={.data.k}").stdout == "v"
    kubectl.run("delete", "configmap", "applied")


def test_kubectl_run_is_scheduled_and_its_exit_is_reported(kubectl: Kubectl) -> None:
    done = kubectl.run(
        "run", "once", "--image=local", "--restart=Never", "-i", "--rm", "--quiet", "--command", "--",
        "sh", "-c", "read line; echo hello $line; exit 3", input="there\n", check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "hello there" in done.stdout


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_exec_returns_the_exit_code(kubectl: Kubectl, code: int) -> None:
    done = kubectl.run("exec", "web", "--", "sh", "-c", f"echo out; echo err >&2; exit {code}", check=False)
    assert done.returncode == code
    assert done.stdout == "out\n"
    assert done.stderr.startswith("err\n")


def test_exec_of_nothing_fails(kubectl: Kubectl) -> None:
    done = kubectl.run("exec", "web", "--", "/no/such/program", check=False)
    assert done.returncode == 1
    assert "no such file" in done.stderr


def test_exec_passes_standard_input_and_its_end(kubectl: Kubectl) -> None:
    data = os.urandom(3 * MEGABYTE)
    done = kubectl.run_bytes("exec", "-i", "web", "--", "sha256sum", input=data)
    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert kubectl.run_bytes("exec", "-i", "web", "--", "cat", input=data).stdout == data


def test_exec_on_a_terminal(kubectl: Kubectl) -> None:
    with kubectl.start("exec", "-it", "web", "--", "sh", terminal=(40, 120)) as shell:
        shell.wait_for_line(r"[#$] $")
        shell.send("tty && stty size\n")
        shell.wait_for_line(r"^/dev/pts/\d+")
        shell.wait_for_line(r"^40 120")
        # The resize travels beside the input: the shell waits for the signal it causes.
        shell.send("trap 'stty size; exit 5' WINCH; echo ready-$((1+1)); while :; do read x; done\n")
        shell.wait_for_line("ready-2")
        shell.resize(50, 132)
        shell.wait_for_line(r"^50 132")
        assert shell.wait() == 5


def test_a_process_ends_with_its_stream(kubectl: Kubectl, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # No input and no output: only the connection's end says that kubectl is gone.
    exec_ = kubectl.start("exec", "web", "--", "sh", "-c", f"exec sleep infinity > {fifo}")
    with fifo.open("rb") as reader:  # returns once the process has opened the other end
        exec_.kill()
        assert reader.read() == b""  # returns once it has ended


def test_attach_joins_the_main_process(kubectl: Kubectl) -> None:
    with kubectl.start("attach", "-i", "echo", stdin=True) as attached:
        attached.send("hello\n")
        attached.wait_for_line("^echo:hello$", stream="stdout")


def test_logs_and_logs_followed(cluster: Cluster, kubectl: Kubectl) -> None:
    assert kubectl.run("logs", "web").stdout == "one\ntwo\n"
    assert kubectl.run("logs", "web", "--tail=1").stdout == "two\n"
    assert kubectl.run("logs", "web", "--limit-bytes=5").stdout == "one\nt"
    with kubectl.start("attach", "-i", "echo", stdin=True) as attached:
        attached.send("before\n")
        attached.wait_for_line("^echo:before$", stream="stdout")
        with kubectl.start("logs", "-f", "echo", "--tail=1") as followed:
            followed.wait_for_line("^echo:before$")
            attached.send("after\n")
            followed.wait_for_line("^echo:after$")


def test_logs_followed_end_with_the_container(cluster: Cluster, kubectl: Kubectl) -> None:
    cluster.add_pod("short", command=["sh", "-c", "echo started; read line; echo over; exit 7"], stdin=True)
    try:
        with kubectl.start("logs", "-f", "short") as followed:
            followed.wait_for_line("^started$")
            with kubectl.start("attach", "-i", "short", stdin=True) as attached:
                attached.send("go\n")
                assert followed.wait() == 0
            assert followed.output("stdout") == "started\nover\n"
        ended = cluster.wait_for_pod_end("short")
        assert ended["status"]["phase"] == "Failed"
        assert ended["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 7
    finally:
        cluster.delete_pod("short")


def test_port_forward(kubectl: Kubectl) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_serve_digests, args=(server,), daemon=True).start()
        with kubectl.start("port-forward", "web", f":{server.getsockname()[1]}") as forward:
            port = int(forward.wait_for_line(r"Forwarding from 127\.0\.0\.1:(\d+) ->")[1])
            for size in (1, 5 * MEGABYTE, 0):
                data = os.urandom(size)
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    connection.sendall(data)
                    connection.shutdown(socket.SHUT_WR)
                    with connection.makefile("rb") as answer:
                        assert answer.read() == hashlib.sha256(data).digest()


def test_cp_both_ways(kubectl: Kubectl, tmp_path: Path) -> None:
    source, inside, back = tmp_path / "source", tmp_path / "inside", tmp_path / "back"
    source.write_bytes(os.urandom(30 * MEGABYTE))
    kubectl.run("cp", source, f"web:{inside}")
    assert _sha256(inside) == _sha256(source)
    kubectl.run("cp", f"web:{inside}", back)
    assert _sha256(back) == _sha256(source)


def test_delete_ends_the_processes(cluster: Cluster, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    cluster.add_pod("doomed", command=["sh", "-c", f"exec sleep infinity > {fifo}"])
    with fifo.open("rb") as reader:
        cluster.kubectl("delete", "pod", "doomed", "--timeout=20s")
        assert reader.read() == b""


def test_service_accounts_rbac_and_users(cluster: Cluster, tmp_path: Path) -> None:
    token = cluster.service_account_token("agents", "agent")
    as_agent = cluster.kubectl_for(kubeconfig=cluster.write_kubeconfig(tmp_path / "agent", token=token))
    assert "system:serviceaccount:agents:agent" in as_agent.run("auth", "whoami").stdout
    assert "forbidden" in as_agent.run("get", "pods", check=False).stderr
    cluster.grant("view", service_account=("agents", "agent"), namespace="default")
    assert "web" in as_agent.run("get", "pods").stdout

    kubeconfig = cluster.write_kubeconfig(tmp_path / "jane", user="jane", groups=["devs", "ops"])
    as_jane = cluster.kubectl_for(kubeconfig=kubeconfig)
    who = as_jane.run("auth", "whoami").stdout
    assert "jane" in who
    assert "devs ops system:authenticated" in who
    as_jane.run("get", "secrets", check=False)
    until(
        lambda: any(
            event["user"]["username"] == "jane" and event["responseStatus"]["code"] == 403
            for event in cluster.audit_events()
            if event.get("objectRef", {}).get("resource") == "secrets"
        ),
        "the API server has recorded the refusal",
    )


def test_everything_ends_when_the_owner_is_killed(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    short = tmp_path_factory.mktemp("x")  # what it leaves behind should go with the test
    with ManagedProcess(
        [sys.executable, "-m", "tests.support.cluster", "--pod", "web"],
        log_dir=tmp_path,
        cwd=Path(__file__).parents[2],
        env={"TMPDIR": str(short)},
    ) as owner:
        owner.wait_for_line("^export KUBECONFIG=", timeout=60)
        children = _children(owner.pid)
        names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in children}
        assert names >= {"kube-apiserver", "node"}, names
        containers = [child for pid in children for child in _children(pid)]
        assert containers
        waits = [os.pidfd_open(pid) for pid in children + containers]
        owner.kill()
        for wait in waits:
            _wait_for_end(wait)


def test_a_failed_start_shows_why(cluster: Cluster, tmp_path: Path) -> None:
    # Also in a directory whose name is longer than the address of a Unix socket may be.
    with pytest.raises(AssertionError, match="unknown flag: --no-such-flag"):
        Cluster(directory=tmp_path / ("x" * 100), extra_args=["--no-such-flag"])


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.support import cluster as module

    (tmp_path / "kubectl").touch()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    with pytest.raises(Unavailable, match="lacks kube-apiserver, etcd"):
        module.binaries.__wrapped__()
    monkeypatch.delenv("KUBEBUILDER_ASSETS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"install Go 1\.26 or later, or set KUBEBUILDER_ASSETS"):
        module.binaries.__wrapped__()


def test_nothing_listens_beyond_loopback(cluster: Cluster) -> None:
    inodes = {
        os.readlink(fd)[8:-1]
        for process in cluster.processes
        for fd in Path(f"/proc/{process.pid}/fd").iterdir()
        if os.readlink(fd).startswith("socket:[")
    }
    listening = [
        fields[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if (fields := line.split())[3] == "0A" and fields[9] in inodes
    ]
    assert listening
    assert all(address.startswith("0100007F:") for address in listening), listening


def _serve_digests(server: socket.socket) -> None:
    """Answer each connection with the digest of what it sent, once it has sent everything."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return  # the test is over
        with connection, connection.makefile("rb") as received:
            digest = hashlib.sha256(received.read()).digest()
            connection.sendall(digest)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


def _wait_for_end(pidfd: int) -> None:
    ready, _, _ = select.select([pidfd], [], [], 20)
    os.close(pidfd)
    assert ready, "still running"

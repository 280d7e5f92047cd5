"""The paths of the budget: an open, an echo, a GET, an exec and a join, each one operation after the other.

The roles are those that people run: processes with settings files, an issuer, policy, audit and resumption; the API
server is the tests' real one. `settle` waits until all of them sleep, so that what an operation leaves to be done
counts as its own, and no two operations meet.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from arcbridge.agent.kube.warm_connections import DELAY
from bench.budget.probe import environment
from bench.budget.system_calls import of_threads
from bench.load.generator import Generator
from bench.studies.kubernetes import _way_of_kubeconfig
from tests.support.cluster import Cluster
from tests.support.processes import ManagedProcess
from tests.support.world import ALICE, HEAVY_USERS, ApiServer, World

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE, POD = "budget", "shell"
TARGET = "budget"
GET = "/api/v1/namespaces/default"
OUTPUT = b"said in the pod"
EXEC = (
    f"GET /api/v1/namespaces/{NAMESPACE}/pods/{POD}/exec?command=echo&command=said+in+the+pod&stdout=true HTTP/1.1\r\n"
    "Host: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
).encode()
TIMEOUT = 30.0
"""Seconds for one step of an operation, and for all roles to sleep."""
PAUSE = 0.025
"""Seconds between two operations, more than a round trip: what is sent after one begins a new count of the path."""
AFTER_EXEC = DELAY + 2 * PAUSE
"""The same where the agent then makes a connection for the next one, which belongs to this one's cost."""
LOOKS = 3
"""Looks at the processes, one after the other, in each of which all threads have to sleep."""


class Broken(Exception):
    """An operation did not end as it must."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One path."""

    name: str
    run: Callable[[], None]
    times: int
    """How many make a count."""
    pids: Mapping[str, int]
    """The process of each role."""
    target: int
    """The process behind the agent's TCP target."""
    pause: float = PAUSE

    def settle(self) -> None:
        """Wait until nothing of the path has anything to do but to wait for a socket or for the time."""
        processes = (*self.pids.values(), self.target)
        time.sleep(self.pause)
        deadline, looks = time.monotonic() + TIMEOUT, 0
        while looks < LOOKS:
            looks = looks + 1 if all(map(_asleep, processes)) else 0
            if time.monotonic() > deadline:
                raise Broken(f"{self.name}: a role did not come to rest within {TIMEOUT:.0f} s")
            time.sleep(0.0005)  # between two looks: what the kernel carries meanwhile wakes a role


@contextmanager
def one_at_a_time(eager: Collection[int], patient: Collection[int]) -> Iterator[None]:
    """Run this thread and the `eager` processes on one core, each until it waits; the `patient` while all of those do.

    What one process writes in a turn of its loop is then read by the next one after that turn, whatever else the
    machine does. Without the right to real-time scheduling each still runs until it waits (SCHED_BATCH), unless the
    core has other work.
    """
    cores, policy = os.sched_getaffinity(0), os.sched_getscheduler(0)
    try:
        for pid in (0, *eager):
            _schedule(pid, {max(cores)})
        for pid in patient:
            _schedule(pid, {max(cores)}, policy)
        yield
    finally:
        for pid in (0, *eager, *patient):
            _schedule(pid, cores, policy)


@contextmanager
def operations(cluster: Cluster, api: ApiServer, directory: Path) -> Iterator[list[Operation]]:
    """Start the three roles, counted, and what calls them; all ends with the block.

    Raises ProcessFailed, NoCompiler.
    """
    directory.mkdir(mode=0o700)
    cluster.add_pod(POD, NAMESPACE)
    counted = ("env", *(f"{name}={value}" for name, value in environment(directory).items()))
    with ExitStack() as stack:
        target = stack.enter_context(Generator().target())
        world = stack.enter_context(World(api, directory=directory / "world"))
        world.targets[TARGET] = (str(target.address), ALICE.groups)
        world.agent_settings = HEAVY_USERS
        world.relay_prefixes[0] = world.agent_prefixes[0] = world.client_prefix = counted
        world.start()
        forward, port = world.start_forward(TARGET)
        kubectl = world.start_client(ALICE)
        joins = _joining(world, counted)

        def path(name: str, run: Callable[[], None], times: int, client: int, pause: float = PAUSE) -> Operation:
            pids = {"client": client, "relay": world.relay.pid, "agent": world.agent.pid}
            return Operation(name, run, times, pids, target.pid, pause)

        echoes = stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT))
        echoes.sendall(b"E")
        way = _way_of_kubeconfig(kubectl.kubeconfig, directory)
        trust = ssl.create_default_context(cafile=way.roots)
        trust.load_cert_chain(way.certificate, way.key)
        api_server = http.client.HTTPSConnection("127.0.0.1", kubectl.port, context=trust, timeout=TIMEOUT)
        stack.callback(api_server.close)
        eager = [target.pid, forward.pid, kubectl.process.pid, joins.pid, world.relay.pid, world.agent.pid]
        patient = {process.name: process.pid for process in cluster.processes}
        eager.append(patient.pop("kube-apiserver"))  # the node's output reaches it line by line
        stack.enter_context(one_at_a_time(eager, patient.values()))
        yield [
            path("echo", lambda: _echo(echoes), 24, forward.pid),
            path("open", lambda: _open(port), 24, forward.pid),
            path("get", lambda: _get(api_server), 24, kubectl.process.pid),
            path("exec", lambda: _exec(kubectl.port, trust), 16, kubectl.process.pid, AFTER_EXEC),
            path("join", lambda: _join(joins), 16, joins.pid),
        ]


def _echo(echoes: socket.socket) -> None:
    echoes.sendall(b"e" * 100)
    if echoes.recv(100, socket.MSG_WAITALL) != b"e" * 100:
        raise Broken("echo: other bytes came back")


def _open(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as opened:
        opened.sendall(b"O")
        if opened.recv(1) != b"o":
            raise Broken("open: another byte came back")


def _get(connection: http.client.HTTPSConnection) -> None:
    connection.request("GET", GET)
    answer = connection.getresponse()
    if answer.status != 200:
        raise Broken(f"get: {answer.status} {answer.read()!r}")
    answer.read()


def _exec(port: int, trust: ssl.SSLContext) -> None:
    """Run a command in the pod as kubectl does, on a new connection to the client's endpoint, over a WebSocket."""
    answer = b""
    with (
        socket.create_connection(("127.0.0.1", port), TIMEOUT) as plain,
        trust.wrap_socket(plain, server_hostname="127.0.0.1") as upgraded,
    ):
        upgraded.sendall(EXEC)
        while part := upgraded.recv(65536):
            answer += part
    if OUTPUT not in answer or b'"status":"Success"' not in answer:
        raise Broken(f"exec: {answer[-500:]!r}")


def _joining(world: World, counted: tuple[str, ...]) -> ManagedProcess:
    home = world.directory / "client-joins"
    argv = [*counted, sys.executable, "-m", "bench.budget.joins", *world.client_arguments(ALICE, home)]
    environment = world.client_env(home)
    process = ManagedProcess(argv, log_dir=world.logs, name="joins", env=environment, cwd=ROOT, stdin=True)
    world.processes.append(process)
    process.wait_for_line("ready")
    return process


def _join(joins: ManagedProcess) -> None:
    before = joins.mark()
    joins.send(".")
    joins.wait_for_line("ended", after=before)


def _schedule(pid: int, cores: Collection[int], policy: int | None = None) -> None:
    """Give each thread of a process, 0: this thread, its cores; without a policy it runs until it waits."""
    threads = [int(path.name) for path in Path(f"/proc/{pid}/task").glob("*")] if pid else [0]
    for thread in threads:
        try:
            os.sched_setaffinity(thread, cores)
            if policy is not None:
                os.sched_setscheduler(thread, policy, os.sched_param(0))
                continue
            try:
                os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))
            except PermissionError:
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
        except ProcessLookupError:
            pass  # the thread has just ended


def _asleep(pid: int) -> bool:
    """Return whether each thread of a process waits for something that has not come (proc_pid_stat(5), `S`)."""
    return all(stat.rpartition(")")[2].split()[0] == "S" for stat in of_threads(pid, "stat"))

"""kubectl through relays that are killed and upgraded: exec -it, port-forward, cp, logs -f, watch, a PUT under way."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_bad_days import Caller
from tests.support.cluster import KUBECTL_MINORS, Cluster, Kubectl
from tests.support.long import long_form
from tests.support.processes import ManagedProcess
from tests.support.reports import metrics, records, until, wait_for_record
from tests.support.stopping import Stopping
from tests.support.talk import Talk, TalkServer
from tests.support.world import ALICE, ApiServer, Client, World

NAMESPACE = "survival"
MIB = 1 << 20
COPIED = 1024 * MIB if long_form() else 64 * MIB
RELAYS = 3
LOST = "connection lost, waiting to resume"
BACK = "session resumed"


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Three relays and an agent of this module's own."""
    with World(api, directory=tmp_path_factory.mktemp("survival"), relays=RELAYS) as world:
        yield world.start()


@pytest.fixture(scope="module")
def alice(world: World) -> Iterator[Client]:
    """The client that lives through all of it."""
    client = world.start_client(ALICE)
    yield client
    client.process.stop()


@pytest.fixture
def kubectl(cluster: Cluster, alice: Client, world: World) -> Kubectl:
    for index in range(RELAYS):
        if not world.relays[index].running:
            world.start_relay(index)
    until(lambda: connected(world) >= 2, "the agent is connected to two relays", timeout=60)
    return cluster.kubectl_for(KUBECTL_MINORS[0], alice.kubeconfig)


def connected(world: World) -> int:
    """Return the relays that have the agent."""
    running = [index for index, relay in enumerate(world.relays) if relay.running]
    return sum(metrics(world.relay_observes[index])["arcbridge_relay_agents"] > 0 for index in running)


def pumping(world: World) -> list[int]:
    """The relays through which sessions pass."""
    running = [index for index, relay in enumerate(world.relays) if relay.running]
    return [index for index in running if metrics(world.relay_observes[index])["arcbridge_relay_pumps_open"]]


class Ticks:
    """A program that counts and is read by kubectl: each number must come once, in order."""

    SCRIPT = 'i=0; while [ ! -e "$STOP" ]; do echo tick-$i; i=$((i+1)); sleep 0.05; done; echo the-end-$i'

    def __init__(self, process: ManagedProcess) -> None:
        self.process = process

    def wait_moves(self) -> None:
        """Wait until more numbers came."""
        mark = self.process.mark()
        self.process.wait_for_line(r"tick-\d+", after=mark, timeout=60)
        until(lambda: self.process.mark().lines > mark.lines + 10, f"{self.process.name} goes on", timeout=60)

    def check(self) -> None:
        """Require that the program ended in order, and that every number came."""
        total = int(self.process.wait_for_line(r"the-end-(\d+)", timeout=60)[1])
        # A prompt may stand before the first, where a shell began later than its terminal was typed on.
        lines = re.findall(r"^(?:[#$] )?tick-(\d+)\r?$", self.process.output("stdout"), re.MULTILINE)
        found = [int(number) for number in lines]
        assert found == list(range(total))


class Everything(Stopping):
    """What people have open: a shell, a log that grows, a watch, a forwarded port, a copy each way."""

    def __init__(self, kubectl: Kubectl, cluster: Cluster, directory: Path, size: int) -> None:
        self._kubectl = kubectl
        self._stack = ExitStack()
        self._directory = directory
        self._stop_file = directory / "stop"
        self.pod = "pod-" + os.urandom(4).hex()
        self._server = self._stack.enter_context(TalkServer())
        port = int(self._server.address.rpartition(":")[2])
        cluster.add_pod(
            self.pod, NAMESPACE, command=("sh", "-c", Ticks.SCRIPT), env={"STOP": str(self._stop_file)}, ports=[port]
        )
        self._stack.callback(cluster.delete_pod, self.pod, NAMESPACE)
        self.logs = Ticks(self._start("logs", "-f", "-n", NAMESPACE, self.pod))
        self.shell = Ticks(self._start("exec", "-it", "-n", NAMESPACE, self.pod, "--", "sh", terminal=(24, 80)))
        self.shell.process.send(f"stty -echo; STOP={self._stop_file}; {Ticks.SCRIPT}\n")
        self.watch = self._start("get", "configmaps", "-n", NAMESPACE, "-w", "-o", "name")
        forward = self._start("port-forward", "-n", NAMESPACE, f"pod/{self.pod}", f":{port}")
        local = int(forward.wait_for_line(r"Forwarding from 127\.0\.0\.1:(\d+)", timeout=30)[1])
        self.talk = Talk(local, 1, pause=0.03)
        self._source = directory / "source"
        with self._source.open("wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
        self._copies: list[ManagedProcess] = []
        self._changes = 0

    def _start(self, *arguments: str, terminal: tuple[int, int] | None = None) -> ManagedProcess:
        process = self._kubectl.start(*arguments, terminal=terminal)
        self._stack.callback(process.stop)
        return process

    def copy(self) -> ManagedProcess:
        """Begin to copy into the pod; returns when bytes arrive there."""
        remote = self._directory / f"copy-{len(self._copies)}"
        process = self._start("cp", "-n", NAMESPACE, str(self._source), f"{self.pod}:{remote}")
        self._copies.append(process)
        until(lambda: remote.exists() and remote.stat().st_size > 0, "the copy begins", timeout=60)
        return process

    def wait_moves(self) -> None:
        """Require that all of them go on, and that the watch reports a new event."""
        self.logs.wait_moves()
        self.shell.wait_moves()
        self.talk.wait_moves(50_000)
        self._changes += 1
        name = f"{self.pod}-{self._changes}"
        self._kubectl.run("create", "configmap", name, "-n", NAMESPACE)
        self.watch.wait_for_line(f"configmap/{name}$", timeout=60)

    def check(self) -> None:
        """Require that all of them end in order, with nothing missing, doubled or altered."""
        wanted = digest(self._source)
        for index, process in enumerate(self._copies):
            assert process.wait(90) == 0
            assert digest(self._directory / f"copy-{index}") == wanted
        # The first copy is copied back out of the pod.
        if self._copies:
            back = self._directory / "back"
            self._kubectl.run("cp", "-n", NAMESPACE, f"{self.pod}:{self._directory / 'copy-0'}", str(back), timeout=100)
            assert digest(back) == wanted
        self._stop_file.touch()
        self.logs.check()
        self.shell.check()
        self._server.check(self.talk)
        assert self.watch.running
        names = [line for line in self.watch.output("stdout").splitlines() if self.pod in line]
        assert names == [f"configmap/{self.pod}-{n + 1}" for n in range(self._changes)]

    def stop(self) -> None:
        self.talk.close()
        self._stack.close()


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture
def size() -> int:
    return 16 * MIB


@pytest.fixture
def everything(kubectl: Kubectl, cluster: Cluster, tmp_path: Path, size: int) -> Iterator[Everything]:
    with Everything(kubectl, cluster, tmp_path, size) as found:
        found.wait_moves()
        yield found


def test_a_killed_relay(world: World, alice: Client, everything: Everything) -> None:
    for _ in range(2):
        (relay,) = pumping(world)
        mark = alice.process.mark()
        everything.copy()
        world.kill_relay(relay)
        everything.wait_moves()
        wait_for_record(alice.process, BACK, after=mark, timeout=60)
        assert records(alice.process, LOST, after=mark)
        world.start_relay(relay)
        until(lambda: connected(world) >= 2, "the agent is connected to two relays", timeout=60)
    everything.check()


class Put:
    """A PUT whose body is on its way for as long as the test likes."""

    def __init__(self, client: Client, path: str, document: object) -> None:
        self._body = json.dumps(document).encode()
        caller = Caller(client)
        self._connection = http.client.HTTPSConnection(caller.server, context=caller.context, timeout=90)
        self._connection.putrequest("PUT", path)
        self._connection.putheader("Content-Type", "application/json")
        self._connection.putheader("Content-Length", str(len(self._body)))
        self._connection.endheaders()
        self._sent = 0

    def send(self, share: float) -> None:
        """Send the body up to this share of it."""
        upto = int(len(self._body) * share)
        self._connection.send(self._body[self._sent : upto])
        self._sent = upto

    def answer(self) -> tuple[int, Any]:
        response = self._connection.getresponse()
        try:
            return response.status, json.loads(response.read())
        finally:
            self._connection.close()


def test_a_put_under_way_reaches_the_api_server_once(
    world: World, alice: Client, kubectl: Kubectl, cluster: Cluster
) -> None:
    cluster.ensure_namespace(NAMESPACE)
    name = "put-" + os.urandom(4).hex()
    collection = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
    made = cluster.request("POST", collection, {"metadata": {"name": name}, "data": {}})
    text = os.urandom(400_000).hex()
    put = Put(alice, f"{collection}/{name}", {**made, "data": {"text": text}})
    put.send(0.3)
    for share in (0.5, 0.8):
        (relay,) = until(lambda: pumping(world), "a session")
        world.kill_relay(relay)
        put.send(share)
        until(lambda: pumping(world), "resumed", timeout=60)
        world.start_relay(relay)
        until(lambda: connected(world) >= 2, "the agent is connected to two relays", timeout=60)
    put.send(1)
    (relay,) = until(lambda: pumping(world), "a session")
    world.kill_relay(relay)  # the answer is on its way, or the last bytes are
    status, document = put.answer()
    assert status == 200
    assert document["data"]["text"] == text
    now = cluster.request("GET", f"{collection}/{name}")
    assert now["data"]["text"] == text
    assert now["metadata"]["resourceVersion"] == document["metadata"]["resourceVersion"]

    def ours() -> list[dict[str, object]]:
        return [one for one in world.audit_records() if one.get("name") == name and one.get("verb") == "update"]

    until(ours, "it is audited")
    assert len(ours()) == 1

    def events() -> set[str]:
        return {
            event["auditID"]
            for event in cluster.audit_events()
            if event.get("objectRef", {}).get("name") == name and event["verb"] == "update"
        }

    assert len(until(events, "the API server has recorded it")) == 1


class Loop:
    """`kubectl get` again and again, `pause` seconds apart, in a process of its own each; every failure is kept."""

    def __init__(self, kubectl: Kubectl, pause: float = 0.0) -> None:
        self._kubectl, self._pause = kubectl, pause
        self._stopping = threading.Event()
        self.done = 0
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True, name="get loop")
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(self._pause):
            try:
                answer = self._kubectl.run("get", "namespace", "default", "-o", "name", check=False, timeout=60)
            except AssertionError as error:
                self.failures.append(str(error))
                continue
            self.done += 1
            if answer.returncode or answer.stdout != "namespace/default\n":
                self.failures.append(f"{answer.returncode}: {answer.stdout} {answer.stderr}")

    def wait_moves(self, more: int = 3) -> None:
        start = self.done
        until(lambda: self.done >= start + more, "get answers", timeout=60)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(70)
        assert not self._thread.is_alive()


@pytest.mark.timeout(900 if long_form() else 300)  # half a minute on a quiet machine
@pytest.mark.parametrize("size", [COPIED])
def test_a_rolling_upgrade_of_three_relays(
    world: World, alice: Client, kubectl: Kubectl, everything: Everything, size: int
) -> None:
    loop = Loop(kubectl)
    mark = alice.process.mark()
    try:
        for index in range(RELAYS):
            loop.wait_moves()
            everything.copy()
            status, seconds = world.stop_relay(index)
            assert status == 0
            assert seconds < 30
            loop.wait_moves()
            world.start_relay(index)
            until(lambda: connected(world) >= 2, "the agent is connected to two relays", timeout=60)
        everything.wait_moves()
        loop.wait_moves()
    finally:
        loop.stop()
    assert loop.failures == []
    everything.check()
    # No session was cut off: the clients of a relay that went away had left it before.
    assert not records(alice.process, LOST, after=mark)

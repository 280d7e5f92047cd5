"""A user who takes nothing of what he asks for, with real processes: the agent stays small, and others are served.

The hostile side speaks the real protocol through the real modules, and lies about one thing: it grants no credit.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arcbridge.mux.session import MuxSession
from arcbridge.relay.data_dir import open_authority
from arcbridge.wire.frames import FIRST_CREDIT
from arcbridge.wire.limits import Limits
from bench.hostile.attacks import HEAD, HEADS, PODS, privileged_pod
from bench.hostile.place import Answer, Person, Place, request
from bench.studies.kubernetes import _way_of_kubeconfig
from bench.usage import resident_bytes
from tests.support.cluster import KUBECTL_MINORS, Cluster
from tests.support.reports import metrics, until
from tests.support.world import ALICE, CLUSTER_AUDIENCE, RELAY_AUDIENCE, ApiServer, User, World

MOST_MEMORY = 200 * 1024**2
"""Bytes of the agent's resident memory that no single user may make it reach; its pod has 640 MiB."""
MALLORY = User("hostile", ALICE.groups)
TAKES_NOTHING = Limits(stream_window=FIRST_CREDIT, max_stream_window=FIRST_CREDIT, churn_burst=10**9)


class Fountain:
    """A TCP server that sends as much as is taken."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        drop, block = threading.Event(), bytes(65536)
        while not drop.is_set():
            try:
                self._listener.settimeout(0.01)
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                self._sockets.append(sock)
            except TimeoutError:
                pass
            except OSError:
                return
            for sock in list(self._sockets):
                try:
                    while sock.send(block):
                        pass
                except BlockingIOError:
                    pass
                except OSError:
                    self._sockets.remove(sock)

    def close(self) -> None:
        self._listener.close()
        self._thread.join(5)
        for sock in self._sockets:
            sock.close()


def stone() -> socket.socket:
    """A TCP server that reads nothing, and for which the kernel keeps little."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    listener.listen(4096)
    return listener


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An organisation of this module's own, whose agent has little memory for what waits."""
    with (
        contextlib.closing(Fountain()) as fountain,
        stone() as unread,
        World(api, directory=tmp_path_factory.mktemp("hostile")) as world,
    ):
        world.agent_settings = "limits.agent_waiting_bytes = 25165824"
        world.targets["stone"] = (f"127.0.0.1:{unread.getsockname()[1]}", ALICE.groups)
        world.targets["fountain"] = (fountain.address, ALICE.groups)
        yield world.start()


def place(world: World) -> Place:
    person = Person(MALLORY.name, world.token(MALLORY, RELAY_AUDIENCE), world.token(MALLORY, CLUSTER_AUDIENCE))
    relay_ca = open_authority(world.relay_config.parent / "data").certificate_pem
    return Place(relay_port=world.relay_port, relay_ca=relay_ca, cluster=world.cluster, people=(person,))


def memory(world: World) -> int:
    """The agent's resident memory, bytes."""
    status = Path(f"/proc/{world.agent.pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])


def counters(world: World) -> dict[str, float]:
    found = metrics(world.agent_observe)
    return {name.removeprefix("arcbridge_agent_"): value for name, value in found.items()}


async def reached(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition of the agent's holds; it is asked in a thread, so that the session goes on meanwhile."""
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.1)


def attack(world: World, target: str, count: int, meanwhile: Callable[[MuxSession], Callable[[], bool]]) -> int:
    """Ask for `count` answers on one session and take none, until the condition holds; the agent's largest memory."""
    largest = 0

    async def run() -> None:
        nonlocal largest
        session = await place(world).establish(place(world).people[0], limits=TAKES_NOTHING)
        payload = request("/openapi/v2") if target == "kubernetes" else b"x"
        for _ in range(count):
            session.open(target, Answer(payload, stalled=True))
            await asyncio.sleep(0)
        done = meanwhile(session)

        def looked() -> bool:
            nonlocal largest
            largest = max(largest, memory(world))
            return done()

        try:
            await reached(looked, 60)
            assert not session.closed
        finally:
            session.close()
            await session.wait_ended()

    asyncio.run(run())
    return largest


def test_answers_of_the_api_server_that_are_not_read(world: World, cluster: Cluster) -> None:
    """671 times `/openapi/v2`: it took the agent from 57 to 671 MiB."""
    alice = world.start_client(ALICE)
    kubectl = cluster.kubectl_for(KUBECTL_MINORS[0], alice.kubeconfig)
    calls = 0

    def meanwhile(session: MuxSession) -> Callable[[], bool]:
        def done() -> bool:
            nonlocal calls
            kubectl.run("get", "namespaces")  # raises unless it succeeds
            calls += 1
            now = counters(world)
            assert now["apiserver_connections"] <= 100
            return calls >= 5 and now['limit_refusals_total{limit="apiserver_seats"}'] > 0

        return done

    try:
        assert attack(world, "kubernetes", 671, meanwhile) < MOST_MEMORY
    finally:
        alice.process.stop()


STREAMED = "/api/v1/namespaces/streamed/configmaps"
OBJECTS, OBJECT = 12, 850_000
STREAM = "?watch=true&sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan"
READERS = 8
MOST_HELD = 24 * 1024**2
"""Bytes that agent and client may hold each of the 80 MB that these readers asked for."""


def test_m9_streamed_lists_that_are_not_read(world: World, cluster: Cluster, tmp_path: Path) -> None:
    """Lists as watches send them (client-go's default): of eight of 10 MB agent and client hold little while their
    readers take nothing, and each is whole once its reader reads on."""
    cluster.ensure_namespace("streamed")
    for number in range(OBJECTS):
        text = {"metadata": {"name": f"of-{number}"}, "data": {"text": f"{number}" * (OBJECT // len(f"{number}"))}}
        cluster.request("POST", STREAMED, text)
    alice = world.start_client(ALICE)
    way = _way_of_kubeconfig(alice.kubeconfig, tmp_path)
    trust = ssl.create_default_context(cafile=way.roots)
    trust.load_cert_chain(way.certificate, way.key)
    looks: list[tuple[int, int, int]] = []

    def held() -> tuple[int, int, int]:
        return int(counters(world)["waiting_bytes"]), memory(world), resident_bytes([alice.process.pid])

    def settled() -> bool:
        looks.append(held())
        last = [waiting for waiting, _, _ in looks[-10:]]
        return len(last) == 10 and min(last) > 0 and max(last) - min(last) < 65536

    with contextlib.ExitStack() as stack:
        stack.callback(alice.process.stop)
        stack.callback(cluster.request, "DELETE", STREAMED)
        before = held()
        readers = []
        for _ in range(READERS):
            plain = stack.enter_context(socket.socket())
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plain.settimeout(60)
            plain.connect(("127.0.0.1", alice.port))
            reader = http.client.HTTPSConnection("127.0.0.1")
            reader.sock = stack.enter_context(trust.wrap_socket(plain, server_hostname="127.0.0.1"))
            reader.request("GET", STREAMED + STREAM)
            readers.append(reader)
        until(settled, "nothing more is taken of the lists", timeout=60)
        most = [max(look[place] for look in looks) - was for place, was in enumerate(before)]
        assert max(most) < MOST_HELD, f"bytes that wait, and that agent and client grew by: {most}"
        assert sum(most[1:]) < READERS * OBJECTS * OBJECT // 2
        for reader in readers:
            answer, sizes = reader.getresponse(), {}
            for event in map(json.loads, iter(answer.readline, b"")):
                about = event["object"]["metadata"]
                if event["type"] == "BOOKMARK":
                    assert about["annotations"]["k8s.io/initial-events-end"] == "true"
                    break
                sizes[about["name"]] = len(event["object"]["data"]["text"])
            assert sizes == {f"of-{number}": OBJECT // len(f"{number}") * len(f"{number}") for number in range(OBJECTS)}


def beside(world: World, cluster: Cluster, payload: bytes, count: int) -> int:
    """Send `payload` on `count` streams of one session; the agent's largest memory from then until another user was
    served three times and the streams are over."""
    alice = world.start_client(ALICE)
    kubectl = cluster.kubectl_for(KUBECTL_MINORS[0], alice.kubeconfig)
    kubectl.run("get", "namespaces")  # the first call asks for much more

    async def run() -> int:
        largest, over = 0, asyncio.Event()

        async def watch() -> None:
            nonlocal largest
            while not over.is_set():
                largest = max(largest, await asyncio.to_thread(memory, world))
                await asyncio.sleep(0.02)

        session = await place(world).establish(place(world).people[0])
        watching = asyncio.create_task(watch())
        try:
            answers = [Answer(payload) for _ in range(count)]
            for answer in answers:
                session.open("kubernetes", answer)
                await asyncio.sleep(0)
            for _ in range(3):
                await asyncio.to_thread(kubectl.run, "get", "namespaces")
            async with asyncio.timeout(60):
                await asyncio.gather(*(answer.word for answer in answers))
            assert not session.closed
        finally:
            over.set()
            await watching
            session.close()
            await session.wait_ended()
        return largest

    try:
        return asyncio.run(run())
    finally:
        alice.process.stop()


def test_h22_request_heads_that_do_not_end(world: World, cluster: Cluster) -> None:
    """300 of a megabyte took the agent from 92 to 1010 MiB."""
    assert beside(world, cluster, HEAD, HEADS) < MOST_MEMORY


def test_h21_a_pod_of_one_name_and_many_capabilities(world: World, cluster: Cluster) -> None:
    """One body of 128 KiB took the agent to 1116 MiB."""
    body = privileged_pod()
    head = request(PODS, f"Content-Length: {len(body)}", "Content-Type: application/json").replace(b"GET", b"POST", 1)
    assert beside(world, cluster, head + body, 4) < MOST_MEMORY


def test_streams_of_a_target_that_are_not_read(world: World) -> None:
    """Above what may wait for all, the streams that have been stalled longest are reset; a session goes on."""
    most = 0.0

    def meanwhile(session: MuxSession) -> Callable[[], bool]:
        def done() -> bool:
            nonlocal most
            now = counters(world)
            most = max(most, now["waiting_bytes"])
            return now["stalled_streams_reset_total"] >= 10

        return done

    assert attack(world, "tcp:fountain", 300, meanwhile) < MOST_MEMORY  # a session may have more than the agent here
    assert 20 * 1024**2 < most < (24 + 16) * 1024**2, "the bound, and two portions for each stream"
    asyncio.run(reached_soon(world))


async def reached_soon(world: World) -> None:
    """Nothing waits any more once the session is gone."""
    await reached(lambda: counters(world)["waiting_bytes"] == 0, 20)


def test_m20_what_is_sent_ahead_of_a_target_that_reads_nothing(world: World) -> None:
    """Twelve sessions of one user, 1536 streams: what they sent ahead took the agent to 264 MiB."""
    largest = 0

    async def run() -> None:
        nonlocal largest
        sessions = [await place(world).establish(place(world).people[0], limits=TAKES_NOTHING) for _ in range(12)]
        answers = []
        for _ in range(128):
            for session in sessions:
                answers.append(Answer(bytes(256 * 1024)))
                session.open("tcp:stone", answers[-1])
                await asyncio.sleep(0)

        def looked() -> bool:
            nonlocal largest
            largest = max(largest, memory(world))
            left = sum(one.stream.get_write_buffer_size() for one in answers if one.stream is not None)
            return not left or counters(world)["unread_streams_reset_total"] >= 10

        try:
            await reached(looked, 60)
            assert not any(session.closed for session in sessions)
        finally:
            for session in sessions:
                session.close()
                await session.wait_ended()

    asyncio.run(run())
    assert largest < MOST_MEMORY
    asyncio.run(reached(lambda: counters(world)["ahead_bytes"] == 0, 20))

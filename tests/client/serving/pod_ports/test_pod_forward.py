"""Local ports that follow pods: which pod, what waits, what is cut, and what all of it may take."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.serving.pod_ports import pod_forward, tunnel
from arcbridge.client.serving.pod_ports.pod_forward import PodForward
from arcbridge.client.serving.pod_ports.target import parse_targets
from arcbridge.errors import ArcbridgeError, PermissionRefused
from arcbridge.net.backoff import Backoff
from arcbridge.tasks import cancel_and_wait
from tests.client.echo_stream import Lines
from tests.client.far_side import FarSide
from tests.client.serving.pod_ports.api import Api, Connection, ready
from tests.client.session.test_session_manager import make, running
from tests.support.eventually import until

Open = Callable[..., Awaitable["Opened"]]


class Opened:
    """A forward that serves."""

    def __init__(self, forward: PodForward, said: list[str]) -> None:
        self.forward = forward
        self.said = said

    @property
    def ports(self) -> list[int]:
        return [int(found[1]) for line in self.said if (found := re.search(r"Forwarding \S+:(\d+) ", line))]

    async def connect(self, port: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", port or self.ports[0])

    async def greeting(self) -> bytes:
        """Return the name of the pod that a new connection reaches."""
        async with asyncio.timeout(20):
            reader, writer = await self.connect()
            line = await reader.readline()
            writer.close()
            return line.strip()


@pytest.fixture
def api(far: FarSide) -> Api:
    made = Api()
    far.protocol = made.protocol
    return made


@pytest.fixture
async def opened(far: FarSide, api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Open]:
    monkeypatch.setattr(pod_forward, "GRACE", 0.0)
    monkeypatch.setattr(pod_forward, "RETRY", 0.01)
    monkeypatch.setattr(pod_forward, "RETRY_CAP", 0.02)
    tasks: list[asyncio.Task[None]] = []
    forwards: list[PodForward] = []
    async with running(make(far, tmp_path)) as session:

        async def start(*words: str, addresses: tuple[str, ...] = ("localhost",)) -> Opened:
            said: list[str] = []
            forward = PodForward(session, parse_targets(words or ("svc/web", ":80"), "shop")[0], said.append)
            forwards.append(forward)
            tasks.append(asyncio.create_task(forward.run()))
            async with asyncio.timeout(20):
                await forward.open(addresses)
            return Opened(forward, said)

        yield start
        for forward in forwards:
            await forward.close()
        await cancel_and_wait(*tasks)


async def is_cut(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(20):
            await reader.read()
        return False
    except ConnectionResetError:
        return True


async def test_bytes_and_ends_of_both_directions(opened: Open, api: Api) -> None:
    api.put("pods", ready("web-1"))
    here = await opened()
    reader, writer = await here.connect()
    blob = os.urandom(3_000_000)
    writer.write(blob)
    writer.write_eof()
    async with asyncio.timeout(30):
        assert await reader.read(-1) == b"web-1\n" + blob
    writer.close()
    await until(lambda: not here.forward.stats.open)
    stats = here.forward.stats
    assert (stats.accepted, stats.failed, stats.bytes_to_cluster, stats.bytes_from_cluster) == (
        *(1, 0),
        *(len(blob), len(blob) + 6),
    )
    assert "POST /api/v1/namespaces/shop/pods/web-1/portforward" in api.requests
    assert here.said[1:] == ["svc/web: new connections go to pod web-1"]


async def test_it_stays_with_a_pod_and_then_takes_the_newest(opened: Open, api: Api) -> None:
    api.put("pods", ready("web-1"))
    here = await opened()
    api.put("pods", ready("web-3"))
    api.put("pods", ready("web-2"))
    await until(lambda: len(here.forward._watch.pods) == 3)
    assert await here.greeting() == b"web-1"
    kept, kept_writer = await here.connect()
    assert await kept.readline() == b"web-1\n"
    api.put("pods", ready("web-1", ending=True))
    await until(lambda: "web-3" in here.said[-1])
    assert await here.greeting() == b"web-3"
    kept_writer.write(b"still\n")  # a pod that is being ended finishes what it has begun
    assert await kept.readline() == b"still\n"
    kept_writer.close()


@pytest.mark.parametrize("how", ["deleted", "ended", "replaced"])
async def test_what_is_open_to_a_pod_that_is_gone_is_cut(opened: Open, api: Api, lines: Lines, how: str) -> None:
    api.put("pods", ready("web-1"))
    here = await opened()
    reader, writer = await here.connect()
    assert await reader.readline() == b"web-1\n"
    api.put("pods", ready("web-2"))
    if how == "deleted":
        api.remove("pods", "web-1")
    elif how == "ended":
        api.put("pods", ready("web-1", phase="Failed"))
    else:
        other = ready("web-1")
        other["metadata"]["uid"] = "another"
        api.put("pods", other)
    assert await is_cut(reader)
    writer.close()
    assert [line["reason"] for line in lines if line["event"] == "connection cut"] == [
        "pod web-1 is gone; the next connection goes to another one"
    ]
    assert here.forward.stats.failed == 1
    assert await here.greeting() == b"web-2"


async def test_what_comes_while_no_pod_may_serve_waits(opened: Open, api: Api) -> None:
    here = await opened()
    assert here.said[-1] == "svc/web has no pods; connections wait"
    waiting = asyncio.create_task(here.greeting())
    api.put("pods", ready("web-1", conditions=[]))
    await until(lambda: here.said[-1] == "svc/web has 1 pod, and none is ready; connections wait")
    assert not waiting.done()
    api.put("pods", ready("web-1"))
    assert await waiting == b"web-1"


async def test_d6_few_connections_wait_and_not_for_ever(
    opened: Open, api: Api, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_forward, "MAX_WAITING", 3)
    monkeypatch.setattr(pod_forward, "WAIT", 0.5)
    here = await opened()

    async def comes() -> bool:
        try:
            reader, writer = await here.connect()
        except ConnectionResetError:
            return True
        cut = await is_cut(reader)
        writer.close()
        return cut

    assert all(await asyncio.gather(*(comes() for _ in range(5))))
    reasons = sorted(line["reason"] for line in lines if "reason" in line)
    assert reasons == ["3 others wait for a pod"] * 2 + ["svc/web has no pods"] * 3
    await until(lambda: not here.forward.stats.open)


async def test_the_next_pod_is_tried_where_one_cannot_be_reached(opened: Open, api: Api) -> None:
    """Its deletion may be known to the API server and not here yet."""
    api.put("pods", ready("web-1"))
    here = await opened()
    gone = api.objects.pop("pods/web-1")
    greeting = asyncio.create_task(here.greeting())
    await until(lambda: sum("portforward" in one for one in api.requests) > 1)
    api.objects["pods/web-1"] = gone
    api.put("pods", ready("web-2"))
    api.remove("pods", "web-1")
    assert await greeting == b"web-2"


async def test_a_pod_that_does_not_listen_yet_gets_all_of_it_later(opened: Open, api: Api) -> None:
    tries: list[Connection] = []

    def starts(connection: Connection) -> None:
        tries.append(connection)
        if len(tries) < 3:
            connection.fail(b"error forwarding port 80: dial tcp4 127.0.0.1:80: connect: connection refused")
        else:
            api.behaviour.clear()

    api.put("pods", ready("web-1"))
    api.behaviour["web-1"] = starts
    here = await opened()
    reader, writer = await here.connect()
    writer.write(b"GET /")
    async with asyncio.timeout(20):
        assert await reader.readexactly(5) == b"GET /"
        writer.write(b"!")
        assert await reader.readexactly(1) == b"!"
    writer.close()
    assert len(tries) == 3
    assert tries[-1].received == b"GET /!"


async def test_tries_become_rare_and_another_pod_is_tried_at_once(
    opened: Open, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_forward, "Backoff", lambda *, first, cap: Backoff(first=first, cap=cap, random=lambda: 1.0))
    monkeypatch.setattr(pod_forward, "RETRY_CAP", 60.0)
    api.put("pods", ready("web-1"))
    here = await opened()
    gone = api.objects.pop("pods/web-1")
    greeting = asyncio.create_task(here.greeting())
    await asyncio.sleep(1)
    assert 3 <= sum("portforward" in one for one in api.requests) <= 7  # after 0.01, 0.02, 0.04 … seconds
    api.objects["pods/web-1"] = gone
    api.put("pods", ready("web-2"))
    api.remove("pods", "web-1")
    assert await asyncio.wait_for(greeting, 5) == b"web-2"


async def test_a_pod_of_the_same_name_may_start_as_well(
    opened: Open, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_forward, "STARTING", 1.0)
    monkeypatch.setattr(pod_forward, "SETTLING", 0.0)
    api.put("pods", ready("web-1"))
    here = await opened()
    await asyncio.sleep(1.1)
    refusals = iter(range(3))

    def starts(connection: Connection) -> None:
        if next(refusals, None) is None:
            connection.send(b"another\n")
        else:
            connection.fail(b"connect: connection refused")

    api.behaviour["web-1"] = starts
    other = ready("web-1")
    other["metadata"]["uid"] = "another"
    api.put("pods", other)
    await until(lambda: here.forward._watch.pods["web-1"].uid == "another")
    assert await here.greeting() == b"another"


async def test_a_connection_that_found_another_pod_outlives_the_first(
    opened: Open, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_forward, "GRACE", 0.3)
    held: list[Connection] = []
    api.put("pods", ready("web-1"))
    api.behaviour["web-1"] = held.append
    here = await opened()
    reader, writer = await here.connect()
    await until(lambda: held)
    api.put("pods", ready("web-2"))
    api.remove("pods", "web-1")
    await until(lambda: "web-2" in here.said[-1])
    held[0].fail(b"dial tcp4 127.0.0.1:80: connect: connection refused")
    assert await asyncio.wait_for(reader.readline(), 20) == b"web-2\n"
    await asyncio.sleep(0.5)  # longer than the grace of the first pod
    writer.write(b"still\n")
    assert await asyncio.wait_for(reader.readline(), 20) == b"still\n"
    writer.close()


@pytest.mark.parametrize(
    "text", [b"error forwarding port 80: connection refused", b"error forwarding port 80: read: connection reset"]
)
async def test_an_error_of_the_pod_is_a_reset_with_its_words(
    opened: Open, api: Api, lines: Lines, text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_forward, "STARTING", 0.0)
    monkeypatch.setattr(pod_forward, "SETTLING", 0.0)
    api.put("pods", ready("web-1"))
    api.behaviour["web-1"] = lambda connection: connection.fail(text)
    here = await opened()
    reader, writer = await here.connect()
    assert await is_cut(reader)
    writer.close()
    assert [line["reason"] for line in lines if line["event"] == "connection cut"] == [text.decode()]


async def test_a_way_that_no_longer_answers_is_cut(
    opened: Open, api: Api, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "PING_INTERVAL", 0.2)

    def greets(connection: Connection) -> None:
        connection.send(b"hello\n")

    api.put("pods", ready("web-1"))
    api.behaviour["web-1"] = greets
    here = await opened()
    reader, writer = await here.connect()
    assert await reader.readline() == b"hello\n"
    (far,) = api.connections
    await asyncio.sleep(0.5)  # longer than the interval: what answers is left alone
    assert not far.lost
    far.answers_pings = False
    cut = asyncio.create_task(is_cut(reader))
    while not cut.done():
        assert await here.greeting() == b"hello"  # the session's own way is well
    assert await cut
    writer.close()
    assert "the pod's node does not answer" in str(lines)


async def test_what_is_sent_to_a_pod_that_has_ended_its_side_arrives_or_the_loss_is_said(
    opened: Open, api: Api, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "LINGER", 0.3)
    api.put("pods", ready("web-1"))
    api.behaviour["web-1"] = lambda connection: connection.send(b"bye\n", fin=True)
    here = await opened()
    reader, writer = await here.connect()
    assert await reader.read() == b"bye\n"
    (pod,) = api.connections
    for _ in range(8):  # longer than it lingers for a program that sends nothing
        writer.write(b"more")
        await asyncio.sleep(0.1)
    writer.write_eof()
    await until(lambda: pod.ended)
    assert pod.received == b"more" * 8
    await until(lambda: not here.forward.stats.open)
    assert here.forward.stats.failed == 0
    writer.close()
    reader, writer = await here.connect()
    assert await reader.readline() == b"bye\n"
    api.connections[1].stream.pause_reading()
    writer.write(bytes(32 << 20))
    await until(lambda: here.forward.stats.failed)
    assert "does not take what is still sent" in str(lines)
    writer.transport.abort()


@pytest.mark.parametrize("data", [b"more", b""])
async def test_a_program_that_has_reset_its_connection_is_lost(opened: Open, api: Api, data: bytes) -> None:
    """What asyncio writes to nowhere, and uvloop refuses with a RuntimeError."""
    api.put("pods", ready("web-1"))
    here = await opened()
    program = tunnel.Program(*await here.connect())
    program.writer.transport.abort()
    await asyncio.sleep(0.1)
    with pytest.raises(tunnel.LocalLost):
        await program.write(data)


async def test_a_network_that_is_silent_for_a_while_cuts_nothing(
    opened: Open, api: Api, far: FarSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing says that it is away; the session finds out by itself, later, or not at all."""
    monkeypatch.setattr(tunnel, "PING_INTERVAL", 0.1)
    api.put("pods", ready("web-1"))
    here = await opened()
    reader, writer = await here.connect()
    assert await reader.readline() == b"web-1\n"
    for resumed in (False, True):
        far.flows.clear()
        await asyncio.sleep(0.5)
        if resumed:
            far.cut()
        far.flows.set()
        writer.write(b"still\n")
        assert await asyncio.wait_for(reader.readline(), 20) == b"still\n"
    assert len(far.resumptions) == 1
    writer.close()


async def test_d6_a_program_that_does_not_read_stops_its_pod_alone(opened: Open, api: Api) -> None:
    sent = 0

    def floods(connection: Connection) -> None:
        async def flood() -> None:
            nonlocal sent
            while not connection.lost and sent < 64 << 20:
                if connection.stream.get_write_buffer_size() < 1 << 20:
                    connection.send(bytes(65536))
                    sent += 65536
                await asyncio.sleep(0)

        tasks.append(asyncio.create_task(flood()))

    tasks: list[asyncio.Task[None]] = []
    api.put("pods", ready("web-1"))
    here = await opened()
    reader, writer = await here.connect()
    assert await reader.readline() == b"web-1\n"
    api.behaviour["web-1"] = floods
    sock = socket.create_connection(("127.0.0.1", here.ports[0]))
    before, still = -1, 0
    while still < 50:  # until nothing moves any more
        await asyncio.sleep(0.01)
        still, before = (still + 1, before) if sent == before else (0, sent)
    assert sent < 40 << 20
    api.behaviour.clear()
    writer.write(b"others go on\n")
    assert await asyncio.wait_for(reader.readline(), 20) == b"others go on\n"
    sock.close()
    writer.close()
    await cancel_and_wait(*tasks)


async def test_many_connections_at_once(opened: Open, api: Api) -> None:
    api.put("pods", ready("web-1"))
    here = await opened()
    assert set(await asyncio.gather(*(here.greeting() for _ in range(100)))) == {b"web-1"}
    await until(lambda: not here.forward.stats.open and all(one.lost for one in api.connections))


async def test_a_missing_right_is_said_at_once(opened: Open, api: Api, lines: Lines) -> None:
    api.put("pods", ready("web-1"))
    api.refusals["/portforward"] = (403, 'cannot create resource "pods/portforward"')
    here = await opened()
    reader, writer = await here.connect()
    assert await is_cut(reader)
    writer.close()
    assert [line["reason"] for line in lines if line["event"] == "connection cut"] == [
        'cannot create resource "pods/portforward"'
    ]
    for end in ("/services", "/pods"):
        api.refusals = {end: (403, f"cannot list {end}")}
        with pytest.raises(PermissionRefused, match=f"cannot list {end}"):
            await opened()


async def test_what_cannot_be_forwarded_is_said_before_a_port_is_served(opened: Open, api: Api) -> None:
    api.put("pods", ready("web-1"))
    taken = socket.create_server(("127.0.0.1", 0))
    for words, said in (
        (("svc/nosuch", ":80"), "there is no svc/nosuch in namespace shop"),
        (("pod/nosuch", ":80"), "there is no pod/nosuch in namespace shop"),
        (("svc/web", ":8080"), "no TCP port '8080'"),
        (("svc/web", f"{taken.getsockname()[1]}:80"), "already in use"),
    ):
        with pytest.raises(ArcbridgeError, match=re.escape(said)):
            await opened(*words)
    taken.close()


async def test_a_start_that_is_tried_again_is_said(opened: Open, api: Api) -> None:
    api.put("pods", ready("web-1"))
    api.refusals["/pods"] = (503, "etcd is away")
    asyncio.get_running_loop().call_later(1, api.refusals.clear)
    here = await opened()
    assert here.said[0] == "etcd is away; it is tried again"
    assert here.said[2:] == ["svc/web: new connections go to pod web-1"]


async def test_addresses(opened: Open, api: Api) -> None:
    api.put("pods", ready("web-1"))
    here = await opened("pod/web-1", ":http", addresses=("127.0.0.1", "127.0.0.2"))
    first, second = here.ports
    assert first == second
    for host in ("127.0.0.1", "127.0.0.2"):
        reader, writer = await asyncio.open_connection(host, first)
        assert await reader.readline() == b"web-1\n"
        writer.close()
    with pytest.raises(OSError, match=r".*"):
        await asyncio.open_connection("::1", first)


async def test_a_port_that_serves_other_machines_is_said(opened: Open, api: Api) -> None:
    api.put("pods", ready("web-1"))
    for address, warned in (("127.0.0.2", False), ("0.0.0.0", True)):
        here = await opened(addresses=(address,))
        warning = f"Every machine that reaches {address}:{here.ports[0]} is served, with your rights"
        assert here.said == [
            f"Forwarding {address}:{here.ports[0]} to port 80 of svc/web",
            *[warning] * warned,
            "svc/web: new connections go to pod web-1",
        ]


async def test_a_change_of_the_selector_and_a_service_that_comes_back(opened: Open, api: Api) -> None:
    api.put("pods", ready("web-1"))
    here = await opened()
    assert await here.greeting() == b"web-1"
    document: dict[str, Any] = {"metadata": {"name": "web"}, "spec": {**api.objects["services/web"]["spec"]}}
    document["spec"]["selector"] = {"app": "green"}
    api.objects.pop("pods/web-1")
    api.objects["pods/green-1"] = ready("green-1")
    api.put("services", document)
    await until(lambda: "green-1" in here.said[-1])
    assert await here.greeting() == b"green-1"
    api.remove("services", "web")
    await until(lambda: here.said[-1] == "there is no svc/web in namespace shop; connections wait")
    waiting = asyncio.create_task(here.greeting())
    api.put("services", document)
    assert await waiting == b"green-1"


async def test_a_close_ends_what_waits(opened: Open, api: Api) -> None:
    api.put("pods", ready("web-1"))
    here = await opened()
    reader, writer = await here.connect()
    assert await reader.readline() == b"web-1\n"
    api.remove("pods", "web-1")
    assert await is_cut(reader)
    waiting, waiting_writer = await here.connect()
    await until(lambda: [one.news for one in here.forward._connections] == [here.forward._news])
    await here.forward.close()
    assert await is_cut(waiting)
    for one in (writer, waiting_writer):
        one.close()
    with contextlib.suppress(OSError):
        await here.connect()
        raise AssertionError("it accepts")

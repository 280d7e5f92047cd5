"""Ports of a port-forward, read from the SPDY streams behind the 101, as they are and within a WebSocket."""

from __future__ import annotations

import asyncio
import random
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterable

import pytest

from arcbridge.agent.audit import AuditRecord
from arcbridge.agent.audit.budget import AuditBudget
from arcbridge.agent.audit.record import AuditSubject
from arcbridge.agent.kube.port_forward import MAX_BLOCK, MAX_FRAMES, MAX_PORTS, ForwardedPorts, forwarded_ports
from arcbridge.net.spdy_dictionary import DICTIONARY
from tests.fuzz.costs import lines
from tests.support.eventually import until

from .bench import PODS, Bench
from .test_upgrade import echo

SUBJECT = AuditSubject("s")

TUNNELLED = b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Protocol: SPDY/3.1+portforward.k8s.io\r\n"


class Spdy:
    """The caller's side of a SPDY session, as spdystream writes it."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(9, zlib.DEFLATED, 15, 8, 0, DICTIONARY)
        self._id = -1

    def block(self, headers: Iterable[tuple[str, str]]) -> bytes:
        pairs = list(headers)
        texts = [text.encode() for pair in pairs for text in pair]
        plain = len(pairs).to_bytes(4, "big") + b"".join(len(text).to_bytes(4, "big") + text for text in texts)
        return self._deflate.compress(plain) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    def syn_stream(self, headers: Iterable[tuple[str, str]]) -> bytes:
        self._id += 2
        return control(1, self._id.to_bytes(4, "big") + bytes(6) + self.block(headers))

    def connect(self, port: int, number: int = 0) -> bytes:
        """The two streams of one connection, as kubectl opens them, and some payload."""
        both = [("port", str(port)), ("requestid", str(number))]
        return b"".join(self.syn_stream([("streamtype", kind), *both]) for kind in ("error", "data")) + data(b"x" * 700)


def control(kind: int, body: bytes, version: int = 3) -> bytes:
    return (0x8000 | version).to_bytes(2, "big") + kind.to_bytes(2, "big") + b"\0" + len(body).to_bytes(3, "big") + body


def data(payload: bytes) -> bytes:
    return (1).to_bytes(4, "big") + b"\0" + len(payload).to_bytes(3, "big") + payload


PING, SETTINGS = control(6, bytes(4)), control(4, bytes(4))


def websocket(payload: bytes, opcode: int = 2, mask: bytes = b"\x01\xfe\x55\xaa", *, first: int = 0x80) -> bytes:
    size = len(payload)
    if size < 126:
        length = bytes([size])
    else:
        length = b"\x7e" + size.to_bytes(2, "big") if size < 65536 else b"\x7f" + size.to_bytes(8, "big")
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return bytes([first | opcode, length[0] | 0x80]) + length[1:] + mask + masked


def read(pieces: Iterable[bytes], *, tunnel: bool = False) -> ForwardedPorts:
    ports = ForwardedPorts(tunnel, lambda: None)
    for piece in pieces:
        ports.feed(memoryview(piece))
    return ports


def cut(whole: bytes, seed: int) -> list[bytes]:
    """A text in pieces of random sizes, of one byte too."""
    dice, found, position = random.Random(seed), [], 0
    while position < len(whole):
        size = dice.choice((1, 2, 7, 100, 5000))
        found.append(whole[position : position + size])
        position += size
    return found


def session() -> bytes:
    spdy = Spdy()
    first = SETTINGS + spdy.connect(8080) + PING
    reply = control(2, (2).to_bytes(4, "big") + spdy.block([("a", "b")]))
    more = control(8, (1).to_bytes(4, "big") + spdy.block([("port", "1")]))
    return first + reply + more + spdy.connect(22, 1) + spdy.connect(8080, 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tunnel", [False, True])
def test_a26_ports_however_the_bytes_are_cut(tunnel: bool, seed: int) -> None:
    whole = session()
    if tunnel:
        frames = [websocket(piece, 0 if number else 2) for number, piece in enumerate(cut(whole, seed + 100))]
        frames.insert(2, websocket(b"ping", 9))
        whole = b"".join(frames) + websocket(b"", 2) + websocket(b"z" * 70_000, 10)
    ports = read(cut(whole, seed), tunnel=tunnel)
    assert (ports.ports, ports.unread) == (["8080", "22"], "")


@pytest.mark.parametrize(
    ("tunnel", "bad", "why"),
    [
        (False, control(1, bytes(30), version=2), "another version"),
        (False, control(1, bytes(10)), "empty or too long"),
        (False, control(1, bytes(MAX_BLOCK + 1)), "empty or too long"),
        (False, control(1, bytes(10) + b"no zlib"), "not compressed"),
        (False, Spdy().syn_stream([("a", "b" * (MAX_BLOCK + 1))]), "is too long, or"),
        (False, control(1, bytes(10) + Spdy().block([("a", "b")]) + b"\0"), "not compressed|behind|too long"),
        (False, PING * (MAX_FRAMES + 9000), "too many small frames"),
        (False, b"".join(map(Spdy().connect, range(MAX_PORTS + 1))), "more than 64"),
        (True, websocket(PING, first=0xC0), "WebSocket"),
        (True, websocket(PING, opcode=1), "WebSocket"),
        (True, b"\x82\x04" + PING, "WebSocket"),
    ],
)
def test_a26_it_gives_up_and_says_why(tunnel: bool, bad: bytes, why: str) -> None:
    spdy = Spdy().connect(80)
    alone = why in ("more than 64", "is too long, or")  # it has a compression of its own
    good = websocket(spdy) if tunnel else b"" if alone else spdy
    ports = read([good, bad, good], tunnel=tunnel)
    assert ports.ports[:1] == (["80"] if good else ["0"] if "64" in why else [])
    assert any(one in ports.unread for one in why.split("|")), ports.unread


def test_a26_memory_does_not_grow_with_what_passes() -> None:
    spdy = Spdy()
    ports = read([spdy.connect(1)])
    block = data(b"y" * 200_000)
    incomplete = control(1, bytes(MAX_BLOCK))[:-1]
    tracemalloc.start()
    for _ in range(100):
        ports.feed(memoryview(block))
    ports.feed(memoryview(incomplete))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 * MAX_BLOCK


MANY = [("", "")] * 2047
"""A block of 16 KiB, of which repetitions take 50 bytes."""


def repeated(kind: int, headers: list[tuple[str, str]], frames: int) -> bytes:
    spdy, before = Spdy(), {1: bytes(10), 2: bytes(4), 8: bytes(4)}[kind]
    return b"".join(control(kind, before + spdy.block(headers)) for _ in range(frames))


@pytest.mark.parametrize("kind", [1, 2, 8])
@pytest.mark.parametrize("headers", [MANY, [("port", "\0" * 16_000)], [("", "")] * 16], ids=["pairs", "values", "few"])
def test_a28_what_headers_inflate_to_is_no_more_work_than_their_bytes(
    kind: int, headers: list[tuple[str, str]]
) -> None:
    """200 KB of them took 11 s: two million lines, and a hundred million for a whole read."""
    sent = repeated(kind, headers, 200)
    assert lines(lambda one: read([one]), sent) < 12 * len(sent)


def test_a28_the_work_ends_where_headers_are_much_longer_than_what_was_sent() -> None:
    ports = read([repeated(8, MANY, 50)])
    assert ports.unread == "the headers are much longer than what was sent of them"
    assert read([repeated(1, MANY, 1)]).unread == "a stream has more than 16 headers"
    assert read([repeated(1, [("port", "\0".join("1" * 17))], 1)]).unread == "a stream names more than 16"
    plain = b"".join(map(Spdy().connect, [80] * 3000))
    assert (read([plain]).ports, read([plain]).unread) == (["80"], ""), "what kubectl sends stays within it"


def test_a28_streams_without_payload_stay_within_it() -> None:
    spdy = Spdy()
    sent = b"".join(
        spdy.syn_stream([("streamtype", "data"), ("port", "80"), ("requestid", str(n))]) for n in range(9000)
    )
    assert read([sent]).unread == "", "streams without payload"


def record(upgrade: str = "websocket", **details: object) -> AuditRecord:
    return AuditRecord("r", SUBJECT, subresource="portforward", upgrade=upgrade, details=details or None)


def test_a26_which_upgrades_are_read() -> None:
    older = TUNNELLED.replace(b"SPDY/3.1+portforward", b"v4.channel")
    assert forwarded_ports(record(), older, print) is None, "it names its ports in the query"
    exec_ = AuditRecord("r", SUBJECT, subresource="exec", upgrade="SPDY/3.1")
    assert forwarded_ports(exec_, b"", print) is None
    other = forwarded_ports(record(), b"HTTP/1.1 101 x\r\n", print)
    assert other.ports.unread == "another protocol was chosen"
    kubelet = AuditRecord(
        "r", SUBJECT, subresource="proxy", upgrade="SPDY/3.1", details={"proxy_path": "/portForward/n/p"}
    )
    found = forwarded_ports(kubelet, b"", print)
    assert found.ports.unread == ""


async def test_a33_many_ports_are_few_records_and_none_above_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record for each port, which had all before it, made 14 MiB of log of 670 KB in eight seconds."""
    told: list[object] = []
    timers: list[Callable[[], None]] = []
    loop = asyncio.get_running_loop()
    handle = loop.call_later(3600, print)

    def call_later(_: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        timers.append(call)
        return handle

    monkeypatch.setattr(loop, "call_later", call_later)
    budget = AuditBudget("alice")
    one = record("SPDY/3.1")
    one.subject = AuditSubject("s", budget=budget)
    found = forwarded_ports(one, b"", told.append)
    spdy = Spdy()
    for port in range(1, 31):
        found.ports.feed(memoryview(spdy.connect(port)))
    assert (told, len(timers)) == ([{"ports": ["1"]}], 1), "the first at once, the others later"
    timers.pop()()
    assert [len(each["ports"]) for each in told] == [1, 30]
    timers.pop()()
    assert not timers, "it ends where there is nothing new"
    budget.change(time.monotonic(), 1)
    budget.charge("x" * 10_000, time.monotonic())
    found.ports.feed(memoryview(spdy.connect(31)))
    timers.pop()()
    assert (len(told), len(timers)) == (2, 1), "it waits for room"
    budget.change(time.monotonic(), 0)
    timers.pop()()
    assert len(told) == 3
    found.ports.feed(memoryview(spdy.connect(32)))
    found.close()
    assert handle.cancelled()
    assert len(told) == 3
    assert one.details == {"ports": [str(port) for port in range(1, 33)]}, "the end has all of them"


HEAD = (
    "GET {path} HTTP/1.1\r\nHost: k\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: SPDY/3.1+portforward.k8s.io\r\n\r\n"
)


@pytest.mark.parametrize("readable", [True, False])
async def test_a26_the_record_has_the_ports_and_no_byte_is_changed(bench: Bench, readable: bool) -> None:
    details: list[str] = []
    real = bench.audit.detail

    def detail(record: AuditRecord, recorded: object) -> None:
        details.append(record.details_line())
        real(record, recorded)

    bench.audit.detail = detail
    path = f"{PODS}/p/portforward"
    switch = TUNNELLED + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    bench.api.routes[path] = echo(switch)
    wire = await bench.begin(HEAD.format(path=path + "?ports=1").encode())
    assert (await wire.head())[0] == 101
    sent = websocket(session()) if readable else b"\xc2" + bytes(500)
    await wire.send(sent)
    assert await wire.exactly(len(sent)) == sent
    if readable:
        await until(lambda: len(details) == 2)  # the first at once, both within a second
        assert '"ports":["8080"]' in details[0]
        assert '"stage":"details"' in details[1]
        assert '"ports":["8080", "22"]' in details[1]
    wire.io.finish()
    await wire.rest()
    (found,) = await bench.audit.wait(1)
    assert '"stage":"ended"' in found.line(1.0)
    assert found.details == (
        {"ports": ["8080", "22"]}
        if readable
        else {"ports": [], "more": {"ports": "not all read: a WebSocket frame is not understood"}}
    )

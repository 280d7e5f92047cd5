"""aiohttp's server over a stream: deadlines, and no word of the caller's in logs or answers (docs/threats.md#O1,
#A3).
"""

from __future__ import annotations

import asyncio
import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest

from arcbridge.agent.kube import server
from arcbridge.agent.kube.fast_path_parser import MAX_PLAIN_HEAD
from arcbridge.agent.kube.server import MAX_HEADERS, KubeProtocol
from arcbridge.mux import memory
from arcbridge.wire.limits import DEFAULT
from tests.support.clock import Clock
from tests.support.eventually import until
from tests.support.fake_apiserver import Held, reply

from .bench import Bench

CANARY = "c4n4ryT0k3n"
MALFORMED = [
    f"GET /api HTTP/1.1\r\nHost: k\r\nAuthorization : Bearer {CANARY}\r\n\r\n",
    f"GET /api HTTP/1.1\r\nHost: k\r\nAuthorization: Bearer {CANARY}\x00\r\n\r\n",
    f"GET /api HTTP/1.1\r\nHost: k\r\nAuthorization: Bearer {CANARY * 7000}\r\n\r\n",
    f"GET /{CANARY} HTTP/9.9\r\nHost: k\r\n\r\n",
    f"{CANARY}\r\n\r\n",
    f"POST /api HTTP/1.1\r\nHost: k\r\nContent-Length: {CANARY}\r\n\r\n",
    "GET /api HTTP/1.1\r\nHost: k\r\n" + "".join(f"X-{n}: {CANARY}\r\n" for n in range(MAX_HEADERS + 10)) + "\r\n",
]


@pytest.mark.parametrize("head", MALFORMED, ids=range(len(MALFORMED)))
async def test_nothing_of_a_malformed_request_is_quoted(
    bench: Bench, head: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    wire = await bench.begin(head.encode())
    answer = await wire.answer()
    assert answer.status in (400, 431)
    assert answer.status_object["message"].startswith("arcbridge: ")
    assert await wire.rest() == b""
    out, err = capfd.readouterr()
    (record,) = await bench.audit.wait(1)
    for text in (answer.body.decode(), str(answer.headers), caplog.text, out, err, record.line(0.0)):
        assert CANARY[:12] not in text
    assert bench.api.requests == []


async def test_a_head_that_never_ends_is_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_DEADLINE", 0.1)
    wire = await bench.begin(b"GET /api HTTP/1.1\r\nHos")
    answer = await wire.answer()
    assert answer.status == 400
    assert "not complete" in answer.status_object["message"]
    assert await wire.rest() == b""


async def test_a_head_is_not_late_while_its_caller_has_no_connection(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by a clock of the test's own, whatever the machine does between two of the timer's looks at it."""
    clock = Clock()
    monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(server, "HEAD_DEADLINE", 0.02)
    looks: list[float] = []

    def connected_since(_: object) -> float:
        looks.append(bench.caller.connected_since)
        return bench.caller.connected_since

    monkeypatch.setattr(bench.proxy._server, "connected_since", connected_since)
    bench.caller.connected_since = math.inf
    wire = await bench.begin(b"GET /api HTTP/1.1\r\nHos")
    await until(lambda: looks.count(math.inf) > 1)
    clock.now += 3600.0
    bench.caller.connected_since = clock.now
    await until(lambda: looks.count(clock.now) > 1)
    await wire.send(b"t: k\r\n\r\n")
    assert (await wire.answer()).status == 200
    await wire.send(b"GET /api HTTP/1.1\r\nHos")
    assert (await wire.answer()).status == 400, "with a connection the deadline runs"


async def test_an_idle_stream_and_a_slow_body_have_no_such_deadline(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEAD_DEADLINE", 0.05)
    wire = bench.stream()
    await asyncio.sleep(0.1)
    await wire.send(b"POST /api/v1/pods HTTP/1.1\r\nHost: k\r\nContent-Length: 3\r\n\r\n")
    for byte in (b"a", b"b", b"c"):
        await asyncio.sleep(0.1)
        await wire.send(byte)
    assert (await wire.answer()).status == 200
    await asyncio.sleep(0.1)
    await wire.send(b"GET /api HTTP/1.1\r\nHost: k\r\n\r\n")
    assert (await wire.answer()).status == 200


async def test_a_whole_head_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_HEAD", 100_000)
    wire = await bench.begin(
        b"GET /api HTTP/1.1\r\nHost: k\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 60_000) for n in range(3))
    )
    assert (await wire.answer()).status == 431
    assert await wire.rest() == b""


def test_the_private_names_we_rely_on_exist() -> None:
    from aiohttp.web_protocol import RequestHandler

    slots = {name for kind in RequestHandler.__mro__ for name in getattr(kind, "__slots__", ())}
    names = {"_messages", "_message_tail", "_waiter", "_request_in_progress", "_request_count", "_buffer_paused"}
    assert names <= slots | {"_request_count"}
    assert hasattr(RequestHandler, "_pause_reading_for_buffer")
    assert hasattr(RequestHandler, "_resume_reading_for_buffer")


# -- what heads take (docs/threats.md#H22) ----------------------------------------------------------------------------

GET = b"GET /api HTTP/1.1\r\nHost: k\r\nX-General: y\r\nConnection: x\r\n"
"""A head that goes through the general parser; it lacks its end."""
LONG = GET + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(60))


async def test_h22_heads_that_do_not_end_count_for_their_user(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """They took three bytes of memory for each that was sent, and nothing counted them."""
    monkeypatch.setattr(server, "LARGE_HEAD_DEADLINE", 3.0)
    arriving = bench.caller.account.arriving
    arriving.most = 1_000_000
    wires = [bench.stream() for _ in range(100)]
    for wire in wires:
        await wire.send(LONG)
    refused = 0
    for wire in wires:
        answer = await wire.answer()
        assert answer.status in (400, 429)
        refused += answer.status == 429
    assert refused > 50, "those that found no room"
    assert arriving.held == memory.arriving.held == 0
    assert len([record for record in bench.audit.kept if record.limit == "arriving_bytes"]) == 1, "one of a burst"


async def test_h22_most_that_is_held_is_bounded_and_short_heads_pass(bench: Bench) -> None:
    arriving = bench.caller.account.arriving
    arriving.most = 1_000_000
    most = 0
    for _ in range(60):
        await bench.stream().send(LONG)
        await asyncio.sleep(0)
        most = max(most, arriving.held)
    await until(lambda: arriving.full)
    assert most <= 2 * arriving.most + server.WAITING
    wire = await bench.begin(GET + b"X-Short: " + b"y" * 500)
    await wire.send(b"\r\n\r\n")
    assert (await wire.answer()).status == 200


async def test_h22_a_head_that_waits_goes_on_when_there_is_room(bench: Bench) -> None:
    arriving = bench.caller.account.arriving
    arriving.most = 50_000
    first, second = bench.stream(), bench.stream()
    await first.send(LONG)
    await until(lambda: arriving.held >= 60_000)
    arriving.most = 10 * server.WAITING // 2
    arriving.add(arriving.most)  # of others of the same user
    await second.send(LONG)
    await until(lambda: arriving.held > arriving.most + server.WAITING)
    await second.send(b"X-More: y\r\n\r\n")
    arriving.remove(arriving.most)
    assert (await second.answer()).status == 200
    await first.send(b"\r\n")
    assert (await first.answer()).status == 200
    assert arriving.held == 0


async def test_h22_a_large_head_has_less_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LARGE_HEAD_DEADLINE", 0.05)
    wire, small = bench.stream(), bench.stream()
    await small.send(GET)
    await wire.send(LONG)
    answer = await wire.answer()
    assert (answer.status, "0.05 seconds" in answer.status_object["message"]) == (400, True)
    await small.send(b"\r\n")
    assert (await small.answer()).status == 200


async def test_h22_a_head_is_long_only_with_many_groups(bench: Bench) -> None:
    lines = b"".join(b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(140))
    wire = await bench.begin(GET + lines + b"\r\n")
    assert (await wire.answer()).status == 431
    groups = b"".join(b"Impersonate-Group: %d%s\r\n" % (n, b"g" * 600) for n in range(400))
    wire = await bench.begin(GET + b"Impersonate-User: bob\r\n" + groups + b"\r\n")
    answer = await wire.answer()
    assert (answer.status, "groups" in answer.status_object["message"]) == (400, True), "it was read to its end"


async def test_h22_a_head_behind_a_request_has_its_deadline(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came before the answer, so that nothing more arrived which would have begun the deadline."""
    monkeypatch.setattr(server, "HEAD_DEADLINE", 0.1)
    wire = await bench.begin(GET + b"\r\n" + GET)
    assert (await wire.answer()).status == 200
    assert (await wire.answer()).status == 400
    body = b"POST /api/v1/pods HTTP/1.1\r\nHost: k\r\nContent-Length: 3\r\n\r\nabc"
    wire = await bench.begin(body + body + GET)
    for status in (200, 200, 400):
        assert (await wire.answer()).status == status
    assert bench.caller.account.arriving.held == 0


@pytest.mark.parametrize("general", [False, True])
async def test_h22_what_comes_behind_a_request_counts(bench: Bench, general: bool) -> None:
    """On either entrance, while the request is under way; its stream grants no credit for more."""
    bench.api.routes["/slow"] = route = Held(reply(200, b"{}"))
    arriving = bench.caller.account.arriving
    wire = bench.stream()
    lines = b"Host: k\r\nConnection: x\r\n\r\n" if general else b"Host: k\r\n\r\n"
    await wire.send(b"GET /slow HTTP/1.1\r\n" + lines)
    await until(lambda: bool(bench.api.requests))
    await wire.send(LONG)
    await until(lambda: arriving.held == server.WAITING)
    route.release.set()
    assert (await wire.answer()).status == 200
    await wire.send(b"\r\n")
    assert (await wire.answer()).status == 200
    assert arriving.held == 0


async def test_h24_little_behind_a_request_is_searched_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast entrance undid the pause of the general one, which then searched all of it for each small frame."""
    bench.api.routes["/slow"] = route = Held(reply(200, b"{}"))
    arriving = bench.caller.account.arriving
    arriving.add(arriving.most)  # of others of the same user
    wire = await bench.begin(b"GET /slow HTTP/1.1\r\nHost: k\r\n\r\n")
    await until(lambda: bool(bench.api.requests))
    await wire.send(b"a" * (MAX_PLAIN_HEAD + 1))
    await until(lambda: arriving.held > arriving.most)
    (stream,) = bench.agent_streams()
    stream.inbox.extend([b"aa"] * 1000)  # as if so many frames had come while it was paused
    stream.window.received += 2000
    stream.window.granted += 2000
    searched: list[int] = []
    protocols: list[KubeProtocol] = []

    class Searched(bytearray):
        def find(self, what: bytes, start: int = 0, *rest: int) -> int:
            searched.append(len(self) - start)
            return super().find(what, start, *rest)

    made = KubeProtocol.__init__

    def watched(self: KubeProtocol, *args: Any) -> None:
        made(self, *args)
        self._unread = Searched()
        protocols.append(self)

    monkeypatch.setattr(KubeProtocol, "__init__", watched)
    route.release.set()
    await until(lambda: bool(searched))
    await until(lambda: arriving.held > arriving.most)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(stream.inbox) == 1000, "nothing is read while it waits"
    for _ in range(100):
        protocols[0]._read_on()
    arriving.remove(arriving.most)
    await until(lambda: not stream.inbox)
    assert sum(searched) < 3 * (MAX_PLAIN_HEAD + 2000)


async def test_h24_what_stands_behind_the_last_request_is_looked_at_no_more(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a thousand times a second, for as long as the caller did not take the answer, and on nobody's account."""
    bench.api.routes["/large"] = reply(200, bytes(DEFAULT.stream_window + 100_000))
    seen: list[KubeProtocol] = []
    look = KubeProtocol._look_again

    def watched(self: KubeProtocol) -> None:
        seen.append(self)
        look(self)

    monkeypatch.setattr(KubeProtocol, "_look_again", watched)
    wire = bench.stream()
    wire.transport.pause_reading()
    await wire.send(b"GET /large HTTP/1.1\r\nHost: k\r\nConnection: close\r\n\r\nGET")
    await until(lambda: seen and seen[0].transport is not None and seen[0].transport.is_closing())
    await until(lambda: seen[0]._retry is None, timeout=5)
    assert not seen[0]._unread
    wire.transport.resume_reading()
    assert (await wire.answer()).status == 200


@pytest.mark.parametrize("end", [b"\r\n\r\n", b"5 \r\nhello\r\n0\r\n\r\n"])
async def test_a_body_that_is_broken_where_it_begins_is_answered(bench: Bench, end: bytes) -> None:
    """The reader of a body that broke before its request had begun waited for ever."""
    wire = await bench.begin(b"POST /api/v1/pods HTTP/1.1\r\nHost: k\r\nTransfer-Encoding: chunked\r\n\r\n" + end)
    assert (await wire.answer()).status == 400


@pytest.mark.parametrize("version", ["RTSP/1.0", "ICE/1.0", "RTSP/1.1"])
async def test_h5_other_protocols_are_refused(bench: Bench, version: str) -> None:
    """aiohttp's parser takes them for HTTP."""
    line = f"\r\nGET /api {version}\r\n".encode()
    for pieces in ([line], [line[:-1], line[-1:]], [line[:-4], line[-4:]], [line[:1], line[1:]]):
        wire = bench.stream()
        for piece in pieces:
            await wire.send(piece)
            await asyncio.sleep(0)
        await wire.send(b"Host: k\r\n\r\n")
        assert (await wire.answer()).status == 400
    assert bench.api.requests == []

"""The same request through both entrances: what leaves, what comes back, and the audit record are the same."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
from types import SimpleNamespace

import pytest

from arcbridge.agent.kube.attempt import Attempt
from arcbridge.agent.kube.caller import StreamContext, token_digest
from arcbridge.agent.kube.server import KubeProtocol
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.relief import BacklogRelief
from arcbridge.errors import RemoteProtocolError, StreamReset
from arcbridge.limiters import TokenBucket
from arcbridge.mux import memory
from arcbridge.mux.stream import WRITE_HIGH
from arcbridge.wire.frames import ResetCode
from arcbridge.wire.limits import DEFAULT
from tests.support.eventually import until
from tests.support.fake_apiserver import Exchange, Route, chunked, closing, dying, reply

from .bench import Bench, Wire

PATH = "/api/v1/namespaces/default/pods"


HEADS = {
    "kubectl": "User-Agent: kubectl/v1.37.1\nAccept: application/json;as=Table\nAccept-Encoding: gzip",
    "repeats and blanks": "X: 1\nx:2 \nX-Empty:\nWarning:  a  b\t",
    "who asks": "X-Remote-User: root\nX-Remote-Extra-A: b\nForwarded: for=x\nX-Forwarded-For: 1\nAudit-ID: m",
    "not quite": "X-Impersonate-User: a\nX-Note: Impersonate-User: root",
    "condition": "If-None-Match: x\nConnection: keep-alive",
    "no headers": "X: y",
}
TARGETS = {
    "list": PATH,
    "watch": f"{PATH}?watch=1&resourceVersion=5",
    "escaped": "/api/v1/a%2Fb/x:y@z?x=%3D&y",
    "other": "/openapi/v3?hash=1",
    "dots": "/api/../x",
    "escaped dots": "/api/%2e%2e/x",
    "backslash": "/api/%5c",
    "fragment": "/api#x",
    "long": "/api/v1/pods?labelSelector=" + "x" * 3000,
}
ANSWERS: dict[str, Route] = {
    "length": reply(200, b"hello", "X: 1", "Warning: 299 - a", "Warning: 299 - b"),
    "chunked": chunked(200, b"hello", b"world" * 10_000),
    "trailers": chunked(200, b"hello")[:-2] + b"X: 1\r\n\r\n",
    "404": reply(404, b'{"kind":"Status"}', "Content-Encoding: gzip"),
    "hop by hop": reply(200, b"hello", "Connection: X-Drop, keep-alive", "X-Drop: 1", "Keep-Alive: timeout=5"),
    "closes": reply(200, b"hello", "Connection: close", "Server: s"),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "304": b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n",
    "302": reply(302, b"", "Location: https://elsewhere.example/"),
    "interim": b"HTTP/1.1 103 X\r\nLink: x\r\n\r\n" + reply(200, b"hello"),
    "odd code": reply(299, b"hello"),
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nab",
    "both framings": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello",
    "unasked 101": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "endless 1xx": b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
    "huge head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
    "NUL": b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 0\r\n\r\n",
    "short body": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
    "last chunk missing": chunked(200, b"hello", end=False),
    "garbled chunk": chunked(200, b"hello", end=False) + b"zz\r\n",
}


async def _outcome(bench: Bench, data: bytes, route: Route | None) -> tuple[list[bytes], bytes, str, dict[str, object]]:
    """(heads at the API server, bytes at the caller, how the stream ended, audit record) of one request."""

    async def answer(exchange: Exchange) -> None:
        if isinstance(route, bytes):
            await exchange.send(route)
            exchange.writer.close()

    if route is not None:
        bench.api.routes[PATH] = answer
    bench.api.requests.clear()
    bench.audit.kept.clear()
    wire = await bench.begin(data)
    (record,) = await bench.audit.wait(1)
    wire.io.finish()
    try:
        async with asyncio.timeout(5):
            ended, got = "in order", await wire.rest()
    except StreamReset as reset:
        ended, got = str(reset.code), wire.buffer
    fields = dataclasses.asdict(dataclasses.replace(record, subject=None))
    for name in ("request", "started"):
        del fields[name]
    heads = [re.sub(rb"Audit-ID: [^\r]*", b"Audit-ID: *", request.head) for request in bench.api.requests]
    got = re.sub(rb"Audit-Id: [^\r]*", b"Audit-Id: *", re.sub(rb"\(request [^)]*\)", b"(request *)", got))
    return heads, got, ended, fields


Outcome = tuple[list[bytes], bytes, str, dict[str, object]]


async def _on_both(bench: Bench, monkeypatch: pytest.MonkeyPatch, data: bytes, route: Route | None = None) -> Outcome:
    served: list[bool] = []
    make_general = bench.proxy._server.protocol

    def general(context: StreamContext) -> KubeProtocol:
        served.append(True)
        return make_general(context)

    monkeypatch.setattr(bench.proxy._server, "protocol", general)
    fast = await _outcome(bench, data, route)
    assert served == [], "the request is to take the fast path"
    with monkeypatch.context() as changed:
        changed.setattr("arcbridge.agent.kube.fast_path.plain_head", lambda *_: None)
        slow = await _outcome(bench, data, route)
    assert served == [True]
    assert fast == slow
    return fast


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("lines", HEADS.values(), ids=HEADS.keys())
async def test_requests(bench: Bench, monkeypatch: pytest.MonkeyPatch, lines: str, target: str) -> None:
    head = f"GET {target} HTTP/1.1\nHost: k\n{lines}\n\n"
    await _on_both(bench, monkeypatch, head.replace("\n", "\r\n").encode())


BROKEN = {
    "nothing", "no HTTP", "two lengths", "both framings", "no length", "unasked 101", "endless 1xx", "huge head", "NUL",
}  # fmt: skip
CUT = {"short body", "last chunk missing", "garbled chunk"}


@pytest.mark.parametrize("name", ANSWERS)
async def test_answers(bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """They are the same on both entrances; a broken one is a 502 without retry, one that breaks off a reset."""
    request = f"GET {PATH} HTTP/1.1\r\nHost: k\r\n\r\n".encode()
    _, got, ended, record = await _on_both(bench, monkeypatch, request, ANSWERS[name])
    assert got.startswith(b"HTTP/1.1 502 ") == (name in BROKEN)
    assert b"Retry-After" not in got
    assert ended == (str(ResetCode.TRUNCATED) if name in CUT else "in order")
    assert (record["outcome"] == "cut") == (name in CUT)


async def test_an_idle_connection_that_has_died_is_replaced_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for entrance in ("fast", "general"):
        if entrance == "general":
            monkeypatch.setattr("arcbridge.agent.kube.fast_path.plain_head", lambda *_: None)
        bench.api.routes["/api/v1/x"] = reply(200, b"ok")
        for method in ("GET", "HEAD"):
            bench.api.routes["/api/v1/x"] = reply(200, b"ok" if method == "GET" else b"")
            assert (await bench.get("/api/v1/x")).status == 200
            bench.api.requests.clear()
            bench.api.routes["/api/v1/x"] = dying
            assert (await bench.get("/api/v1/x", method=method)).status == 502
            assert len(bench.api.requests) == 2, f"{method}: on the idle connection, then once on a new one"


@pytest.mark.parametrize("route", [chunked(200, b"one", b"two"), reply(200, b"onetwo")], ids=["chunked", "length"])
@pytest.mark.parametrize("keep", ["", "Connection: keep-alive\r\n"])
async def test_a_caller_of_http_1_0(bench: Bench, route: bytes, keep: str) -> None:
    bench.api.routes[PATH] = route
    wire = await bench.begin(f"GET {PATH} HTTP/1.0\r\nHost: k\r\n{keep}\r\n".encode())
    status, headers = await wire.head()
    assert status == 200
    assert "transfer-encoding" not in dict(headers)
    goes_on = bool(keep) and "content-length" in dict(headers)
    assert dict(headers)["connection"] == ("keep-alive" if goes_on else "close")
    if goes_on:
        assert await wire.exactly(6) == b"onetwo"
    else:
        assert await wire.rest() == b"onetwo"


async def test_an_answer_to_a_caller_of_http_1_0_that_breaks_off_is_a_reset(bench: Bench) -> None:
    bench.api.routes[PATH] = closing(chunked(200, b"one", end=False))
    wire = await bench.begin(f"GET {PATH} HTTP/1.0\r\nHost: k\r\n\r\n".encode())
    with pytest.raises(StreamReset):
        await wire.rest()


async def test_idle_connections_of_the_two_kinds_are_not_mixed(bench: Bench) -> None:
    bench.caller.tokens.add(token_digest(b"own"))
    for token_mode in (False, True, False, True):
        bench.caller.token_mode = token_mode
        assert (await bench.get(PATH, "Authorization: Bearer own")).status == 200
    assert [request.connection for request in bench.api.requests] == [1, 2, 1, 2]
    assert [request.header("authorization")[0] for request in bench.api.requests] == [
        b"Bearer agent-own-token",
        b"Bearer own",
    ] * 2


@pytest.mark.parametrize("method", ["DELETE", "OPTIONS"])
async def test_an_answer_whose_connection_is_closed_behind_it_is_whole(bench: Bench, method: str) -> None:
    parts = [bytes([65 + number]) * 200_000 for number in range(20)]

    async def closes(exchange: Exchange) -> None:
        await exchange.send(chunked(200, *parts))
        exchange.writer.close()
        await exchange.writer.wait_closed()  # the fake would cut what its own transport still holds

    bench.api.routes[PATH] = closes
    wire = await bench.begin(f"{method} {PATH} HTTP/1.1\r\nHost: k\r\n\r\n".encode())
    await wire.head()
    await asyncio.sleep(0.3)  # the caller takes nothing, so that the API server is held back
    for part in parts:
        await wire.until(b"\r\n")
        assert (await wire.exactly(len(part) + 2))[:-2] == part
    await wire.until(b"0\r\n\r\n")


LARGE = bytes(2 << 20)


def stalled(bench: Bench, path: str, *headers: str) -> Wire:
    """Ask for an answer on a stream of its own, and read none of it."""
    wire = bench.stream()
    wire.transport.pause_reading()
    wire.transport.write("\r\n".join([f"GET {path} HTTP/1.1", "Host: k", *headers, "", ""]).encode())
    return wire


@pytest.mark.parametrize("headers", [(), ("TE: trailers",)], ids=["fast", "general"])
async def test_l31_answers_that_are_not_read_hold_few_seats(
    bench: Bench, headers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller who reads nothing keeps the API server waiting with a few answers, whatever it asks for."""
    monkeypatch.setattr("arcbridge.agent.kube.exchange.LONGEST_WAIT", 1000.0)
    account = bench.caller.account
    account.seats.most = 3
    bench.api.routes[PATH] = reply(200, LARGE)
    wires = [stalled(bench, PATH, *headers) for _ in range(6)]
    async with asyncio.timeout(60):
        await until(lambda: len(bench.api.requests) >= 3 and account.seats.held >= 3)
        for _ in range(20):  # however often what flows is held back and goes on
            await asyncio.sleep(0.01)
            assert (len(bench.api.requests), account.seats.held) == (3, 3)
        watch = stalled(bench, f"{PATH}?watch=1", *headers)
        await until(lambda: len(bench.api.requests) >= 4)
        assert account.seats.held == 3, "a watch takes none"
        watch.io.reset()
        for number, wire in enumerate(wires):  # each that is read makes room for another
            wire.transport.resume_reading()
            assert len((await wire.answer()).body) == len(LARGE)
            await until(lambda number=number: len(bench.api.requests) >= min(7, 5 + number))
        await until(lambda: not account.seats.held)
    assert account.connections == 0


@pytest.mark.parametrize("headers", [(), ("TE: trailers",)], ids=["fast", "general"])
async def test_l31_who_finds_no_seat_is_told_so(
    bench: Bench, headers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcbridge.agent.kube.exchange.LONGEST_WAIT", 0.05)
    account = bench.caller.account
    account.limits = dataclasses.replace(account.limits, apiserver_seats=1)
    account.seats.most = 1
    bench.api.routes[PATH] = reply(200, LARGE)
    wire = stalled(bench, PATH, *headers)
    async with asyncio.timeout(60):
        await until(lambda: account.seats.held and bench.api.requests)
        for _ in range(3):
            refused = await bench.get(PATH, *headers)
            assert refused.status == 429
            assert refused.header("retry-after") == ["1"]
            assert "works on 1 requests of yours, or waits until their answers are read" in refused.body.decode()
        wire.io.reset()
        await until(lambda: not account.seats.held)
        assert (await bench.get("/api/v1/other", *headers)).status == 200
    reported = [record for record in bench.audit.kept if record.limit]
    assert [(record.limit, record.omitted) for record in reported] == [("apiserver_seats", 0)], "one of a burst"


async def test_l31_a_header_that_asks_for_an_upgrade_spares_no_seat(bench: Bench) -> None:
    """What the API server gives a seat it gives one whatever `Upgrade` says; a command needs none with it."""
    account = bench.caller.account
    account.seats.most = 1
    account.seats.held = 1
    ask = "GET {}/p/{} HTTP/1.1\r\nHost: k\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    bench.api.routes[f"{PATH}/p/status"] = bench.api.routes[f"{PATH}/p/exec"] = reply(404)
    status = await bench.begin(ask.format(PATH, "status").encode())
    await until(lambda: account.in_flight)
    command = await bench.begin(ask.format(PATH, "exec").encode())
    assert (await command.answer()).status == 404
    assert [request.target for request in bench.api.requests] == [f"{PATH}/p/exec"]
    account.seats.leave()
    assert (await status.answer()).status == 404
    await until(lambda: not account.seats.held)


async def test_a_request_that_is_repeated_keeps_its_seat(bench: Bench) -> None:
    """The idle connection has died: the request has had its seat all the time, and gives it back once."""
    account = bench.caller.account
    account.seats.most = 1
    assert (await bench.get(PATH)).status == 200

    async def dies(exchange: Exchange) -> None:
        bench.api.routes.pop(PATH)
        exchange.reset()

    bench.api.routes[PATH] = dies
    assert (await bench.get(PATH)).status == 200
    assert account.seats.held == 0


@pytest.mark.parametrize("headers", [(), ("TE: trailers",)], ids=["fast", "general"])
async def test_m7_requests_whose_callers_do_not_wait_end_the_session(bench: Bench, headers: tuple[str, ...]) -> None:
    """OPEN, GET, FIN: all in order, and each would cost the API server a connection."""
    request = "\r\n".join([f"GET {PATH} HTTP/1.1", "Host: k", *headers, "", ""]).encode()
    bench.client._machine.stream_table.churn = TokenBucket(10**9, 0)  # a hostile client does not mind
    (agent,) = bench.agents
    agent._machine.stream_table.churn.rate = 0.0  # however long this takes
    opened = 0
    async with asyncio.timeout(60):
        while bench.client.usable and opened < 5000:
            for _ in range(50):
                if bench.client.usable:
                    wire = bench.stream()
                    wire.transport.write(request)
                    wire.transport.write_eof()
                    opened += 1
            await asyncio.sleep(0.005)
        await until(lambda: bench.ended)
    # The agent's word may be lost with its connection, on which bytes of the client are unread: it is asked itself.
    (error,) = bench.ended
    assert isinstance(error, RemoteProtocolError)
    assert error.message.endswith("streams end before their answers faster than is allowed")
    assert DEFAULT.churn_burst <= opened <= DEFAULT.churn_burst + 600
    account = bench.caller.account
    await until(lambda: not account.seats.held and not account.connections)


@pytest.mark.parametrize("headers", [(), ("TE: trailers",)], ids=["fast", "general"])
async def test_m7_streams_that_end_behind_their_answers_do_not_count(bench: Bench, headers: tuple[str, ...]) -> None:
    bench.client._machine.stream_table.churn = TokenBucket(0, 0)
    for number in range(30):
        wire = bench.stream()
        path = PATH if number % 3 else "/api/../x"  # refused by the agent: an answer, too
        for _ in range(2 if number % 3 else 1):
            await wire.send("\r\n".join([f"GET {path} HTTP/1.1", "Host: k", *headers, "", ""]).encode())
            assert (await wire.answer()).status in (200, 400)
        wire.io.finish()
        assert await wire.rest() == b""
    assert not bench.client.closed
    (agent,) = bench.agents
    churn = agent._machine.stream_table.churn
    assert churn.left == churn.burst


@pytest.mark.parametrize("headers", [(), ("TE: trailers",)], ids=["fast", "general"])
async def test_l34_answers_of_the_agents_own_do_not_pile_up(
    bench: Bench, headers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that sends one request behind the other and takes no answer gets no further than a stream's buffer."""

    def refuse(*_: object) -> None:
        raise RequestRefusal(403, "no" * 500)

    monkeypatch.setattr(Attempt, "plan", refuse)
    request = "\r\n".join([f"GET {PATH} HTTP/1.1", "Host: k", *headers, "", ""]).encode()
    wire = bench.stream()
    wire.transport.pause_reading()
    count, most = 1500, 0
    for _ in range(count):
        wire.transport.write(request)
        await asyncio.sleep(0)
        most = max([most, *(stream.queued for stream in bench.agent_streams())])
    await asyncio.sleep(0.2)  # time enough to answer more, if nothing held the answers back
    assert 0 < len(bench.audit.kept) < count
    most = max([most, *(stream.queued for stream in bench.agent_streams())])
    assert most <= WRITE_HIGH + 4096
    wire.transport.resume_reading()
    for _ in range(count):  # none is lost
        assert (await wire.answer()).status == 403


async def test_honest_use_notices_none_of_the_bounds(bench: Bench) -> None:
    """Watches, paused logs and a large list over a slow link at once: nothing is refused, reset or held up."""
    pods, logs, objects = PATH, f"{PATH}/a/log", "/api/v1/namespaces/default/configmaps"

    async def watch(exchange: Exchange) -> None:
        await exchange.send(chunked(200, b'{"type":"ADDED"}\n', end=False))
        await exchange.reader.read()

    async def follow(exchange: Exchange) -> None:
        await exchange.send(chunked(200, *[bytes(60_000)] * 20, end=False))
        await exchange.reader.read()

    bench.api.routes |= {pods: watch, logs: follow, objects: reply(200, LARGE)}
    account, agent = bench.caller.account, bench.agents[0]
    relief = BacklogRelief(memory.backlog)
    async with asyncio.timeout(60):
        watches = [bench.stream() for _ in range(40)]
        for wire in watches:
            await wire.send(f"GET {pods}?watch=1 HTTP/1.1\r\nHost: k\r\n\r\n".encode())
        paused = [stalled(bench, f"{logs}?follow=true") for _ in range(20)]
        await until(lambda: account.connections >= 60 and agent.backlog.held >= 20 * 256 * 1024)
        slow = stalled(bench, objects)
        for _ in range(50):
            assert (await bench.get("/api/v1/other")).status == 200
        assert not agent.backlog.full
        relief.relieve([SimpleNamespace(session=agent, detached_at=None)], time.monotonic() + 3600)
        assert relief.streams_reset == 0, "there is room, however long they pause"
        slow.transport.resume_reading()
        assert len((await slow.answer()).body) == len(LARGE)
        for wire in watches:
            assert (await wire.head())[0] == 200
        for wire in paused:
            wire.transport.resume_reading()
            assert (await wire.head())[0] == 200
            assert len(await wire.exactly(1_000_000)) == 1_000_000
    assert not any(record.limit for record in bench.audit.kept)


@pytest.mark.parametrize("header", ["", "Impersonate-User: bob\r\n"], ids=["own", "of-the-review"])
async def test_h26_bodies_that_wait_for_a_seat_count_for_their_user(bench: Bench, header: str) -> None:
    """Each held 256 KiB, and nothing counted them."""
    account = bench.caller.account
    account.seats.most = 1
    account.seats.held = 1
    arriving = account.arriving
    arriving.most = 2 * DEFAULT.stream_window
    large = f"POST {PATH} HTTP/1.1\r\nHost: k\r\n{header}Content-Length: 9000000\r\n\r\n".encode()
    wires = []
    for number in range(1, 5):
        wires.append(bench.stream())
        await wires[-1].send(large)
        await until(lambda number=number: arriving.held == number * DEFAULT.stream_window)
    wire = await bench.begin(large)
    answer = await wire.answer()
    assert (answer.status, answer.header("retry-after")) == (429, ["1"])
    assert [record.limit for record in bench.audit.kept if record.limit] == ["arriving_bytes"]
    for one in wires:
        one.io.reset()
    await until(lambda: not arriving.held)
    assert memory.arriving.held == 0
    account.seats.leave()

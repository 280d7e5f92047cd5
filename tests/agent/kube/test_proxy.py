"""The proxy over real streams, before an API server that records bytes."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from arcbridge.agent.kube.attempt import Attempt
from arcbridge.agent.kube.caller import token_digest
from arcbridge.agent.sessions import Sessions
from arcbridge.agent.targets import TcpTargets
from arcbridge.mux.session import MuxSession
from arcbridge.wire.frames import ResetCode
from tests.support.eventually import until
from tests.support.fake_apiserver import Exchange, Held, Unanswered, chunked, dying, impersonation_of, reply
from tests.support.stream_io import StreamIO

from ..pair import FakeAuthenticator, joined, resume
from .bench import PODS, Bench, Wire, running


async def test_a_get_runs_as_the_caller(bench: Bench) -> None:
    answer = await bench.get(
        f"{PODS}?limit=500",
        "User-Agent: kubectl/v1.37.1",
        "Accept: application/json;as=Table",
        "Kubectl-Command: kubectl get",
    )
    assert answer.status == 200
    assert answer.body == b'{"kind":"Fake"}'
    sent = bench.api.last
    assert impersonation_of(sent) == {
        "impersonate-user": [b"alice"],
        "impersonate-uid": [b"u-1"],
        "impersonate-group": [b"dev", b"ops"],
    }
    assert sent.header("authorization") == [b"Bearer agent-own-token"]
    assert sent.header("host") == [f"127.0.0.1:{bench.api.port}".encode()]
    assert sent.header("user-agent") == [b"kubectl/v1.37.1"]
    assert sent.header("accept") == [b"application/json;as=Table"]
    assert sent.header("kubectl-command") == [b"kubectl get"]
    assert sent.header("accept-encoding") == []
    assert sent.header("content-type") == []
    assert sent.target == f"{PODS}?limit=500"
    (record,) = await bench.audit.wait(1)
    assert (record.verb, record.resource, record.namespace) == ("list", "pods", "default")
    assert '"user":"alice","groups":2' in record.subject.text
    assert (record.status, record.outcome, record.bytes_down) == (200, "answered", len(answer.body))
    assert sent.header("audit-id") == [record.request.encode()]
    assert record.request == f"{bench.caller.request_prefix}-1-1"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_a_body_with_a_length_goes_on_as_it_is(bench: Bench, method: str) -> None:
    body = bytes(range(256)) * 400
    head = (
        f"{method} {PODS} HTTP/1.1\nHost: k\nContent-Type: application/vnd.kubernetes.protobuf\n"
        f"Content-Encoding: gzip\nContent-Length: {len(body)}"
    )
    answer = await bench.ask(head, body, method=method)
    assert answer.status == 200
    sent = bench.api.last
    assert sent.body == body
    assert sent.header("content-length") == [str(len(body)).encode()]
    assert sent.header("transfer-encoding") == []
    assert sent.header("content-encoding") == [b"gzip"]
    assert sent.header("content-type") == [b"application/vnd.kubernetes.protobuf"]
    assert (await bench.audit.wait(1))[0].bytes_up == len(body)


async def test_a_chunked_body_is_chunked_anew(bench: Bench) -> None:
    body = b"5;name=value\r\nhello\r\n6\r\n world\r\n0\r\nImpersonate-User: root\r\n\r\n"
    answer = await bench.ask(f"POST {PODS} HTTP/1.1\nHost: k\nTransfer-Encoding: chunked", body)
    assert answer.status == 200
    assert bench.api.last.body == b"hello world"
    assert impersonation_of(bench.api.last)["impersonate-user"] == [b"alice"]


@pytest.mark.parametrize("at_once", [True, False])
async def test_h5_a_trailer_is_no_header_of_the_next_request(bench: Bench, at_once: bool) -> None:
    """aiohttp 3.14 puts the last trailer of a chunked body before the headers of the request that comes next."""
    first = b"POST /api HTTP/1.1\r\nHost: k\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Trailer: 1\r\n\r\n"
    wire = bench.stream()
    if at_once:
        await wire.send(first + b"GET /api HTTP/1.1\r\nHost: k\r\n\r\n")
    else:
        await wire.send(first)
    answer = await wire.answer()
    assert (answer.status, answer.header("connection")) == (200, ["close"])
    assert await wire.rest() == b"", "the connection ends with the answer"
    assert [request.method for request in bench.api.requests] == ["POST"]
    assert all(not request.header("x-trailer") for request in bench.api.requests)


@pytest.mark.parametrize("options", ["close, keep-alive", "keep-alive, close", "CLOSE ,keep-alive", "x, close, y"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_close_counts_wherever_it_stands(bench: Bench, options: str, version: str) -> None:
    wire = await bench.begin(f"GET /api HTTP/{version}\r\nHost: k\r\nConnection: {options}\r\n\r\n".encode())
    answer = await wire.answer()
    assert (answer.status, answer.header("connection")) == (200, ["close"])
    assert await wire.rest() == b""


async def test_a_refusal_before_the_body_has_come_ends_the_connection(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcbridge.agent.kube.server.LINGER", 0.05)
    bench.api.read_body = False
    bench.api.routes[PODS] = dying
    wire = await bench.begin(f"POST {PODS} HTTP/1.1\r\nHost: k\r\nContent-Length: 50\r\n\r\nbegun".encode())
    answer = await wire.answer()
    assert (answer.status, answer.header("connection")) == (502, ["close"])
    assert await wire.rest() == b""


async def test_a_watch_without_events_shows_its_head_at_once(bench: Bench) -> None:
    bench.api.routes["/api/v1/pods"] = watch = Held(b"5\r\nevent\r\n0\r\n\r\n", first=chunked(200, end=False))
    wire = await bench.begin(b"GET /api/v1/pods?watch=1 HTTP/1.1\r\nHost: k\r\n\r\n")
    status, headers = await wire.head()
    assert status == 200
    assert ("transfer-encoding", "chunked") in headers
    watch.release.set()
    assert await wire.until(b"0\r\n\r\n") == b"5\r\nevent\r\n0\r\n\r\n"
    assert (await bench.audit.wait(1))[0].verb == "watch"


async def test_a_caller_who_leaves_ends_the_watch_at_the_api_server(bench: Bench) -> None:
    bench.api.routes["/api/v1/pods"] = watch = Unanswered(chunked(200, end=False))
    wire = await bench.begin(b"GET /api/v1/pods?watch=1 HTTP/1.1\r\nHost: k\r\n\r\n")
    await wire.head()
    wire.io.reset(ResetCode.CANCELLED)
    await asyncio.wait_for(watch.gone.wait(), 5)
    assert (await bench.audit.wait(1))[0].outcome == "cut"


async def test_m20_a_body_that_the_api_server_does_not_read_counts_until_its_stream_ends(bench: Bench) -> None:
    size = 32 * 1024 * 1024
    bench.api.read_body = False
    bench.api.routes[PODS] = unread = Held(b"")
    wire = await bench.begin(f"POST {PODS} HTTP/1.1\r\nHost: k\r\nContent-Length: {size}\r\n\r\n".encode())
    wire.transport.write(bytes(size))
    (agent,) = bench.agents
    async with asyncio.timeout(20):
        while agent.ahead.held < agent._machine.limits.stream_window // 2:
            await asyncio.sleep(0.01)
            waiting = agent.streams.unread()
        assert agent.ahead.held == sum(stream.window.unconsumed for stream in waiting)
        agent.streams.reset(waiting[0], ResetCode.IDLE)
        assert not agent.streams.unread()
        assert agent.ahead.held == 0
        unread.release.set()
        assert (await bench.audit.wait(1))[0].outcome == "cut"


async def test_an_early_answer_ends_the_stream_in_order(bench: Bench) -> None:
    bench.api.read_body = False
    bench.api.routes[PODS] = reply(413, b"too large", "Connection: close")
    wire = await bench.begin(
        f"POST {PODS} HTTP/1.1\r\nHost: k\r\nContent-Length: 1000000\r\n\r\n".encode() + b"x" * 1000
    )
    answer = await wire.answer()
    assert answer.status == 413
    assert answer.body == b"too large"
    assert answer.header("connection") == ["close"]
    await wire.send(b"x" * 999_000)
    assert await wire.rest() == b""
    assert (await bench.audit.wait(1))[0].status == 413


async def test_a_body_that_breaks_off_never_looks_complete(bench: Bench) -> None:
    wire = await bench.begin(
        f"POST {PODS} HTTP/1.1\r\nHost: k\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n".encode()
    )
    await until(lambda: bench.api.requests and bench.api.last.body)
    wire.io.reset(ResetCode.CANCELLED)
    assert (await bench.audit.wait(1))[0].outcome == "cut"
    assert not bench.api.last.complete


async def test_a_malformed_chunk_never_looks_complete(bench: Bench) -> None:
    answer = await bench.ask(f"POST {PODS} HTTP/1.1\nHost: k\nTransfer-Encoding: chunked", b"5\r\nhello\r\nzz\r\n")
    assert answer.status == 400
    assert answer.header("connection") == ["close"]
    assert not any(request.complete for request in bench.api.requests)


# -- --as -----------------------------------------------------------------------------------------------------------


async def test_as_runs_as_the_other_and_names_the_caller(bench: Bench) -> None:
    answer = await bench.get("/api", "Impersonate-User: bob", "impersonate-group: team", "Impersonate-Extra-Scopes: a")
    assert answer.status == 200
    assert impersonation_of(bench.api.last) == {
        "impersonate-user": [b"bob"],
        "impersonate-group": [b"team"],
        "impersonate-extra-scopes": [b"a"],
        "impersonate-extra-arcbridge.io%2foriginal-user": [b"alice"],
    }
    record = (await bench.audit.wait(1))[0]
    assert (record.subject.user, record.as_user) == ("alice", "bob")


# -- token mode -----------------------------------------------------------------------------------------------------


async def test_token_mode_never_shows_the_agents_certificate(tmp_path: Path) -> None:
    ca = trustme.CA()
    certificate = ca.issue_cert("agent")
    chain, key = tmp_path / "agent.pem", tmp_path / "agent.key"
    certificate.cert_chain_pems[0].write_to_path(str(chain))
    certificate.private_key_pem.write_to_path(str(key))
    async with running(
        tmp_path, client_ca=ca, token_file=None, client_certificate_file=chain, client_key_file=key
    ) as bench:
        await bench.get("/api")
        assert bench.api.last.client_certificate
        assert bench.api.last.header("authorization") == []
        bench.caller.token_mode = True
        bench.caller.tokens.add(token_digest(b"callers-own"))
        await bench.get("/api", "Authorization: Bearer callers-own")
        assert not bench.api.last.client_certificate


# -- what a refusal leaves behind -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (200, ""),
        (400, "GET /api HTTP/1.1\nHost: k\nX_Y: 1"),
        (400, "POST /api HTTP/1.1\nHost: k\nExpect: more"),
        (401, "GET /api HTTP/1.1\nHost: k\nAuthorization: Bearer other"),
        (403, f"GET {PODS} HTTP/1.1\nHost: k\nImpersonate-User: root"),
        (405, "TRACE /api HTTP/1.1\nHost: k"),
        (429, ""),
        (500, ""),
        (502, f"GET {PODS} HTTP/1.1\nHost: k"),
    ],
)
async def test_l26_a_refused_request_leaves_nothing_for_the_garbage_collector(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, code: int, line: str
) -> None:
    """In a flood the collector would else walk through all that the agent holds, again and again."""
    bench.api.routes[PODS] = dying
    bench.api.routes["/apis/authorization.k8s.io/v1/subjectaccessreviews"] = reply(
        201, b'{"status": {"allowed": false}}'
    )
    bench.caller.token_mode = code == 401
    if code == 429:
        monkeypatch.setattr("arcbridge.agent.kube.attempt.MAX_IN_FLIGHT", 0)
    if code == 500:
        monkeypatch.setattr("arcbridge.agent.kube.attempt.authorize", None)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    gc.collect()
    gc.disable()
    try:
        assert (await bench.ask(line or "GET /api HTTP/1.1\nHost: k")).status == code
        await until(lambda: not any(isinstance(one, Attempt) for one in gc.get_objects()))
    finally:
        gc.enable()
        asyncio.get_running_loop().set_exception_handler(None)


# -- a session that loses its connection ------------------------------------------------------------------------


@asynccontextmanager
async def cut_and_resumed(bench: Bench) -> AsyncIterator[tuple[MuxSession, Callable[[], Awaitable[None]]]]:
    """A client's session with the proxy, whose connection a test can cut and replace."""
    judge = FakeAuthenticator(t="alice")
    sessions = Sessions(judge, bench.proxy, TcpTargets({}, bench.audit), clock=lambda: 1000.0)
    async with joined(sessions) as (client, _):
        await client.wait_established()

        async def again() -> None:
            client.transport.abort()
            await until(lambda: sessions.detached)
            await resume(sessions, client)

        yield client, again


def stream_of(client: MuxSession) -> Wire:
    io = StreamIO()
    client.open("kubernetes", io)
    return Wire(io)


async def test_s11_a_put_under_way_reaches_the_api_server_once(bench: Bench) -> None:
    body = os.urandom(1024) * 1024
    async with cut_and_resumed(bench) as (client, again):
        wire = stream_of(client)
        head = f"PUT {PODS}/a HTTP/1.1\r\nHost: k\r\nContent-Length: {len(body)}\r\n\r\n"
        await wire.send(head.encode()[:40])
        await again()
        await wire.send(head.encode()[40:])
        for start in range(0, len(body), 256 * 1024):
            sending = asyncio.ensure_future(wire.send(body[start : start + 256 * 1024]))
            await again()
            await sending
        assert (await wire.answer()).status == 200
    (request,) = bench.api.requests
    assert request.complete
    assert request.body == body
    (record,) = await bench.audit.wait(1)
    assert (record.outcome, record.bytes_up) == ("answered", len(body))


async def test_a_watch_and_an_upgraded_stream_go_on(bench: Bench) -> None:
    watch = Held(b"4\r\ntwo\n\r\n0\r\n\r\n", first=chunked(200, b"one\n", end=False))

    async def echo(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n")
        while data := await exchange.reader.read(1000):
            await exchange.send(data)

    bench.api.routes[PODS] = watch
    bench.api.routes[f"{PODS}/a/exec"] = echo
    async with cut_and_resumed(bench) as (client, again):
        watching, shell = stream_of(client), stream_of(client)
        await watching.send(f"GET {PODS}?watch=1 HTTP/1.1\r\nHost: k\r\n\r\n".encode())
        await watching.until(b"one\n")
        await shell.send(
            f"POST {PODS}/a/exec HTTP/1.1\r\nHost: k\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n".encode()
        )
        assert (await shell.head())[0] == 101
        for _ in range(3):
            await again()
            await shell.send(b"keystroke")
            assert await shell.exactly(9) == b"keystroke"
        watch.release.set()
        assert await watching.until(b"two\n") == b"\r\n4\r\ntwo\n"
        shell.io.finish()
        assert await shell.rest() == b""
    assert len(bench.api.requests) == 2

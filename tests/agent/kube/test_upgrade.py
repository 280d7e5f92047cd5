"""An upgrade joins two sides after a 101 that was asked for, and nothing else ever does (docs/threats.md#H8)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from arcbridge.agent.kube.channel_splice import message
from arcbridge.agent.sessions import Sessions
from arcbridge.agent.targets import TcpTargets
from arcbridge.errors import SessionEnded, StreamReset
from arcbridge.mux.session import MuxSession
from arcbridge.settings.config import SessionConfig
from arcbridge.wire.frames import ResetCode
from arcbridge.wire.records import Auth
from tests.support.eventually import until
from tests.support.fake_apiserver import Exchange, Held, Unanswered, chunked, closing, impersonation_of, reply
from tests.support.stream_io import StreamIO

from ..pair import ClientSide, FakeAuthenticator, joined, resume
from .bench import Bench, Wire
from .test_channel_splice import sentence

EXEC = "/api/v1/namespaces/default/pods/p/exec"
WEBSOCKET = (
    f"GET {EXEC}?command=sh HTTP/1.1\r\nHost: k\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a2V5\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
).encode()
SPDY = (
    f"POST {EXEC}?command=sh HTTP/1.1\r\nHost: k\r\nContent-Length: 0\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
    "X-Stream-Protocol-Version: v5.channel.k8s.io\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n"
    "X-Stream-Protocol-Version: v3.channel.k8s.io\r\n\r\n"
).encode()
SWITCH_WEBSOCKET = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Accept: x\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
)
SWITCH_SPDY = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
    b"X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
)
BOTH = pytest.mark.parametrize(
    ("head", "switch"), [(WEBSOCKET, SWITCH_WEBSOCKET), (SPDY, SWITCH_SPDY)], ids=["websocket", "spdy"]
)


def echo(switch: bytes, first: bytes = b"") -> object:
    """Switches, then echoes until its input ends."""

    async def serve(exchange: Exchange) -> None:
        await exchange.send(switch + first)
        while data := await exchange.reader.read(65536):
            await exchange.send(data)
        exchange.writer.close()

    return serve


@BOTH
async def test_bytes_flow_both_ways_after_the_101(bench: Bench, head: bytes, switch: bytes) -> None:
    bench.api.routes[EXEC] = echo(switch, b"first")
    wire = await bench.begin(head)
    status, headers = await wire.head()
    assert status == 101
    assert ("connection", "Upgrade") in headers
    assert await wire.exactly(5) == b"first"
    payload = bytes(range(256)) * 8000
    sender = asyncio.ensure_future(wire.send(payload))
    assert await wire.exactly(len(payload)) == payload
    await sender
    wire.io.finish()
    await wire.rest()
    (record,) = await bench.audit.wait(1)
    assert (record.status, record.outcome, record.verb) == (101, "upgraded", "create")
    assert record.bytes_up == len(payload)
    assert record.bytes_down == len(payload) + 5
    assert bench.proxy.stats.upgrades_open == 0


@BOTH
async def test_what_reaches_the_api_server(bench: Bench, head: bytes, switch: bytes) -> None:
    bench.api.routes[EXEC] = echo(switch)
    wire = await bench.begin(head)
    await wire.head()
    sent = bench.api.last
    assert impersonation_of(sent)["impersonate-user"] == [b"alice"]
    assert sent.header("authorization") == [b"Bearer agent-own-token"]
    assert sent.header("connection") == [b"Upgrade"]
    assert sent.target == f"{EXEC}?command=sh"
    versions = [value for value in head.split(b"\r\n") if value.startswith(b"X-Stream")]
    assert sent.header("x-stream-protocol-version") == [v.split(b": ")[1] for v in versions]
    wire.io.reset(ResetCode.CANCELLED)
    await bench.audit.wait(1)


REFUSED = {
    "403": reply(403, b'{"kind":"Status"}', "Audit-Id: x"),
    "500 chunked": chunked(500, b'{"kind":', b'"Status"}'),
    "100 first": b"HTTP/1.1 100 Continue\r\n\r\n" + reply(403, b'{"kind":"Status"}'),
    "200": reply(200, b"hello"),
    "302": reply(302, b"", "Location: https://elsewhere/"),
}


@BOTH
@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
async def test_any_other_answer_is_passed_on_and_closes_both_sides(
    bench: Bench, head: bytes, switch: bytes, data: bytes
) -> None:
    bench.api.routes[EXEC] = refuse = Unanswered(data)
    wire = await bench.begin(head)
    answer = await wire.answer()
    assert answer.status == int(data.split(b"HTTP/1.1 ")[-1][:3])
    assert answer.header("connection") == ["close"]
    assert await wire.rest() == b""
    await asyncio.wait_for(refuse.gone.wait(), 5)
    assert len(bench.api.requests) == 1


WRONG = {
    "no Upgrade": b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\n\r\n",
    "no Connection": b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\n\r\n",
    "other protocol": b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "two protocols": b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n\r\n",
    "subprotocol not offered": SWITCH_WEBSOCKET.replace(b"v5", b"v9"),
    "bare LF": SWITCH_WEBSOCKET.replace(b"\r\nUpgrade", b"\nUpgrade"),
    "fold": SWITCH_WEBSOCKET.replace(b"\r\nUpgrade", b"\r\n Upgrade"),
    "endless head": b"HTTP/1.1 101 X\r\nX: " + b"x" * 100_000,
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_answer_joins_nothing(bench: Bench, data: bytes) -> None:
    bench.api.routes[EXEC] = closing(data)
    wire = await bench.begin(WEBSOCKET)
    answer = await wire.answer()
    assert answer.status == 502
    assert answer.header("retry-after") == []
    assert await wire.rest() == b""


async def test_another_answer_that_breaks_off_is_a_reset(bench: Bench) -> None:
    bench.api.routes[EXEC] = closing(chunked(500, b"abcdefghi", end=False))
    wire = await bench.begin(WEBSOCKET)
    await wire.until(b"abcdefghi")
    with pytest.raises(StreamReset):
        await wire.rest()
    assert (await bench.audit.wait(1))[0].outcome == "cut"


@BOTH
@pytest.mark.parametrize("early", [b"GET /api/v1/secrets HTTP/1.1\r\nHost: k\r\n\r\n", b"\r\n\r\n", b"x"])
async def test_bytes_before_the_101_are_an_error(bench: Bench, head: bytes, switch: bytes, early: bytes) -> None:
    bench.api.routes[EXEC] = echo(switch)
    wire = await bench.begin(head + early)
    answer = await wire.answer()
    assert answer.status == 400
    assert await wire.rest() == b""
    assert [r.target for r in bench.api.requests if "secrets" in r.target] == []


@BOTH
async def test_bytes_while_the_api_server_thinks_are_an_error(bench: Bench, head: bytes, switch: bytes) -> None:
    bench.api.routes[EXEC] = Unanswered()
    wire = await bench.begin(head)
    await until(lambda: bench.api.requests)
    await wire.send(b"GET /api/v1/secrets HTTP/1.1\r\nHost: k\r\n\r\n")
    assert (await wire.answer()).status == 400
    assert await wire.rest() == b""
    assert len(bench.api.requests) == 1


async def test_a_head_in_pieces_is_not_early(bench: Bench) -> None:
    bench.api.routes[EXEC] = echo(SWITCH_WEBSOCKET)
    wire = bench.stream()
    for byte in range(len(WEBSOCKET)):
        await wire.send(WEBSOCKET[byte : byte + 1])
        if byte % 40 == 0 or byte > len(WEBSOCKET) - 6:
            await asyncio.sleep(0.001)
    assert (await wire.head())[0] == 101
    wire.io.reset(ResetCode.CANCELLED)
    await bench.audit.wait(1)


NOT_CARRIED = {
    "h2c": WEBSOCKET.replace(b"websocket", b"h2c"),
    "two upgrades": WEBSOCKET.replace(b"Upgrade: websocket", b"Upgrade: websocket\r\nUpgrade: h2c"),
    "upgrade list": WEBSOCKET.replace(b"Upgrade: websocket", b"Upgrade: websocket, h2c"),
    "no Connection": WEBSOCKET.replace(b"Connection: Upgrade\r\n", b""),
    "on a collection": WEBSOCKET.replace(EXEC.encode(), b"/api/v1/pods"),
    "on a non-resource": WEBSOCKET.replace(EXEC.encode(), b"/healthz"),
    "POST websocket": WEBSOCKET.replace(b"GET", b"POST"),
    "PUT": SPDY.replace(b"POST", b"PUT"),
    "with a body": SPDY.replace(b"Content-Length: 0", b"Content-Length: 3") + b"abc",
    "token in a subprotocol": WEBSOCKET.replace(b"v5.channel", b"base64url.bearer.authorization.k8s.io.eA, v5.channel"),
}


@pytest.mark.parametrize("head", NOT_CARRIED.values(), ids=NOT_CARRIED.keys())
async def test_other_upgrades_never_leave(bench: Bench, head: bytes) -> None:
    wire = await bench.begin(head)
    assert (await wire.answer()).status == 400
    assert await wire.rest() == b""
    assert bench.api.requests == []


@BOTH
async def test_the_callers_reset_reaches_the_api_server(bench: Bench, head: bytes, switch: bytes) -> None:
    bench.api.routes[EXEC] = route = Unanswered(switch)
    wire = await bench.begin(head)
    await wire.head()
    wire.io.reset(ResetCode.CANCELLED)
    await asyncio.wait_for(route.gone.wait(), 5)
    assert (await bench.audit.wait(1))[0].outcome == "upgraded"


@BOTH
async def test_the_api_servers_crash_is_a_reset(bench: Bench, head: bytes, switch: bytes) -> None:
    async def serve(exchange: Exchange) -> None:
        await exchange.send(switch + b"some")
        await exchange.reader.read(1)
        exchange.reset()

    bench.api.routes[EXEC] = serve
    wire = await bench.begin(head)
    await wire.head()
    assert await wire.exactly(4) == b"some"
    await wire.send(b"x")
    with pytest.raises((StreamReset, EOFError)):
        await wire.exactly(1)
    await bench.audit.wait(1)


@pytest.mark.parametrize("part", ["forwarded_ports", "ChannelSplice"])
async def test_a_splice_that_cannot_be_made_leaves_no_connection(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    bench.api.routes[EXEC] = route = Unanswered(SWITCH_SPDY)
    monkeypatch.setattr(f"arcbridge.agent.kube.proxy.{part}", fail)
    await bench.begin(SPDY)
    async with asyncio.timeout(10):
        await route.gone.wait()
    assert (await bench.audit.wait(1))[0].outcome == "failed"
    assert [type(one) for one in told] == [RuntimeError]
    asyncio.get_running_loop().set_exception_handler(None)


async def test_a_stopping_agent_ends_upgrades_and_records_them(bench: Bench) -> None:
    bench.api.routes[EXEC] = echo(SWITCH_WEBSOCKET)
    wire: Wire = bench.stream()
    await wire.send(WEBSOCKET)
    await wire.head()
    await bench.proxy.close(0.05)
    with pytest.raises(StreamReset):
        await wire.rest()
    assert (await bench.audit.wait(1))[0].outcome in ("upgraded", "cut")


# -- a token that is renewed with fewer groups --------------------------------------------------------------------


class Renewed:
    """A session of alice, of `ops` and `dev`, with a shell and a watch; its agent knows other tokens of hers."""

    def __init__(self, bench: Bench, sessions: Sessions, client: MuxSession, handler: ClientSide) -> None:
        self.bench, self.sessions, self.client, self.handler = bench, sessions, client, handler
        self.shell, self.watch = self._stream(), self._stream()

    def _stream(self) -> Wire:
        io = StreamIO()
        self.client.open("kubernetes", io)
        return Wire(io)

    async def renew(self, token: str) -> None:
        accepted = len(self.handler.accepted)
        self.client.authenticate(Auth(kind="oidc", token=token))
        await until(lambda: len(self.handler.accepted) != accepted)

    async def shell_works(self) -> None:
        await self.shell.send(b"key")
        assert await self.shell.exactly(3) == b"key"

    async def shell_ends(self) -> None:
        with pytest.raises(StreamReset) as caught:
            await self.shell.rest()
        assert caught.value.code == ResetCode.FORBIDDEN
        (record,) = await self.bench.audit.wait(1)
        assert (record.outcome, record.reason) == (
            "cut",
            "the token was renewed with fewer groups, or with another name",
        )
        assert (self.sessions.counters.upgrades_ended, self.bench.proxy.stats.upgrades_open) == (1, 0)


@asynccontextmanager
async def renewed(bench: Bench, serve: object, *, ends: bool = True, head: bytes = SPDY) -> AsyncIterator[Renewed]:
    bench.api.routes[EXEC] = serve
    bench.api.routes["/api/v1/pods"] = watch = Held(b"4\r\ntwo\n\r\n0\r\n\r\n", first=chunked(200, b"one\n", end=False))
    judge = FakeAuthenticator()
    judge.add("t", "alice", "ops", "dev")
    judge.add("same", "alice", "dev", "ops", expires=2100.0)
    judge.add("more", "alice", "dev", "ops", "new", expires=2200.0)
    judge.add("fewer", "alice", "new", "dev", expires=2300.0)
    sessions = Sessions(
        judge,
        bench.proxy,
        TcpTargets({}, bench.audit),
        clock=lambda: 1000.0,
        settings=SessionConfig(end_upgraded_streams=ends),
    )
    async with joined(sessions) as (client, handler), asyncio.timeout(20):
        await client.wait_established()
        made = Renewed(bench, sessions, client, handler)
        await made.watch.send(b"GET /api/v1/pods?watch=1 HTTP/1.1\r\nHost: k\r\n\r\n")
        await made.watch.until(b"one\n")
        await made.shell.send(head)
        yield made
        watch.release.set()
        # RBAC judged it at its start, as it does without arcbridge.
        assert await made.watch.until(b"two\n") == b"\r\n4\r\ntwo\n"


@pytest.mark.parametrize("resumes", [False, True], ids=["renewal", "resumption"])
async def test_v21_a_renewal_with_fewer_groups_ends_an_upgraded_stream(bench: Bench, resumes: bool) -> None:
    async with renewed(bench, echo(SWITCH_SPDY)) as made:
        assert (await made.shell.head())[0] == 101
        for token in ("same", "more"):
            await made.renew(token)
            await made.shell_works()
        if resumes:
            made.client.transport.abort()
            await until(lambda: made.sessions.detached)
            await resume(made.sessions, made.client, "fewer")
        else:
            await made.renew("fewer")
        await made.shell_ends()


@pytest.mark.parametrize("waits", [b"", message(1, b"x" * 40)[:9]], ids=["whole", "in the middle of a message"])
async def test_v21_kubectl_is_told_why_an_exec_ends(bench: Bench, waits: bytes) -> None:
    async with renewed(bench, echo(SWITCH_WEBSOCKET, message(1, b"$ ") + waits), head=WEBSOCKET) as made:
        assert (await made.shell.head())[0] == 101
        assert await made.shell.exactly(5 + len(waits)) == message(1, b"$ ") + waits
        await made.renew("fewer")
        if waits:
            await made.shell_ends()
            return
        reason = "the token was renewed with fewer groups, or with another name"
        assert await sentence(made.shell) == f"arcbridge: {reason}"
        (record,) = await bench.audit.wait(1)
        assert (record.outcome, record.reason) == ("cut", reason)
        assert made.sessions.counters.upgrades_ended == 1


async def test_v21_an_exec_whose_end_has_begun_is_cut_all_the_same(bench: Bench) -> None:
    """The API server's end was written, and the stream is not closed yet: a sentence there broke all other cuts."""
    async with renewed(bench, echo(SWITCH_WEBSOCKET), head=WEBSOCKET) as made:
        assert (await made.shell.head())[0] == 101
        (session,) = made.sessions._open
        (explain,) = session._caller.explains.values()
        splice = explain.func.__self__
        splice._tls = False  # else its end counts once TLS has said so
        splice.eof_received()
        assert session._caller.end_upgraded("a right was lost") == 1
        (record,) = await bench.audit.wait(1)
        assert (record.outcome, record.reason) == ("cut", "a right was lost")


async def test_v21_a_port_forward_that_is_cut_has_not_ended_in_order(bench: Bench) -> None:
    path = EXEC.replace("exec", "portforward")
    bench.api.routes[path] = serve = echo(SWITCH_WEBSOCKET, message(1, b"$ "))
    head = WEBSOCKET.replace(f"{EXEC}?command=sh".encode(), f"{path}?ports=80".encode())
    async with renewed(bench, serve, head=head) as made:
        assert (await made.shell.head())[0] == 101
        await made.shell.exactly(5)
        await made.renew("fewer")
        await made.shell_ends()


async def test_kubectl_is_told_why_the_session_of_an_exec_ends(bench: Bench) -> None:
    with suppress(SessionEnded):  # the end of the watch
        async with renewed(bench, echo(SWITCH_WEBSOCKET, message(1, b"$ ")), head=WEBSOCKET) as made:
            assert (await made.shell.head())[0] == 101
            await made.shell.exactly(5)
            made.sessions.revoke("", "access was revoked")
            assert await sentence(made.shell) == "arcbridge: access was revoked"
    assert ("cut", "access was revoked") in [(one.outcome, one.reason) for one in await bench.audit.wait(2)]


async def test_v21_an_upgrade_that_the_api_server_has_not_answered_ends_too(bench: Bench) -> None:
    late = Held(b"")
    async with renewed(bench, late) as made:
        await until(lambda: len(bench.api.requests) == 2)
        await made.renew("fewer")
        await made.shell_ends()
        late.release.set()


async def test_v21_an_operator_may_let_upgraded_streams_run_on(bench: Bench) -> None:
    async with renewed(bench, echo(SWITCH_SPDY), ends=False) as made:
        assert (await made.shell.head())[0] == 101
        await made.renew("fewer")
        await made.shell_works()
        made.shell.io.finish()
        assert await made.shell.rest() == b""
    assert made.sessions.counters.upgrades_ended == 0

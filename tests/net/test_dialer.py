from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from arcbridge.errors import Unreachable
from arcbridge.net import dialer
from arcbridge.net.address import Address
from arcbridge.net.dialer import DIRECT, begin, connect, finish, interleave, resolve
from arcbridge.net.proxy import Proxy
from tests.net.ends import listening
from tests.support.descriptors import held
from tests.support.eventually import until


def address_of(server: socket.socket) -> Address:
    return Address("127.0.0.1", server.getsockname()[1])


async def test_connects_and_tunes() -> None:
    with listening() as server:
        sock = await connect(address_of(server), deadline=5, proxy=DIRECT)
        with sock:
            assert sock.getpeername() == server.getsockname()
            assert not sock.getblocking()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


async def test_no_listener() -> None:
    with listening() as server:
        address = address_of(server)
    with pytest.raises(Unreachable, match=f"cannot reach {address}: connection refused"):
        await connect(address, deadline=5, proxy=DIRECT)


def test_a_peer_on_this_host_answers_within_the_call() -> None:
    with listening() as server:
        begun = begin(address_of(server))
        assert begun is not None
        sock, connected = begun
        with sock:
            assert connected
            assert sock.getpeername() == server.getsockname()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0, "it may stop reading"
        address = address_of(server)
    with pytest.raises(Unreachable, match=f"cannot reach {address}: connection refused"):
        begin(address)
    assert begin(Address("localhost", 1)) is None, "a name needs a resolver"


async def test_a_peer_that_does_not_answer_at_once() -> None:
    """With a full accept queue the kernel drops the SYN: connecting stays under way until the server accepts."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, socket.create_connection(server.getsockname()):
        address = address_of(server)
        before = held()
        begun = begin(address)
        assert not begun[1]
        with pytest.raises(Unreachable, match=f"cannot reach {address}: no answer within 0 s"):
            await finish(begun[0], address, deadline=0.01)
        assert held() <= before, "an attempt that gave up leaves no socket"
        begun = begin(address)
        waiting = asyncio.create_task(finish(begun[0], address, deadline=30))
        server.accept()[0].close()
        await waiting
        assert begun[0].getpeername() == server.getsockname()
        begun[0].close()


async def test_a_name_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialer, "RESOLVE_DEADLINE", 60.0)  # a resolver asks for a while where no network is
    with pytest.raises(Unreachable, match="cannot be resolved"):
        await connect(Address("no-such-host.invalid", 443), deadline=60, proxy=DIRECT)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_an_ip_address_needs_no_resolver_and_no_race(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def thread(*_arguments: object) -> None:
        raise AssertionError("an address was looked up, or raced with itself")

    monkeypatch.setattr(dialer, "_look_up", thread)
    monkeypatch.setattr(asyncio, "create_task", thread)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    assert await resolve(Address(host, 443)) == [(family, (host, 443))]
    if family == socket.AF_INET:
        with listening() as server, await connect(address_of(server), deadline=5, proxy=DIRECT) as sock:
            assert sock.getpeername() == server.getsockname()


async def test_a_slow_resolver_meets_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def slow(host: str, port: int) -> list[dialer.Candidate]:
        release.wait(60)
        return []

    monkeypatch.setattr(dialer, "_look_up", slow)
    monkeypatch.setattr(dialer, "RESOLVE_DEADLINE", 0.05)
    with pytest.raises(Unreachable, match="was not resolved within"):
        await connect(Address("slow.test", 443), deadline=5, proxy=DIRECT)
    release.set()
    await until(lambda: not dialer._queries)  # a name that is asked for again has the answer of the first question


async def test_the_first_that_connects_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialer, "HEAD_START", 0.02)
    with listening() as server, listening() as full:
        dead = socket.socket()
        dead.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        candidates: list[dialer.Candidate] = [
            (socket.AF_INET, dead.getsockname()),
            (socket.AF_INET, ("127.0.0.1", port)),
        ]
        monkeypatch.setattr(dialer, "_look_up", lambda host, port: candidates)
        before = held()
        with await connect(Address("two.test", port), deadline=5, proxy=DIRECT) as sock:
            assert sock.getpeername()[1] == port
        dead.close()
        full.close()
        await asyncio.sleep(0)
        assert held() <= before


async def test_a_cancelled_dial_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#R11: cancelled before each of its first awaits, including the turn in which it has just
    connected.
    """
    with listening() as server:
        await resolve(Address("127.0.0.1", 1))
        before = held()
        for turns in range(12):
            task = asyncio.create_task(connect(address_of(server), deadline=5, proxy=DIRECT))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            try:
                (await task).close()
            except asyncio.CancelledError:
                pass
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert held() <= before


def test_families_take_turns() -> None:
    v6: list[dialer.Candidate] = [(socket.AF_INET6, (f"::{n}", 1, 0, 0)) for n in range(3)]
    v4: list[dialer.Candidate] = [(socket.AF_INET, ("127.0.0.1", 1))]
    assert interleave([*v6, *v4, *v6]) == [v6[0], v4[0], v6[1], v6[2]]
    assert interleave([]) == []


class FakeProxy:
    """Answers each CONNECT with the same bytes and remembers what was asked."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.asked = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked = await reader.readuntil(b"\r\n\r\n")
        writer.write(self.answer)
        await reader.read()
        writer.close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n", ""),
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "does not take these credentials"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "status 403"),
        (b"SSH-2.0-x\r\n\r\n", "not HTTP"),
        (b"x" * 20_000, "not HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", "data of its own"),
    ],
)
async def test_through_a_proxy(answer: bytes, says: str) -> None:
    fake = FakeProxy(answer)
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        proxy = Proxy(Address("127.0.0.1", port), "Basic eDp5")
        dialling = connect(Address("relay.test", 443), deadline=5, proxy=proxy)
        if says:
            with pytest.raises(Unreachable, match=says):
                await dialling
        else:
            (await dialling).close()
        assert fake.asked.startswith(b"CONNECT relay.test:443 HTTP/1.1\r\nHost: relay.test:443\r\n")
        assert b"\r\nProxy-Authorization: Basic eDp5\r\n" in fake.asked


async def test_a_silent_proxy_meets_the_deadline() -> None:
    with listening() as server, pytest.raises(Unreachable, match="no answer within"):
        await connect(Address("relay.test", 443), deadline=0.05, proxy=Proxy(address_of(server)))


async def test_h28_a_name_that_is_slow_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is asked for, and also when those who asked have given up."""
    going, asked = threading.Event(), []

    def look_up(host: str, port: int) -> list[dialer.Candidate]:
        asked.append(host)
        if host == "slow.test":
            going.wait(60)
        return [(socket.AF_INET, ("127.0.0.1", port))]

    monkeypatch.setattr(dialer, "_look_up", look_up)
    slow = [asyncio.ensure_future(dialer.resolve(Address("slow.test", 1))) for _ in range(100)]
    try:
        await asyncio.sleep(0)
        slow.pop().cancel()
        async with asyncio.timeout(4):
            assert await dialer.resolve(Address("other.test", 2)) == [(socket.AF_INET, ("127.0.0.1", 2))]
    finally:
        going.set()
    assert {found[0][1][1] for found in await asyncio.gather(*slow)} == {1}
    assert sorted(asked) == ["other.test", "slow.test"]

"""The port: peeking without waking up, dispatch, caps, descriptors (docs/threats.md#J11 to #J16, #R1, #R2), in short
form.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import resource
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from arcbridge.errors import ConfigError
from arcbridge.net.address import Address
from arcbridge.net.client_hello import ClientHello, peek
from arcbridge.net.sockets import ACCEPT_PAUSE, receive, send_all
from arcbridge.net.tls import ALPN_CONTROL, ALPN_HTTP, ALPN_JOIN
from arcbridge.net.tlspipe import TlsPipe
from arcbridge.relay import listener as listener_module
from arcbridge.relay.admission import Purpose, Ticket
from arcbridge.relay.counters import Counters
from arcbridge.relay.listener import HTTP_TURN, Listener, bind
from arcbridge.relay.proxy_protocol import parse_networks
from arcbridge.settings.config import RelayLimitsConfig
from tests.net.ends import RELAY, authority, client_context
from tests.net.test_client_hello import client_hello, in_records, with_extension
from tests.relay.station import Agent, Station, echoes, places, station
from tests.relay.test_proxy_protocol import header, tlv
from tests.support.eventually import until


async def http_echo(relay: Station, context: ssl.SSLContext | None = None) -> None:
    with await relay.dial() as sock:
        await echoes(sock, context)


async def is_closed(sock: socket.socket) -> bool:
    try:
        return await asyncio.wait_for(receive(sock, 1000), 5) == b""
    except ConnectionResetError:
        return True


async def until_the_end(pipe: TlsPipe) -> bytes:
    """Application data until close_notify, or until the connection is cut."""
    data = b""
    try:
        while chunk := await pipe.read():
            data += chunk
    except (OSError, EOFError):
        pass
    return data


async def rejected(relay: Station, reason: str, count: int = 1) -> None:
    await until(lambda: relay.counters.rejected[reason] >= count)


async def test_three_rooms_behind_one_port(relay: Station) -> None:
    async with Agent(relay):
        await http_echo(relay)
        bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        bare.load_verify_locations(cadata=authority().certificate_pem)
        await http_echo(relay, bare)
        near, _ = await relay.join()
        near.close()
        await relay.settled()


@pytest.mark.parametrize("pieces", ["bytes", "halves", "records", "large"])
async def test_a_hello_in_pieces_arrives(tmp_path: Path, pieces: str) -> None:
    """docs/threats.md#J12: the handshake finishes although the hello came in pieces, and not a byte of it was taken
    by the peek.
    """
    # Byte by byte it takes a second on a quiet machine.
    async with station(tmp_path, peek_deadline=60.0) as relay:
        with await relay.dial() as sock:
            pipe = TlsPipe(sock, client_context(ALPN_HTTP), server_hostname=RELAY)
            with pytest.raises(ssl.SSLWantReadError):
                pipe._tls.do_handshake()
            hello = pipe._outgoing.read()
            if pieces == "records":
                hello = in_records(hello, 400)
            step = {"bytes": 1, "halves": len(hello) // 2 + 1, "records": 405, "large": len(hello)}[pieces]
            for at in range(0, len(hello), step):
                await send_all(sock, hello[at : at + step])
                await asyncio.sleep(0.0005)
            await pipe.handshake()
            await pipe.write(b"whole")
            assert await pipe.read() == b"WHOLE"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x80\x2e\x01\x03\x01\x00\x15", "sslv2"),
        (b"SSH-2.0-x\r\n", "not_tls"),
        (b"\x16\x03\x01\x00\x04\x01\xff\xff\xff", "hello_too_large"),
        (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", "hello_malformed"),
        (in_records(client_hello(), 10), "hello_many_records"),
        (client_hello(["unknown/1"]), "no_protocol"),
    ],
)
async def test_the_rest_is_closed_and_counted(relay: Station, data: bytes, reason: str) -> None:
    with await relay.dial() as sock:
        await send_all(sock, data)
        assert await is_closed(sock)
    assert relay.counters.rejected[reason] == 1
    assert relay.admission.waiting == 0


async def test_plain_http_gets_one_answer(relay: Station) -> None:
    with await relay.dial() as sock:
        await send_all(sock, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while chunk := await receive(sock, 1000):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"https://" in body
    await relay.settled()


@pytest.mark.parametrize("size", [0, 1, 5, 300])
async def test_slow_hellos_cost_no_wake_ups_and_end_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """docs/threats.md#J11 and #R1: 40 idle peers with an incomplete hello; counted are the calls of the parser."""
    peeks = 0
    real = listener_module.client_hello.peek

    def counting(data: bytes) -> object:
        nonlocal peeks
        peeks += 1
        return real(data)

    monkeypatch.setattr(listener_module.client_hello, "peek", counting)
    hello = with_extension(client_hello(["arcbridge-join/1"]), 0xFE0A, b"k" * 2000)
    async with station(tmp_path, peek_deadline=0.5) as relay:
        socks = [await relay.dial() for _ in range(40)]
        # A machine that is slow may reach the deadline within the drip.
        with contextlib.suppress(OSError):
            for sock in socks:
                await send_all(sock, hello[:size])
            # A drip that does not reach what the parser needs does not wake the listener.
            for n in range(10):
                await asyncio.sleep(0.02)
                if size == 300:
                    for sock in socks:
                        await send_all(sock, hello[size + n : size + n + 1])
        assert peeks <= 3 * len(socks)
        await http_echo(relay)
        for sock in socks:
            assert await is_closed(sock)
            sock.close()
        assert relay.counters.rejected["peek_timeout"] == 40
        assert relay.listener.peeking == 0
        assert relay.admission.waiting == 0


@pytest.mark.parametrize("size", [0, 3, 100])
async def test_a_peer_that_leaves_is_noticed_at_once(relay: Station, size: int) -> None:
    hello = client_hello(["arcbridge-join/1"])
    with await relay.dial() as sock:
        await send_all(sock, hello[:size])
        await asyncio.sleep(0.05)
    await rejected(relay, "peek_closed")
    assert relay.admission.waiting == 0


async def test_a_connection_has_the_options_of_the_listening_socket(relay: Station, monkeypatch: Any) -> None:
    """Nothing sets them for each one: keepalive, no delay, a user timeout, a shallow send queue."""
    accepted: list[socket.socket] = []
    monkeypatch.setattr(relay.listener, "refused", lambda arrival, reason: accepted.append(arrival.sock))
    monkeypatch.setattr(Ticket, "becomes", lambda ticket, purpose: "cap_join")
    with await relay.dial() as sock:
        await send_all(sock, client_hello(["arcbridge-join/1"]))
        await until(lambda: accepted)
        (one,) = accepted
        assert not one.getblocking()
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        for name, value in {
            "NODELAY": 1,
            "KEEPIDLE": 30,
            "KEEPINTVL": 10,
            "KEEPCNT": 3,
            "USER_TIMEOUT": 30_000,
        }.items():
            assert one.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}")) == value, name
        assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 128 * 1024
        one.close()


async def test_role_and_identity_come_from_the_handshake(relay: Station) -> None:
    """docs/threats.md#J13: a peer offers several protocols, does not speak the selected one, or asks for control
    without a certificate.
    """
    both = client_context.__wrapped__(ALPN_HTTP)
    both.set_alpn_protocols(["nonsense", ALPN_HTTP, ALPN_CONTROL])
    await http_echo(relay, both)
    # The join handler takes nothing but a JOIN record.
    with await relay.dial() as sock:
        pipe = TlsPipe(sock, client_context(ALPN_JOIN), server_hostname=RELAY)
        await pipe.handshake()
        await pipe.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await until_the_end(pipe) == b""
    with await relay.dial() as sock:
        pipe = TlsPipe(sock, client_context(ALPN_CONTROL), server_hostname=RELAY)
        await pipe.handshake()
        await pipe.write(b"\0" * 8)
        assert await until_the_end(pipe) == b""
    await rejected(relay, "handshake", 2)
    assert relay.fleet.links() == []


async def test_caps_drop_the_newest(tmp_path: Path) -> None:
    """docs/threats.md#J15."""
    limits = RelayLimitsConfig(unauthenticated=10, unauthenticated_per_address=4)
    async with station(tmp_path, "prod", limits=limits) as relay, Agent(relay) as agent:
        first = [await relay.dial() for _ in range(4)]
        await until(lambda: relay.admission.waiting >= 4)
        with socket.socket() as fifth:
            fifth.setblocking(False)
            fifth.connect_ex((relay.address.host, relay.address.port))
            await rejected(relay, "cap_address")
            assert await is_closed(fifth)
        # Authenticated peers do not count: the agent is still connected, and a freed place is used again.
        assert not agent.session.closed
        first.pop().close()
        await rejected(relay, "peek_closed")
        await http_echo(relay)
        for sock in first:
            sock.close()


STALLS = {
    "arriving": b"",
    "join": client_hello(["arcbridge-join/1"]),
    "control": client_hello(["arcbridge-control/1"]),
    "http": client_hello(["http/1.1"]),
}
"""What a peer sends before it goes silent, by the purpose for which it takes a place."""


async def dial_from(relay: Station, source: str) -> socket.socket:
    """Connect from another loopback address, as another peer."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.bind((source, 0))
    await asyncio.get_running_loop().sock_connect(sock, (relay.address.host, relay.address.port))
    return sock


@pytest.mark.parametrize("stall", STALLS)
async def test_half_open_handshakes_leave_places(tmp_path: Path, stall: str) -> None:
    """docs/threats.md#L1: eight addresses hold all they may, and each of their handshakes has stalled. Honest peers
    join, reach the HTTP API and connect as agents meanwhile, and none is refused."""
    limits = RelayLimitsConfig(unauthenticated=64, unauthenticated_per_address=20)
    async with station(tmp_path, "prod", limits=limits) as relay, Agent(relay):
        stalled = []
        for _ in range(20):
            for number in range(8):
                try:
                    stalled.append(await dial_from(relay, f"127.0.7.{number + 1}"))
                    stalled[-1].send(STALLS[stall])
                except OSError:
                    # It was refused, or had to make room already.
                    pass
        await until(lambda: relay.counters.accepted >= 161)
        assert relay.admission.waiting <= 64
        for _ in range(5):
            near, _ = await relay.join()
            near.close()
            await http_echo(relay)
        async with Agent(relay, instance="i2"):
            pass
        # Honest connections came from an address of their own, and none was turned away or closed.
        assert relay.counters.joins["ok"] == 5
        assert sum(relay.admission.evicted().values()) > 0
        for sock in stalled:
            sock.close()
        await relay.settled()
        assert relay.listener.peeking == 0


class Starts:
    """A listener whose connections have all shown their ClientHello, and the order in which their handlers start."""

    def __init__(self) -> None:
        self.order: list[str] = []
        handlers = {b"http/1.1": self._handler("http"), b"arcbridge-join/1": self._handler("join")}
        self.listener = Listener(handlers, places(1000, 1000), Counters())
        self._peers: list[socket.socket] = []

    def _handler(self, name: str) -> listener_module.ConnectionHandler:
        async def handle(sock: socket.socket, ticket: Ticket) -> None:
            self.order.append(name)
            sock.close()

        return handle

    def arrive(self, protocol: str) -> None:
        answer = peek(client_hello([protocol]))
        assert isinstance(answer, ClientHello)
        self.listener.arrived(self._arrival(), answer)

    def begin(self, data: bytes) -> None:
        """Let a connection send `data`, which is no whole ClientHello, and end."""
        self._arrival().start(5.0)
        self._peers[-1].sendall(data)
        self._peers[-1].shutdown(socket.SHUT_WR)

    def _arrival(self) -> listener_module._Arrival:
        near, far = socket.socketpair()
        near.setblocking(False)
        self._peers.append(far)
        ticket = self.listener.admission.enter("127.0.0.1")
        assert isinstance(ticket, Ticket)
        return listener_module._Arrival(self.listener, near, ticket, False)

    async def close(self) -> None:
        assert self.listener.peeking == 0
        await self.listener.close()
        for far in self._peers:
            far.close()


async def test_one_handshake_begins_between_two_turns_of_the_loop() -> None:
    """Thirty HTTP connections come in one turn of the loop: what else is to be done waits for one of them at most, and
    a join that comes later does not wait for them."""
    starts = Starts()
    for _ in range(30):
        starts.arrive("http/1.1")
    assert starts.listener.peeking == 30
    turns = []
    for turn in range(40):
        await asyncio.sleep(0)
        turns.append(len(starts.order))
        if turn == 5:
            starts.arrive("arcbridge-join/1")
    assert max(after - before for before, after in itertools.pairwise(turns)) == 1
    assert "join" in starts.order[: turns[5] + 3]
    assert len(starts.order) == 31
    await starts.close()


async def test_connections_of_an_address_over_its_share_of_the_loop_wait() -> None:
    """docs/threats.md#L43."""
    starts = Starts()
    admission = starts.listener.admission
    starts.arrive("arcbridge-join/1")
    await until(lambda: starts.order == ["join"])
    address = admission.loop_times.of("127.0.0.1", 0.0)
    assert address.spent > 0.0, "the handler's steps are charged to the address"
    address.held_until = time.monotonic() + 3600.0
    starts.arrive("arcbridge-join/1")
    for _ in range(5):
        await asyncio.sleep(0)
    assert starts.order == ["join"], "it waits"
    assert [ticket.purpose for ticket in admission.places[Purpose.JOIN].waiting] == [Purpose.JOIN], "and makes room"
    await starts.close()
    address.held_until = 0.0
    starts.arrive("arcbridge-join/1")
    await until(lambda: starts.order == ["join", "join"])
    await starts.close()


async def test_j26_what_comes_before_a_handler_is_charged_to_the_address() -> None:
    starts = Starts()
    starts.begin(b"SSH-2.0-x\r\n")
    await until(lambda: starts.listener.counters.rejected["not_tls"] == 1)
    assert starts.listener.admission.loop_times.of("127.0.0.1", 0.0).spent > 0.0
    await starts.close()


async def test_http_has_its_turn_while_joins_wait() -> None:
    """A fleet of clients reconnects, and an agent's renewal does not wait until the last of them is in."""
    starts = Starts()
    for _ in range(3 * HTTP_TURN):
        starts.arrive("arcbridge-join/1")
    for _ in range(2):
        starts.arrive("http/1.1")
    while len(starts.order) < 3 * HTTP_TURN + 2:
        await asyncio.sleep(0)
    assert [place for place, name in enumerate(starts.order, 1) if name == "http"] == [HTTP_TURN, 2 * HTTP_TURN]
    await starts.close()


def open_sockets() -> set[str]:
    """The inodes of this process' TCP sockets and others."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return {link for link in found if link.startswith("socket:")}


async def test_a_handler_that_makes_room_closes_its_socket(tmp_path: Path) -> None:
    """Connections in the middle of a TLS handshake are closed with RST, and leave no descriptor behind."""
    before = open_sockets()
    limits = RelayLimitsConfig(unauthenticated=8, unauthenticated_per_address=100)
    async with station(tmp_path, limits=limits) as relay:
        for purpose in ("join", "control", "http"):
            stalled = []
            for _ in range(10):
                sock = await dial_from(relay, "127.0.7.1")
                sock.send(STALLS[purpose])
                stalled.append(sock)
                await asyncio.sleep(0)
            await until(lambda purpose=purpose: relay.admission.held()[purpose] >= 2)
            for number in range(3):
                newcomer = await dial_from(relay, f"127.0.7.{number + 2}")
                newcomer.send(STALLS[purpose])
                stalled.append(newcomer)
            await until(lambda purpose=purpose: relay.admission.evicted()[purpose])
            for sock in stalled:
                sock.close()
            await relay.settled()
    assert open_sockets() <= before


async def through_balancer(relay: Station, first: bytes) -> socket.socket:
    """Connect and say `first`."""
    sock = await relay.dial()
    await send_all(sock, first)
    return sock


@contextlib.asynccontextmanager
async def behind_balancer(tmp_path: Path, *, peek_deadline: float = 60.0, **limits: int) -> AsyncIterator[Station]:
    relay = Station(tmp_path, RelayLimitsConfig(**limits), 10.0, peek_deadline)
    relay.balancers = parse_networks(["127.0.0.1"])
    await relay.open()
    try:
        await relay.enrol("prod")
        yield relay
    finally:
        await relay.close()


@pytest.mark.parametrize("pieces", ["whole", "bytes", "one segment", "large"])
async def test_behind_a_balancer_the_hello_follows_the_header(tmp_path: Path, pieces: str) -> None:
    tlvs = tlv(0xEA, bytes(1500)) if pieces == "large" else b""
    data = header(tlvs=tlvs)
    async with behind_balancer(tmp_path) as relay:
        sock = await relay.dial()
        with sock:
            pipe = TlsPipe(sock, client_context(ALPN_HTTP), server_hostname=RELAY)
            if pieces == "bytes":
                for n in range(len(data)):
                    await send_all(sock, data[n : n + 1])
                    await asyncio.sleep(0.001)
            elif pieces == "one segment":
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
                sock.send(data)
            else:
                await send_all(sock, data)
            shaking = asyncio.ensure_future(pipe.handshake())
            await asyncio.sleep(0.01)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
            await shaking
            await pipe.write(b"behind a balancer")
            assert await pipe.read() == b"BEHIND A BALANCER"
            (ticket,) = relay.admission.sources["192.0.2.1"]
            assert ticket.address == "192.0.2.1"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 443\r\n", "proxy_v1"),
        (client_hello(["http/1.1"]), "proxy_missing"),
        (b"GET / HTTP/1.1\r\n\r\n", "proxy_missing"),
        (header(family=0x31, block=bytes(216)), "proxy_malformed"),
        (header(tlvs=bytes(2048)), "proxy_too_large"),
        (header()[:20], "peek_timeout"),
        (header(), "peek_timeout"),
    ],
)
async def test_what_a_balancer_may_not_say(tmp_path: Path, data: bytes, reason: str) -> None:
    async with behind_balancer(tmp_path, peek_deadline=0.5 if reason == "peek_timeout" else 60.0) as relay:
        with await relay.dial() as sock:
            await send_all(sock, data)
            assert await is_closed(sock)
        await rejected(relay, reason)
        assert relay.admission.waiting == 0
        assert relay.admission.sources == {}


async def test_a_header_from_anywhere_else_is_no_hello(relay: Station) -> None:
    """A stranger cannot choose the address that it counts for."""
    with await relay.dial() as sock:
        await send_all(sock, header() + client_hello(["http/1.1"]))
        assert await is_closed(sock)
    await rejected(relay, "not_tls")


@pytest.mark.parametrize("data", [header(command=0x20, block=b""), header(family=0x00, block=b"")])
async def test_a_balancer_that_names_no_source_counts_for_itself(tmp_path: Path, data: bytes) -> None:
    async with behind_balancer(tmp_path) as relay:
        with await through_balancer(relay, data) as sock:
            await echoes(sock)
            assert set(relay.admission.sources) == {"127.0.0.1"}


async def test_behind_a_balancer_each_origin_has_its_own_places(tmp_path: Path) -> None:
    """docs/threats.md#L2: all connections come from one address, and the bound sees through it."""
    async with behind_balancer(tmp_path, unauthenticated_per_address=3) as relay:
        silent = [await through_balancer(relay, header("192.0.2.1")) for _ in range(3)]
        await until(lambda: len(relay.admission.sources.get("192.0.2.1", ())) >= 3)
        with await through_balancer(relay, header("192.0.2.1")) as fourth:
            assert await is_closed(fourth)
        assert relay.counters.rejected["cap_address"] == 1
        for source in ("192.0.2.2", "2001:db8::1"):
            with await through_balancer(relay, header(source)) as sock:
                await echoes(sock)
        for sock in silent:
            sock.close()
        await relay.settled()


async def test_out_of_descriptors_pauses_and_recovers(relay: Station) -> None:
    """docs/threats.md#J16 and #R2."""
    await http_echo(relay)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = [socket.socket() for _ in range(8)]
    for sock in waiting:
        sock.setblocking(False)
    used = max(int(name) for name in os.listdir("/proc/self/fd") if name.isdigit())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
    # No number is free: what is closed below the limit is the listener's own spare one.
    holes = []
    try:
        while True:
            holes.append(os.dup(0))
    except OSError:
        pass
    try:
        for sock in waiting:
            sock.connect_ex((relay.address.host, relay.address.port))
        begin, begin_used = time.monotonic(), time.process_time()
        await asyncio.sleep(0.7)  # the interval in which no more pauses may begin than fit into it
        await until(lambda: relay.counters.accept_pauses >= 2)
        elapsed = time.monotonic() - begin
        assert time.process_time() - begin_used < 0.3
        assert relay.counters.accept_pauses <= elapsed / ACCEPT_PAUSE + 2
        assert relay.counters.rejected["descriptors"] >= 1
    finally:
        for descriptor in holes:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for sock in waiting:
            sock.close()
    await http_echo(relay)


async def test_what_cannot_be_bound_names_the_setting() -> None:
    counters = Counters()
    one = Listener({}, places(1, 1), counters)
    bound = one.start(Address("127.0.0.1", 0))
    for address, words in (
        (bound, "the port is in use"),
        (Address("192.0.2.1", 0), "no such address"),
        (Address("no-such-host.invalid", 1), "no such address"),
    ):
        with pytest.raises(ConfigError, match=words):
            Listener({}, places(1, 1), counters).start(address)
    everywhere = Listener({}, places(1, 1), counters)
    assert everywhere.start(Address("", 0)).port
    for each in (one, everywhere):
        each.stop()
        await each.close()


async def test_a_failing_room_ends_one_connection(relay: Station) -> None:
    calls = 0

    async def broken(sock: socket.socket, ticket: object) -> None:
        nonlocal calls
        calls += 1
        sock.close()
        raise RuntimeError("a bug")

    relay.listener.handlers[b"arcbridge-join/1"] = broken
    for _ in range(2):
        with await relay.dial() as sock:
            await send_all(sock, client_hello(["arcbridge-join/1"]))
            assert await is_closed(sock)
    await rejected(relay, "failed", 2)
    assert calls == 2
    assert relay.admission.waiting == 0


async def test_who_is_queued_when_the_port_is_left_is_served(relay: Station) -> None:
    """docs/threats.md#R7: what stays in the queue of a socket that is closed would be reset."""
    # The kernel accepts them while the listener does not run.
    queued = [socket.create_connection((relay.address.host, relay.address.port)) for _ in range(100)]
    relay.listener.leave()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((relay.address.host, relay.address.port))
    for sock in queued[::33]:
        with sock:
            sock.setblocking(False)
            await echoes(sock)
    assert relay.counters.accepted == 100
    for sock in queued:
        sock.close()


async def test_a_port_may_be_shared_by_those_who_say_so() -> None:
    first = bind(Address("127.0.0.1", 0), shared=True)
    address = Address(*first.getsockname())
    with (
        first,
        bind(address, shared=True),
        bind(address, shared=True, accept=False),
        pytest.raises(ConfigError, match="the port is in use"),
    ):
        bind(address)

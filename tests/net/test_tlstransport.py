"""TlsTransport over real sockets: the handshake, bytes, flow control, protocols that fail. Its promises about the end
are in test_tlstransport_properties.py."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from arcbridge.net import tlstransport
from arcbridge.net.tlstransport import TlsTransport, accept_tls, accepted_tls, connect_tls
from tests.net.tlsends import (
    CLIENT,
    NAME,
    PATIENCE,
    SERVER,
    BufferedRecorder,
    Fickle,
    Recorder,
    against,
    blocking_tls,
    linked,
    send_key_updates,
    tcp,
)

pytestmark = pytest.mark.usefixtures("faults")
both_sides = pytest.mark.parametrize("ours", ["server", "client"])
both_protocols = pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])
Faults = list[dict[str, Any]]


class Unwatchable(socket.socket):
    """A socket that an event loop cannot watch, on demand."""

    refuses = False

    def fileno(self) -> int:
        if self.refuses:
            raise ValueError("not watched")
        return super().fileno()


async def finish(*ends: TlsTransport) -> None:
    """Close the ends and wait until both protocols heard."""
    for end in ends:
        end.close()
    for end in ends:
        await end.get_protocol().end()


# -- the handshake ----------------------------------------------------------------------------------------------------


async def test_what_a_transport_tells_of_itself() -> None:
    mine, other = Recorder(), Recorder()
    near, far = tcp()
    far.setblocking(False)
    address = near.getpeername()
    server = accept_tls(near, SERVER, mine)
    assert not server.is_closing()
    client = await connect_tls(far, CLIENT, other, NAME)
    await mine.made
    assert server.get_extra_info("peername") == address
    assert server.get_extra_info("socket") is near
    assert server.get_extra_info("sslcontext") is SERVER, (
        "aiohttp aborts such a connection at its end, others it closes"
    )
    assert server.get_extra_info("nothing of ours", "default") == "default"
    assert server.get_protocol() is mine
    assert not server.can_write_eof()
    assert server.is_reading()
    assert "open" in repr(server)
    for _ in range(2):
        server.pause_reading()
    assert not server.is_reading()
    for _ in range(2):
        server.resume_reading()
    await finish(server, client)
    assert server.is_closing()
    assert not server.is_reading()
    assert server.get_extra_info("peername") == address
    assert "closed" in repr(server)
    assert mine.calls == other.calls == ["made", "eof", "lost"] or mine.calls == ["made", "lost"]


async def test_a_client_that_does_not_trust_raises_and_says_why() -> None:
    near, far = tcp()
    answer: list[Exception] = []

    def serve() -> None:
        with far, pytest.raises(ssl.SSLError) as caught:
            blocking_tls(far, "client")
        answer.append(caught.value)

    thread = asyncio.ensure_future(asyncio.to_thread(serve))
    protocol = Recorder()
    with pytest.raises(ssl.SSLCertVerificationError):
        await connect_tls(near, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), protocol, NAME)
    await thread
    assert "UNKNOWN_CA" in str(answer[0])
    assert near.fileno() == -1
    assert protocol.calls == []


async def test_a_peer_that_speaks_no_tls() -> None:
    near, far = tcp()
    mine = Recorder()
    accept_tls(near, SERVER, mine)

    def ask() -> bytes:
        with far:
            far.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = bytearray()
            while piece := far.recv(1000):
                answer += piece
        return bytes(answer)

    assert (await asyncio.to_thread(ask))[:1] in (b"", b"\x15"), "an alert at most"
    assert mine.calls == []


@both_sides
async def test_a_handshake_has_a_deadline(ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tlstransport, "HANDSHAKE_DEADLINE", 0.05)
    near, far = tcp()
    mine = Recorder()
    with far:
        if ours == "client":
            with pytest.raises(TimeoutError, match="no TLS handshake"):
                await connect_tls(near, CLIENT, mine, NAME)
            assert (await asyncio.to_thread(far.recv, 1))[:1] == b"\x16", "its ClientHello went out"
        else:
            accept_tls(near, SERVER, mine)
            assert await asyncio.to_thread(far.recv, 1) == b""
    assert near.fileno() == -1
    assert mine.calls == []


async def test_an_accepted_handshake_that_stalls_ends_with_a_reset() -> None:
    near, far = tcp()
    with far:
        with pytest.raises(TimeoutError):
            await accepted_tls(near, SERVER, Recorder(), deadline=0.01)
        assert near.fileno() == -1
        far.settimeout(PATIENCE)
        with pytest.raises(ConnectionResetError):
            far.recv(1)


async def test_an_accepted_handshake_returns_the_transport_once_it_is_done() -> None:
    near, far = tcp()
    mine, other = Recorder(), Recorder()
    server, client = await asyncio.gather(
        accepted_tls(near, SERVER, mine, deadline=PATIENCE), connect_tls(far, CLIENT, other, NAME)
    )
    assert mine.calls == ["made"]
    assert len(vars(server)) < 30, "CPython shares no more keys: an idle agent would take 1.3 KiB more"
    await finish(server, client)


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_peer_that_leaves_within_the_handshake(how: str) -> None:
    near, far = tcp()
    if how == "rst":
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    far.close()
    with pytest.raises(ConnectionError):
        await connect_tls(near, CLIENT, Recorder(), NAME)
    assert near.fileno() == -1


async def test_a_cancelled_handshake_leaves_no_socket() -> None:
    near, far = tcp()
    with far:
        connecting = asyncio.ensure_future(connect_tls(near, CLIENT, Recorder(), NAME))
        assert (await asyncio.to_thread(far.recv, 1))[:1] == b"\x16"
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        assert near.fileno() == -1


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_to_close_within_the_handshake(how: str) -> None:
    near, far = tcp()
    mine = Recorder()
    with far:
        transport = accept_tls(near, SERVER, mine)
        getattr(transport, how)()
        assert await asyncio.to_thread(far.recv, 1) == b""
        assert near.fileno() == -1
        transport.close()
        transport.abort()
        transport.write(b"nowhere")
        await asyncio.sleep(0)
    assert mine.calls == []


@pytest.mark.parametrize(
    "start",
    [
        lambda near: accept_tls(near, CLIENT, Recorder()),
        lambda near: TlsTransport(near, SERVER, Recorder(), server_hostname=NAME),
        lambda near: TlsTransport(near, CLIENT, Recorder(), server_hostname=""),
    ],
)
async def test_a_start_that_is_impossible_leaves_no_socket(start: Callable[[socket.socket], object]) -> None:
    near, far = tcp()
    with far:
        with pytest.raises((ssl.SSLError, ValueError)):
            start(near)
        assert near.fileno() == -1


async def test_a_socket_that_the_loop_does_not_take_leaves_neither_itself_nor_a_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tlstransport, "HANDSHAKE_DEADLINE", 0.01)
    plain, far = tcp()
    near = Unwatchable(fileno=plain.detach())
    near.setblocking(False)
    heard: list[BaseException | None] = []
    with far:
        near.refuses = True
        with pytest.raises(ValueError, match="not watched"):
            accept_tls(near, SERVER, Recorder(), on_handshake=heard.append)
        near.refuses = False
        assert near.fileno() == -1
        await asyncio.sleep(0.05)
    assert heard == []


async def test_a_last_flight_that_cannot_be_sent_fails_the_handshake() -> None:
    plain, far = tcp()
    near = Fickle.of(plain)

    def serve() -> None:
        with far, pytest.raises((ssl.SSLError, OSError)):
            blocking_tls(far, "client")

    protocol = Recorder()
    connecting = asyncio.ensure_future(connect_tls(near, CLIENT, protocol, NAME))
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # the ClientHello is sent
    near.fails = BrokenPipeError("gone")
    thread = asyncio.ensure_future(asyncio.to_thread(serve))
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(BrokenPipeError):
            await connecting
    await thread
    assert protocol.calls == []


# -- bytes ------------------------------------------------------------------------------------------------------------


@both_protocols
async def test_many_bytes_both_ways_at_once(kind: Callable[[], Recorder]) -> None:
    mine, other = kind(), kind()
    server, client = await linked(mine, other)
    source = random.Random(3)
    there, back = source.randbytes(1_500_000), source.randbytes(1_500_000)
    at = 0
    while at < len(there):
        size = source.choice([1, 100, 5_000, 16_384, 16_385, 300_000])
        client.write(there[at : at + size])
        server.write(memoryview(back)[at : at + size])
        at += size
        await asyncio.sleep(0)
    await mine.until(lambda: len(mine.data) == len(there))
    await other.until(lambda: len(other.data) == len(back))
    assert mine.data == there
    assert other.data == back
    await finish(server, client)


async def test_what_is_written_may_be_reused_at_once() -> None:
    mine, other = Recorder(pause=True), Recorder()
    server, client = await linked(mine, other, send_buffer=4096)
    data = bytearray(b"x" * 600_000)
    client.write(data)
    data[:] = b"\xdb" * len(data)
    client.write(b"")
    client.writelines([b"a", bytearray(b"b"), memoryview(b"c")])
    client.writelines([])
    server.resume_reading()
    await mine.until(lambda: len(mine.data) == 600_003)
    assert mine.data == b"x" * 600_000 + b"abc"
    client.close()
    client.write(b"late")
    await finish(server, client)
    assert len(mine.data) == 600_003


@both_sides
async def test_a_broken_record_ends_the_connection(ours: str) -> None:
    def peer(tls: ssl.SSLSocket) -> None:
        with socket.socket(fileno=tls.detach()) as raw:
            raw.settimeout(PATIENCE)
            raw.sendall(b"\x17\x03\x03\x00\x40" + b"\xff" * 64)
            while raw.recv(1000):
                pass

    mine = Recorder()
    _, thread = await against(ours, mine, peer)
    assert isinstance(await mine.end(), ssl.SSLError)
    await thread
    assert mine.calls == ["made", "lost"]


# -- flow control -----------------------------------------------------------------------------------------------------


@both_sides
@both_protocols
async def test_a_paused_reader_bounds_the_peer(ours: str, kind: Callable[..., Recorder]) -> None:
    mine = kind(pause=True)
    sent, whole = [0], 40_000_000

    def peer(tls: ssl.SSLSocket) -> None:
        while sent[0] < whole:
            sent[0] += tls.send(b"z" * 20_000)
        tls.unwrap()

    transport, thread = await against(ours, mine, peer)
    before = -1
    while not sent[0] or sent[0] != before:  # until it is stuck: what is waited for is that nothing happens
        before = sent[0]
        await asyncio.sleep(0.1)
    assert 0 < sent[0] < whole // 2
    assert mine.data == b""
    assert transport._incoming.pending < 300_000, "but for the read that ended the handshake it stays in the kernel"
    transport.resume_reading()
    assert await mine.end() is None
    await thread
    assert len(mine.data) == whole
    assert mine.calls == ["made", "eof", "lost"]


@both_protocols
async def test_a_pause_within_a_delivery_holds_the_rest(kind: Callable[..., Recorder]) -> None:
    """One read of the socket gave OpenSSL many records: a pause after each leaves the others there."""

    class Sipping(kind):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.made.result().pause_reading()

        def buffer_updated(self, nbytes: int) -> None:
            super().buffer_updated(nbytes)
            self.made.result().pause_reading()

    mine = Sipping()
    server, client = await linked(mine, Recorder())
    data = random.Random(1).randbytes(200_000)
    client.write(data)
    client.close()
    sips = 0
    for sips in itertools.count(1):
        count = sips
        await mine.until(lambda: not server.is_reading())
        if mine.lost.done():
            break
        size = len(mine.data)
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(mine.data) == size, f"delivered while paused, sip {count}"
        assert "eof" not in mine.calls
        mine.arrived.clear()
        server.resume_reading()
        await mine.until(lambda: not server.is_reading() and (len(mine.data) > size or mine.lost.done()))  # noqa: B023
    assert sips >= 12
    assert mine.data == data
    assert mine.calls == ["made", "eof", "lost"]
    await client.get_protocol().end()


async def test_a_pause_before_the_handshake_is_done_holds_too() -> None:
    near, far = tcp()
    far.setblocking(False)
    mine = Recorder()
    server = accept_tls(near, SERVER, mine)
    server.pause_reading()
    client = await connect_tls(far, CLIENT, Recorder(), NAME)
    client.write(b"x" * 500_000)
    await mine.made
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert mine.data == b""
    assert server._incoming.pending < 300_000, "no more than the read that finished the handshake"
    server.resume_reading()
    await mine.until(lambda: len(mine.data) == 500_000)
    await finish(server, client)


@both_protocols
async def test_a_peer_that_does_not_read_pauses_the_protocol(kind: Callable[..., Recorder]) -> None:
    mine, other = kind(), kind(pause=True)
    server, client = await linked(mine, other, send_buffer=4096)
    assert server.get_write_buffer_limits() == (tlstransport.WRITE_LOW, tlstransport.WRITE_HIGH)
    sent = 0
    async with asyncio.timeout(PATIENCE):
        while "pause" not in mine.calls:
            server.write(b"w" * 50_000)
            sent += 50_000
            await asyncio.sleep(0)
    size = server.get_write_buffer_size()
    assert tlstransport.WRITE_HIGH < size <= tlstransport.WRITE_HIGH + 60_000
    server.write(b"w" * 50_000)  # may still be written, and is told but once
    sent += 50_000
    assert server.get_write_buffer_size() > size
    client.resume_reading()
    await other.until(lambda: len(other.data) == sent)
    assert mine.calls == ["made", "pause", "resume"]
    assert server.get_write_buffer_size() == 0
    await finish(server, client)


@both_protocols
@pytest.mark.parametrize("payload", [b"", b"x" * 512], ids=["none", "a little"])
async def test_j34_records_without_payload_end_the_connection(kind: Callable[[], Recorder], payload: bytes) -> None:
    """docs/threats.md#J34: OpenSSL takes any number of KeyUpdates. A record of 512 bytes once explained 600 of them."""
    mine = kind()

    def peer(tls: ssl.SSLSocket) -> None:
        with suppress(OSError):
            for _ in range(40):
                if payload:
                    tls.sendall(payload)
                send_key_updates(tls, 300)
            tls.recv(1)  # an end of its own would be one without close_notify, too

    _, thread = await against("server", mine, peer)
    assert isinstance(await mine.end(), ConnectionAbortedError)
    await thread
    assert len(mine.data) <= 6 * len(payload), "300 of them have 8 KiB"


@both_protocols
async def test_j34_the_smallest_records_end_nothing(kind: Callable[[], Recorder]) -> None:
    mine = kind()

    def peer(tls: ssl.SSLSocket) -> None:
        for _ in range(2000):
            tls.send(b"x")
        tls.unwrap()

    _, thread = await against("server", mine, peer)
    assert await mine.end() is None
    await thread
    assert mine.data == b"x" * 2000


async def test_an_end_has_its_deadline() -> None:
    """Whatever a peer of the relay's HTTP API leaves unread: an answer that it closes behind takes so long at most."""
    mine, other = Recorder(), Recorder(pause=True)
    near, far = tcp(send_buffer=4096)
    far.setblocking(False)
    accepting = asyncio.ensure_future(accepted_tls(near, SERVER, mine, deadline=PATIENCE, close_deadline=0.05))
    client = await connect_tls(far, CLIENT, other, NAME)
    server = await accepting
    while "pause" not in mine.calls:
        server.write(bytes(50_000))
    server.close()
    async with asyncio.timeout(PATIENCE):
        assert await mine.end() is None
    client.abort()
    await other.end()


async def test_write_limits() -> None:
    mine, other = Recorder(), Recorder(pause=True)
    server, client = await linked(mine, other, send_buffer=4096)
    server.set_write_buffer_limits(100_000_000)
    server.write(b"w" * 1_500_000)
    assert "pause" not in mine.calls
    assert server.get_write_buffer_size() > 0
    server.set_write_buffer_limits(0)
    assert mine.calls == ["made", "pause"], "a lower limit counts at once"
    client.resume_reading()
    await other.until(lambda: len(other.data) == 1_500_000)
    async with asyncio.timeout(PATIENCE):
        while "resume" not in mine.calls:
            await asyncio.sleep(0.001)
    await finish(server, client)


# -- protocols that fail ----------------------------------------------------------------------------------------------


def failing(where: str) -> Recorder:
    """Make a protocol that raises in one of its methods, or has no room for a byte."""
    protocol = BufferedRecorder() if "buffer" in where else Recorder()

    def broken(*_: object) -> None:
        raise RuntimeError(f"broken in {where}")

    if where == "empty buffer":
        protocol.get_buffer = lambda sizehint: bytearray()
    else:
        setattr(protocol, where, broken)
    return protocol


@pytest.mark.parametrize(
    "where",
    [
        "data_received",
        "get_buffer",
        "empty buffer",
        "buffer_updated",
        "eof_received",
        "pause_writing",
        "resume_writing",
    ],
)
async def test_a_protocol_that_raises_ends_its_connection_alone(where: str, faults: Faults) -> None:
    mine = failing(where)
    other, neighbours = Recorder(pause=where.endswith("writing")), (Recorder(), Recorder())
    one, two = await linked(*neighbours)
    server, client = await linked(mine, other, send_buffer=4096)
    if where == "eof_received":
        client.close()
    elif where.endswith("writing"):
        server.set_write_buffer_limits(10_000)
        server.write(b"w" * 1_500_000)
        client.resume_reading()
    else:
        client.write(b"x")
    error = await mine.end()
    assert isinstance(error, BufferError if where == "empty buffer" else RuntimeError)
    assert "eof" not in mine.calls
    [fault] = faults
    assert fault["exception"] is error
    assert fault["transport"] is server
    faults.clear()
    two.write(b"still here")
    await neighbours[0].until(lambda: neighbours[0].data == b"still here")
    client.abort()
    await other.end()
    await finish(one, two)


async def test_a_protocol_that_raises_at_its_birth_or_its_death(faults: Faults) -> None:
    mine, other = failing("connection_made"), Recorder()
    _, client = await linked(mine, other)
    assert isinstance(await mine.end(), RuntimeError)
    await other.end()
    assert len(faults) == 1
    faults.clear()
    mine = failing("connection_lost")
    server, client = await linked(mine, Recorder())
    await mine.made
    server.abort()
    await client.get_protocol().end()
    assert [str(fault["exception"]) for fault in faults] == ["broken in connection_lost"]
    faults.clear()

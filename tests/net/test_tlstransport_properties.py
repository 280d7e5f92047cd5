"""What TlsTransport promises about the end: no byte is lost, a cut is no end, and neither side waits in vain."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable

import pytest

from arcbridge.mux.splice import reset_transport
from arcbridge.net import tlstransport
from tests.net.tlsends import PATIENCE, BufferedRecorder, Fickle, Recorder, against, tcp

pytestmark = pytest.mark.usefixtures("faults")
both_sides = pytest.mark.parametrize("ours", ["server", "client"])
both_protocols = pytest.mark.parametrize("kind", [Recorder, BufferedRecorder])
MUCH = random.Random(5).randbytes(5_000_000)


def raw_of(tls: ssl.SSLSocket) -> socket.socket:
    """The TCP socket below, which now has no TLS any more."""
    raw = socket.socket(fileno=tls.detach())
    raw.settimeout(PATIENCE)
    return raw


def read_all(tls: ssl.SSLSocket, size: int = 65_536) -> bytes:
    """Read until close_notify. Raises ssl.SSLEOFError where the connection ends without one."""
    data = bytearray()
    while piece := tls.recv(size):
        data += piece
    return bytes(data)


# -- our end ----------------------------------------------------------------------------------------------------------


@both_sides
async def test_a_slow_reader_that_keeps_sending_gets_everything(ours: str) -> None:
    """The bug of asyncio's transports: one ping after close_notify, and RST took the tail of the data with it."""

    def peer(tls: ssl.SSLSocket) -> bytes:
        data = bytearray()
        for turn in range(1_000_000):
            tls.sendall(b"a ping of a WebSocket")
            if turn % 20 == 0:
                time.sleep(0.002)
            piece = tls.recv(65_536)
            if not piece:
                break
            data += piece
        for _ in range(50):  # behind our close_notify, which OpenSSL has seen
            tls.sendall(b"another ping")
            time.sleep(0.001)
        with raw_of(tls) as raw:
            assert raw.recv(1) == b"", "FIN follows close_notify"
        return bytes(data)

    mine = Recorder()
    sockets = tcp(send_buffer=32_768, receive_buffer=32_768)
    transport, thread = await against(ours, mine, peer, sockets=sockets)
    transport.pause_reading()  # what it sends must not stop the end
    transport.write(MUCH)
    transport.close()
    assert transport.is_closing()
    assert await thread == MUCH
    assert await mine.end() is None
    assert "eof" not in mine.calls


@both_sides
async def test_the_end_comes_with_the_peers(ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport does not linger once the peer has ended, too."""
    monkeypatch.setattr(tlstransport, "LINGER", 3600.0)

    def peer(tls: ssl.SSLSocket) -> bytes:
        data = read_all(tls)
        tls.sendall(b"goodbye")
        tls.unwrap().close()
        return data

    mine = Recorder()
    transport, thread = await against(ours, mine, peer)
    transport.write(b"last words")
    transport.close()
    transport.close()
    async with asyncio.timeout(PATIENCE):
        assert await thread == b"last words"
        assert await mine.end() is None
    assert mine.calls == ["made", "lost"]


@both_sides
async def test_a_peer_that_ends_tls_and_keeps_tcp_open_is_lost_at_once(
    ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can come behind its close_notify for which a closed socket would answer with RST."""
    monkeypatch.setattr(tlstransport, "LINGER", 3600.0)

    lost = threading.Event()

    def peer(tls: ssl.SSLSocket) -> None:
        with tls.unwrap():
            assert lost.wait(PATIENCE)

    mine = Recorder()
    _, thread = await against(ours, mine, peer)
    async with asyncio.timeout(PATIENCE / 3):
        assert await mine.end() is None
    lost.set()
    await thread
    assert mine.calls == ["made", "eof", "lost"]


async def test_lingering_is_over_when_the_peer_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tlstransport, "LINGER", 0.05)
    go_on = threading.Event()

    def peer(tls: ssl.SSLSocket) -> bytes:
        assert go_on.wait(PATIENCE)
        return read_all(tls)

    mine = Recorder()
    transport, thread = await against("server", mine, peer)
    transport.write(b"in the peer's kernel")
    transport.close()
    assert await mine.end() is None
    go_on.set()
    assert await thread == b"in the peer's kernel"


@pytest.mark.parametrize("patient", [True, False])
async def test_lingering_lasts_while_the_peer_lacks_bytes(patient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kubectl logs | less`: everything is with our kernel, and the peer takes its time."""
    monkeypatch.setattr(tlstransport, "LINGER", 0.02)
    monkeypatch.setattr(tlstransport, "LINGER_MOST", 100.0 if patient else 0.1)
    go_on = threading.Event()

    def peer(tls: ssl.SSLSocket) -> bytes:
        assert go_on.wait(PATIENCE)
        return read_all(tls) if patient else b""

    mine = Recorder()
    transport, thread = await against("server", mine, peer, sockets=tcp(send_buffer=1_000_000, receive_buffer=4096))
    transport.write(MUCH[:300_000])
    assert transport.get_write_buffer_size() == 0, "the kernel has it all"
    transport.close()
    if patient:
        await asyncio.sleep(0.3)  # many looks at what the peer lacks, none of which may end the connection
        assert not mine.lost.done()
        go_on.set()
        assert await thread == MUCH[:300_000]
        assert await mine.end() is None
    else:
        assert await mine.end() is None
        go_on.set()
        await thread


@pytest.mark.parametrize("end", ["close", "cut"])
async def test_a_peer_that_takes_nothing_of_what_waits_is_given_up(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kubectl exec -i pod -- sleep 1d < file`, ended by Ctrl-C: nobody reads the rest, and its request has to end."""
    monkeypatch.setattr(tlstransport, "LINGER", 0.02)
    monkeypatch.setattr(tlstransport, "LINGER_MOST", 0.1)
    go_on = threading.Event()

    def peer(tls: ssl.SSLSocket) -> bytes:
        assert go_on.wait(PATIENCE)
        return b""

    mine = Recorder()
    transport, thread = await against("server", mine, peer, sockets=tcp(send_buffer=4096, receive_buffer=4096))
    transport.write(MUCH)
    assert transport.get_write_buffer_size(), "more than the kernel takes"
    getattr(transport, end)()
    assert isinstance(await mine.end(), TimeoutError)
    go_on.set()
    await thread


async def test_close_notify_that_waits_for_the_kernel_outlives_the_peers_fin() -> None:
    plain, far = tcp()
    near = Fickle.of(plain)
    loop = asyncio.get_running_loop()
    started, half_closed = threading.Event(), asyncio.Event()

    def peer(tls: ssl.SSLSocket) -> bytes:
        assert started.wait(PATIENCE)
        with socket.socket(fileno=tls.fileno()) as same:  # `tls.shutdown` would end TLS as well
            same.shutdown(socket.SHUT_WR)
            same.detach()
        loop.call_soon_threadsafe(half_closed.set)
        return read_all(tls)

    mine = Recorder(keep_open=True)
    transport, thread = await against("server", mine, peer, sockets=(near, far))
    transport.write(b"before")
    near.fails = BlockingIOError()
    transport.close()
    started.set()
    await half_closed.wait()
    await asyncio.sleep(0.05)
    assert not mine.lost.done()
    near.fails = None
    assert await thread == b"before"
    assert await mine.end() is None


@both_sides
async def test_abort_is_immediate(ours: str) -> None:
    def peer(tls: ssl.SSLSocket) -> str:
        try:
            return f"{len(read_all(tls))} bytes in order"
        except (ssl.SSLEOFError, ConnectionError):
            return "cut"

    mine = Recorder()
    transport, thread = await against(ours, mine, peer, sockets=tcp(send_buffer=8192, receive_buffer=8192))
    transport.write(MUCH)
    sock = transport.get_extra_info("socket")
    transport.abort()
    assert sock.fileno() == -1
    assert transport.get_write_buffer_size() == 0
    assert not mine.lost.done(), "told by the loop, not from within"
    assert await mine.end() is None
    transport.abort()
    transport.close()
    transport.write(b"late")
    assert await thread == "cut"
    assert mine.calls == ["made", "pause", "lost"]


@pytest.mark.parametrize("when", ["open", "flushing", "lingering"])
async def test_reset_transport_is_a_reset_at_the_peer(when: str) -> None:
    go_on = threading.Event()

    def peer(tls: ssl.SSLSocket) -> None:
        assert go_on.wait(PATIENCE)
        with raw_of(tls) as raw:
            while raw.recv(65_536):
                pass

    mine = Recorder()
    transport, thread = await against("server", mine, peer, sockets=tcp(send_buffer=8192, receive_buffer=8192))
    if when == "flushing":
        transport.write(MUCH)
    if when != "open":
        transport.close()
        assert when in repr(transport)
    reset_transport(transport)
    reset_transport(transport)
    go_on.set()
    if when == "lingering":  # its FIN was there before
        await asyncio.gather(thread, return_exceptions=True)
    else:
        with pytest.raises(ConnectionResetError):
            await thread
    assert await mine.end() is None


# -- the peer's end ---------------------------------------------------------------------------------------------------


@both_sides
@both_protocols
@pytest.mark.parametrize("size", [0, 100, 120_000, 2_000_000])
async def test_a_peer_that_ends_in_order_while_we_are_paused(
    ours: str, kind: Callable[..., Recorder], size: int
) -> None:
    sent = asyncio.Event()
    loop = asyncio.get_running_loop()

    def peer(tls: ssl.SSLSocket) -> bytes:
        if size < 500_000:  # as much as the kernels hold
            tls.sendall(MUCH[:size])
            loop.call_soon_threadsafe(sent.set)
        else:
            loop.call_soon_threadsafe(sent.set)
            tls.sendall(MUCH[:size])
        tls.unwrap().shutdown(socket.SHUT_WR) if size else tls.unwrap().close()
        return b""

    mine = kind(pause=True)
    transport, thread = await against(ours, mine, peer)
    await sent.wait()
    await asyncio.sleep(0.02)
    assert mine.calls == ["made"]
    assert mine.data == b""
    transport.resume_reading()
    assert await mine.end() is None
    assert mine.data == MUCH[:size]
    assert mine.calls == ["made", "eof", "lost"]
    await thread


@both_sides
@both_protocols
@pytest.mark.parametrize("size", [0, 100, 120_000])
async def test_a_connection_that_just_ends_while_we_are_paused(
    ours: str, kind: Callable[..., Recorder], size: int
) -> None:
    def peer(tls: ssl.SSLSocket) -> None:
        tls.sendall(MUCH[:size])
        raw_of(tls).close()

    mine = kind(pause=True)
    transport, thread = await against(ours, mine, peer)
    await thread
    assert mine.data == b""
    transport.resume_reading()
    assert isinstance(await mine.end(), ConnectionAbortedError)
    assert mine.data == MUCH[:size]
    assert mine.calls == ["made", "lost"], "a cut is no end"


@both_sides
@pytest.mark.parametrize("size", [0, 100, 600_000])
async def test_a_reset_of_the_peer_is_an_error(ours: str, size: int) -> None:
    """Bytes and RST may be one event; uvloop tells of that only once."""

    def peer(tls: ssl.SSLSocket) -> None:
        tls.sendall(MUCH[:size])
        with raw_of(tls) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    mine = Recorder(pause=size == 100)
    transport, thread = await against(ours, mine, peer)
    await thread
    transport.resume_reading()
    assert isinstance(await mine.end(), ConnectionResetError)
    assert mine.data == MUCH[: len(mine.data)]
    assert size > 100 or len(mine.data) == size
    assert mine.calls == ["made", "lost"]


@both_protocols
@pytest.mark.parametrize("in_order", [True, False])
async def test_what_the_peer_said_before_it_left_is_delivered(kind: Callable[..., Recorder], in_order: bool) -> None:
    """The peer sends, ends and closes while our side is paused and writes: all is delivered, and then the loss is told.

    All of that fits into our kernel's buffer: what a reset finds in the peer's buffer is lost for any reader.
    """
    said = MUCH[:40_000]

    def peer(tls: ssl.SSLSocket) -> None:
        tls.sendall(said)
        if in_order:
            try:
                tls.setblocking(False)
                tls.unwrap()
            except ssl.SSLWantReadError:
                pass
        raw_of(tls).close()

    mine = kind(pause=True)
    transport, thread = await against("server", mine, peer)
    await thread
    async with asyncio.timeout(PATIENCE):
        while transport._failed is None:
            transport.write(b"are you there?")
            await asyncio.sleep(0.001)
    assert mine.calls == ["made"]
    transport.write(MUCH)  # into the void
    assert transport.get_write_buffer_size() == 0
    transport.resume_reading()
    error = await mine.end()
    assert bytes(mine.data) == said, len(mine.data)
    if in_order:
        assert error is None
        assert mine.calls == ["made", "eof", "lost"]
    else:
        assert isinstance(error, ConnectionError)
        assert mine.calls == ["made", "lost"]


async def test_one_that_reads_no_further_until_it_has_written_does_not_wait_for_ever() -> None:
    """An echo, whose reading waits for its writing, which fails."""

    class Echo(Recorder):
        def pause_writing(self) -> None:
            super().pause_writing()
            self.made.result().pause_reading()

        def resume_writing(self) -> None:
            super().resume_writing()
            self.made.result().resume_reading()

    go_on = threading.Event()

    def peer(tls: ssl.SSLSocket) -> None:
        assert go_on.wait(PATIENCE)
        tls.sendall(MUCH[:50_000])

    mine = Echo()
    transport, thread = await against("server", mine, peer, sockets=tcp(send_buffer=8192, receive_buffer=8192))
    transport.write(MUCH)
    assert mine.calls == ["made", "pause"]
    go_on.set()
    await thread
    assert isinstance(await mine.end(), ConnectionError)
    assert mine.calls in (["made", "pause", "resume", "lost"], ["made", "pause", "lost"])


async def test_a_protocol_that_stays_after_the_peers_goodbye() -> None:
    """`eof_received` is true: our direction goes on; what the peer sends outside of TLS is not kept."""
    loop = asyncio.get_running_loop()
    noisy, over = asyncio.Event(), asyncio.Event()

    def peer(tls: ssl.SSLSocket) -> bytes:
        tls.sendall(b"that is all")
        try:
            tls.setblocking(False)
            tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        with raw_of(tls) as raw:
            raw.sendall(b"\0" * 3_000_000)
            raw.shutdown(socket.SHUT_WR)
            loop.call_soon_threadsafe(noisy.set)
            size = 0
            while piece := raw.recv(65_536):
                size += len(piece)
            loop.call_soon_threadsafe(over.set)
            return str(size).encode()

    mine = Recorder(keep_open=True)
    transport, thread = await against("client", mine, peer)
    await mine.until(lambda: "eof" in mine.calls)
    assert mine.data == b"that is all"
    await noisy.wait()
    await asyncio.sleep(0.02)
    assert transport._incoming.pending < 300_000, "one read at most"
    assert not transport.is_closing()
    transport.write(MUCH[:200_000])
    transport.close()
    assert int(await thread) > 200_000
    assert await mine.end() is None
    assert mine.calls == ["made", "eof", "lost"]


@both_sides
async def test_a_cut_comes_behind_every_byte_and_is_no_end(ours: str) -> None:
    """What was written arrives, also at a slow reader; then the peer sees a reset, not close_notify and not FIN."""
    started = threading.Event()

    def peer(tls: ssl.SSLSocket) -> tuple[int, str]:
        assert started.wait(10)
        size = 0
        try:
            while data := tls.recv(65536):
                size += len(data)
        except (ConnectionResetError, ssl.SSLEOFError):  # OpenSSL has two words for it
            return size, "cut"
        return size, "end"

    mine = Recorder()
    transport, thread = await against(ours, mine, peer)
    transport.write(MUCH)
    transport.cut()
    started.set()
    assert await thread == (len(MUCH), "cut")
    assert await mine.end() is None

"""Splices over real sockets: half-close, resets, backpressure, and a cut that never looks like the end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import ssl
import struct
import weakref
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from arcbridge.errors import ConnectionLost, StreamReset
from arcbridge.mux import buffer
from arcbridge.mux.splice import SocketSplice, SpliceResult, TransportSplice, reset_transport
from arcbridge.mux.stream import WRITE_HIGH
from arcbridge.tasks import cancel_and_wait
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.limits import Limits
from tests.mux.ends import both_links, connected, read_until_cut, soon, tcp_pair, tls_contexts
from tests.support.books import unconsumed
from tests.support.stream_io import StreamIO

pytestmark = pytest.mark.usefixtures("faults", "poisoned")


async def read_all(sock: socket.socket) -> bytes:
    out = b""
    while piece := await asyncio.get_running_loop().sock_recv(sock, 262_144):
        out += piece
    return out


async def send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


def cut(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Way:
    """near socket = splice = stream = splice = far socket; the test has the outer ends."""

    def __init__(self) -> None:
        self.near: socket.socket
        self.far: socket.socket
        self.results: dict[str, SpliceResult] = {}
        self.streams: list[Any] = []

    async def done(self) -> tuple[SpliceResult, SpliceResult]:
        await soon(lambda: len(self.results) == 2)
        return self.results["near"], self.results["far"]


async def make_way(ends: Any) -> Way:
    way = Way()
    way.near, near_inner = await tcp_pair()
    way.far, far_inner = await tcp_pair()

    def note(side: str) -> Any:
        def done(result: SpliceResult) -> None:
            assert side not in way.results, "told twice"
            way.results[side] = result

        return done

    ends.agent_handler.make = lambda: SocketSplice(far_inner, note("far"))
    way.streams.append(ends.client.open("tcp:db", SocketSplice(near_inner, note("near"))))
    await ends.agent_handler.opened.get()
    return way


@asynccontextmanager
async def a_way(link: str = "memory", **kwargs: Any) -> Any:
    async with connected(link, **kwargs) as ends:
        way = await make_way(ends)
        try:
            yield ends, way
        finally:
            way.near.close()
            way.far.close()
            await way.done()


@both_links
async def test_half_close_passes_both_ways(link: str) -> None:
    async with a_way(link) as (_, way):
        up, down = b"u" * 3_000_000, b"d" * 4_000_000
        _, got = await asyncio.gather(send(way.near, up), _exactly(way.far, len(up)))
        assert got == up
        way.near.shutdown(socket.SHUT_WR)
        assert await read_all(way.far) == b"", "FIN passes as FIN"
        assert not way.results
        sending = asyncio.ensure_future(send(way.far, down))
        assert await _exactly(way.near, len(down)) == down
        await sending
        way.far.shutdown(socket.SHUT_WR)
        assert await read_all(way.near) == b""
        near, far = await way.done()
        assert near == SpliceResult(len(down), len(up), None)
        assert far == SpliceResult(len(up), len(down), None)


async def test_a_stream_that_is_over_does_not_wait_for_the_garbage_collector() -> None:
    async with a_way() as (_, way):
        stream = weakref.ref(way.streams.pop())
        gc.disable()
        try:
            way.near.shutdown(socket.SHUT_WR)
            assert await read_all(way.far) == b""
            way.far.shutdown(socket.SHUT_WR)
            await way.done()
            await soon(lambda: stream() is None)
        finally:
            gc.enable()


async def _exactly(sock: socket.socket, count: int) -> bytes:
    out = b""
    while len(out) < count:
        piece = await asyncio.get_running_loop().sock_recv(sock, 262_144)
        assert piece, "ended early"
        out += piece
    return out


@pytest.mark.parametrize("sent_by", ["near", "far"])
@pytest.mark.parametrize("after", ["nothing", "bytes", "half-close"])
async def test_a_reset_passes_as_a_reset(sent_by: str, after: str) -> None:
    async with a_way("tls") as (ends, way):
        here, there = (way.near, way.far) if sent_by == "near" else (way.far, way.near)
        if after == "bytes":
            await send(here, b"part")
            assert await _exactly(there, 4) == b"part"
        elif after == "half-close":
            there.shutdown(socket.SHUT_WR)
            assert await read_all(here) == b""
        cut(here)
        with pytest.raises(ConnectionResetError):
            await read_all(there)
        for result in await way.done():
            assert result.error is not None
        await soon(lambda: len(ends.client.streams) == 0)


@pytest.mark.parametrize("how", ["stream reset", "session close", "session abort", "connection cut"])
async def test_a_cut_of_the_middle_resets_both_sockets(how: str) -> None:
    async with a_way("tls", limits=Limits(replay=0)) as (ends, way):
        await send(way.near, b"part")
        assert await _exactly(way.far, 4) == b"part"
        if how == "stream reset":
            way.streams[0].abort(ResetCode.TRUNCATED)
        elif how == "session close":
            ends.agent.close(GoawayCode.REVOKED, "revoked")
        elif how == "session abort":
            ends.client.abort()
        else:
            ends.agent.transport.abort()
        for sock in (way.near, way.far):
            with pytest.raises(ConnectionResetError):
                await read_all(sock)
        for result in await way.done():
            assert result.error is not None
            if how == "stream reset":
                assert isinstance(result.error, StreamReset)


async def test_an_end_of_the_session_after_both_ends_were_complete_is_no_cut() -> None:
    async with a_way("tls") as (ends, way):
        await send(way.near, b"question")
        way.near.shutdown(socket.SHUT_WR)
        assert await read_all(way.far) == b"question"
        await send(way.far, b"answer")
        way.far.close()
        assert await read_all(way.near) == b"answer"
        near, far = await way.done()
        assert near.error is None
        assert far.error is None
        ends.client.abort()


@pytest.mark.parametrize("frozen", ["far", "near"])
async def test_a_frozen_reader_bounds_what_is_taken_from_the_writer(frozen: str) -> None:
    limits = Limits(max_stream_window=512 * 1024)
    async with a_way("memory", limits=limits) as (ends, way):
        reader, writer = (way.far, way.near) if frozen == "far" else (way.near, way.far)
        receiver = ends.agent if frozen == "far" else ends.client
        writing, _ = await stuck(lambda data: send(writer, data))
        # The socket buffers, the windows and one read; nothing grows any more.
        assert 100_000 < unconsumed(receiver._machine) <= 512 * 1024
        keystroke = await make_way(ends)
        await send(keystroke.near, b"k")
        assert await _exactly(keystroke.far, 1) == b"k", "a frozen stream stalls no other"
        keystroke.near.close()
        keystroke.far.close()
        await keystroke.done()
        before = receiver.stats.bytes_received
        await _exactly(reader, 8_000_000)
        assert receiver.stats.bytes_received > before, "it goes on"
        await cancel_and_wait(writing)
        cut(writer)


async def stuck(write: Callable[[bytes], Awaitable[object]]) -> tuple[asyncio.Task[None], int]:
    """Write until nothing moves any more: the writer, which waits, and the bytes that it has written."""
    sent, last = 0, -1

    async def flood() -> None:
        nonlocal sent
        while True:
            await write(b"f" * 100_000)
            sent += 100_000

    writing = asyncio.create_task(flood())
    while last != sent:
        last = sent
        await asyncio.sleep(0.1)
    assert not writing.done()
    return writing, last


# -- TransportSplice --------------------------------------------------------------------------------------------------


class Outer:
    """A program's TLS (or plain) connection to a splice, whose stream's other end is awaitable."""

    def __init__(self) -> None:
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter
        self.far: StreamIO
        self.splice: TransportSplice
        self.results: list[SpliceResult] = []

    async def result(self) -> SpliceResult:
        await soon(lambda: self.results)
        assert len(self.results) == 1
        return self.results[0]


class Local(asyncio.Protocol):
    """Stands for the local endpoint: it reads a first piece, then hands the transport over."""

    def __init__(self, ends: Any, outer: Outer, opened: asyncio.Event) -> None:
        self.ends, self.outer, self.opened = ends, outer, opened

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert data == b"first"
        self.transport.pause_reading()
        self.outer.splice = TransportSplice(self.transport, self.outer.results.append)
        self.ends.client.open("kubernetes", self.outer.splice.stream_side)
        self.outer.splice.start(data)
        self.opened.set()


@pytest.mark.parametrize("size", [1, 50_000, 600_000])
async def test_bytes_that_come_together_with_a_reset(size: int) -> None:
    """uvloop tells of a socket in error once, bytes or not: the stream must not stay open for ever."""
    async with connected("memory") as ends:
        near, far = await tcp_pair()
        results: list[SpliceResult] = []
        await send(far, b"x" * size)  # it fits into the kernel's buffers
        cut(far)
        ends.client.open("tcp:test", SocketSplice(near, results.append))
        theirs = await ends.agent_handler.opened.get()
        received, _ = await read_until_cut(theirs)
        assert set(received) <= {ord("x")}
        await soon(lambda: bool(results))
        assert results[0].error is not None


async def test_what_a_program_said_before_travels_with_open() -> None:
    async with connected("memory") as ends:
        near, far = await tcp_pair()
        results: list[SpliceResult] = []
        await send(far, b"x" * 100)
        stream = ends.client.open("tcp:test", splice := SocketSplice(near, results.append))
        splice.read_on()
        assert stream.bytes_sent == 100, "within the call, and so within the flush that sends OPEN"
        cut(far)
        await soon(lambda: bool(results))


async def test_a_socket_at_its_end_is_not_read_while_bytes_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its stream is over: it stays open until it has taken them, readable all the time."""
    async with connected("memory") as ends:
        near, far = await tcp_pair()
        results: list[SpliceResult] = []
        stream = ends.client.open("tcp:test", splice := SocketSplice(near, results.append))
        splice.view_received(memoryview(bytes(16 << 20)))
        monkeypatch.setattr(stream, "is_closing", lambda: True)
        far.shutdown(socket.SHUT_WR)
        await soon(lambda: splice._read_over)
        assert not splice._reading
        cut(far)
        stream.abort()
        await soon(lambda: bool(results))


async def test_m9_a_reset_socket_is_read_no_faster_than_its_stream_takes() -> None:
    """The kernel holds megabytes when the reset comes: they stay there while the peer takes none, and none is lost."""
    size = 2 << 20
    limits = Limits(stream_window=64 * 1024, max_stream_window=64 * 1024)
    async with connected("memory", limits=limits) as ends:
        near, far = await tcp_pair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        results: list[SpliceResult] = []
        await send(far, b"x" * size)
        cut(far)
        ends.client.open("tcp:test", splice := SocketSplice(near, results.append))
        theirs = await ends.agent_handler.opened.get()
        theirs.transport.pause_reading()
        await soon(lambda: ends.client.backlog.held > 0)
        splice._read_the_rest(ConnectionResetError())
        for _ in range(50):
            await asyncio.sleep(0)
        assert ends.client.backlog.held < 3 * buffer.SIZE
        assert not results
        theirs.transport.resume_reading()
        received, _ = await read_until_cut(theirs)
        assert len(received) == size
        await soon(lambda: bool(results))
        assert results[0].error is not None


@asynccontextmanager
async def an_outer(tls: bool, *, link: str = "memory", **kwargs: Any) -> Any:
    server_context, client_context = tls_contexts()
    async with connected(link, **kwargs) as ends:
        outer, opened = Outer(), asyncio.Event()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: Local(ends, outer, opened), "127.0.0.1", 0, ssl=server_context if tls else None
        )
        address = server.sockets[0].getsockname()
        outer.reader, outer.writer = await asyncio.open_connection(
            *address, ssl=client_context if tls else None, server_hostname="agent.test" if tls else None
        )
        outer.writer.write(b"first")
        await opened.wait()
        outer.far = await ends.agent_handler.opened.get()
        assert await outer.far.read_exactly(5) == b"first"
        try:
            yield ends, outer
        finally:
            if outer.far.transport is not None:
                outer.far.transport.abort()
            outer.writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):  # some tests cut it
                await outer.writer.wait_closed()
            await outer.result()
            server.close()
            await server.wait_closed()


both_kinds = pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])


@both_kinds
@both_links
async def test_bytes_pass_both_ways(tls: bool, link: str) -> None:
    async with an_outer(tls, link=link) as (_, outer):
        data = bytes(range(256)) * 8_000

        async def up() -> None:
            for at in range(0, len(data), 100_000):
                outer.writer.write(data[at : at + 100_000])
                await outer.writer.drain()

        async def down() -> None:
            for at in range(0, len(data), 100_000):
                await outer.far.write(data[at : at + 100_000])

        there, back, _, _ = await asyncio.gather(
            outer.far.read_exactly(len(data)), outer.reader.readexactly(len(data)), up(), down()
        )
        assert there == back == data


@both_kinds
async def test_the_programs_end_is_the_streams_end(tls: bool) -> None:
    async with an_outer(tls) as (_, outer):
        outer.writer.write(b"x" * 500_000)
        outer.writer.close()
        assert await outer.far.read_all() == b"x" * 500_000
        if not tls:
            outer.far.finish()
        result = await outer.result()
        assert result == SpliceResult(0, 500_005, None)


@both_kinds
@pytest.mark.parametrize("size", [300_000, 600_000, 3_000_000])
async def test_a_program_that_ends_while_the_stream_is_full_loses_nothing_unnoticed(tls: bool, size: int) -> None:
    async with an_outer(tls, limits=Limits(max_stream_window=256 * 1024)) as (_, outer):
        outer.far.transport.pause_reading()
        outer.writer.write(b"x" * size)
        outer.writer.close()
        await asyncio.sleep(0.2)  # the stream is full by then, and nothing more may be read of the program
        reading = asyncio.ensure_future(outer.far.read_all())
        outer.far.transport.resume_reading()
        try:
            got = len(await reading)
        except StreamReset:
            got = -1  # a loss that is told is no loss unnoticed
        assert got in (size, -1)
        if not tls:
            assert got == size


@both_kinds
async def test_the_streams_end_is_the_programs_end(tls: bool) -> None:
    async with an_outer(tls) as (_, outer):
        await outer.far.write(b"y" * 500_000)
        outer.far.finish()
        assert await outer.reader.read() == b"y" * 500_000
        outer.writer.close()
        assert await outer.far.read_all() == b"", "no reset: nothing was cut"
        assert await outer.result() == SpliceResult(500_000, 5, None)


async def test_the_streams_end_together_with_that_of_the_session_is_the_programs_end() -> None:
    async with an_outer(True, link="tls") as (ends, outer):
        assert outer.far.transport is not None
        ends.client.transport.pause_reading()  # so that both come in one read
        outer.far.transport.write(b"the reason")
        outer.far.transport.close()
        ends.agent.close(GoawayCode.EXPIRED, "the token has expired")
        await ends.agent.wait_ended()
        ends.client.transport.resume_reading()
        assert await outer.reader.read() == b"the reason"


@both_kinds
async def test_a_splice_ends_with_a_last_word(tls: bool) -> None:
    """Towards the stream alone: the program is cut."""
    async with an_outer(tls) as (_, outer):
        outer.splice.finish_with(b"the reason")
        assert await outer.far.read_all() == b"the reason"
        with pytest.raises(ConnectionResetError):
            await outer.reader.read()
        assert await outer.result() == SpliceResult(0, 15, None)


async def test_plain_half_close_passes() -> None:
    async with an_outer(False) as (_, outer):
        outer.writer.write_eof()
        assert await outer.far.read_all() == b""
        await outer.far.write(b"z" * 800_000)
        outer.far.finish()
        assert await outer.reader.read() == b"z" * 800_000
        assert (await outer.result()).error is None


async def test_a_tls_connection_that_ends_without_close_notify_is_a_cut() -> None:
    async with an_outer(True) as (_, outer):
        outer.writer.write(b"upload, first half")
        await outer.writer.drain()
        assert await outer.far.read_exactly(18) == b"upload, first half"
        with socket.socket(fileno=os.dup(outer.writer.get_extra_info("socket").fileno())) as sock:
            sock.shutdown(socket.SHUT_WR)
        with pytest.raises(StreamReset) as caught:
            await outer.far.read()
        assert caught.value.code == ResetCode.TRUNCATED


@both_kinds
async def test_a_program_that_resets_is_a_cut(tls: bool) -> None:
    async with an_outer(tls) as (_, outer):
        reset_transport(outer.writer.transport)
        with pytest.raises(StreamReset):
            await outer.far.read()
        assert (await outer.result()).error is not None or tls


@both_kinds
@pytest.mark.parametrize("how", ["reset", "session", "reset behind bytes"])
async def test_a_stream_that_is_cut_is_never_the_programs_end(tls: bool, how: str) -> None:
    async with an_outer(tls, limits=Limits(replay=0)) as (ends, outer):
        await outer.far.write(b"download, first half")
        if how != "reset behind bytes":
            assert await outer.reader.readexactly(20) == b"download, first half"
        if how == "session":
            ends.agent.abort()
        else:
            outer.far.reset(ResetCode.TRUNCATED)
        with pytest.raises((ConnectionResetError, ssl.SSLError)):
            await outer.reader.read()
        result = await outer.result()
        assert isinstance(result.error, StreamReset | ConnectionLost)


@both_kinds
async def test_a_program_that_does_not_read_bounds_the_stream(tls: bool) -> None:
    async with an_outer(tls, limits=Limits(max_stream_window=512 * 1024)) as (ends, outer):
        outer.writer.transport.pause_reading()
        writing, sent = await stuck(outer.far.write)
        assert unconsumed(ends.client._machine) <= 512 * 1024
        assert outer.splice.outer.get_write_buffer_size() < 1024 * 1024
        outer.writer.transport.resume_reading()
        await outer.reader.readexactly(sent)
        await cancel_and_wait(writing)


@both_kinds
async def test_a_stream_that_is_not_read_bounds_the_program(tls: bool) -> None:
    async with an_outer(tls, limits=Limits(max_stream_window=512 * 1024)) as (ends, outer):
        outer.far.transport.pause_reading()

        async def write(data: bytes) -> None:
            outer.writer.write(data)
            await outer.writer.drain()

        writing, sent = await stuck(write)
        stream = next(iter(ends.client._machine.streams.values()))
        assert stream.queued < 1024 * 1024
        outer.far.transport.resume_reading()
        assert await outer.far.read_exactly(sent)
        await cancel_and_wait(writing)


async def test_starting_on_a_transport_that_is_gone() -> None:
    async with connected("memory") as ends:
        near, far = await tcp_pair()
        running = asyncio.get_running_loop()
        transport, _ = await running.connect_accepted_socket(asyncio.Protocol, near)
        transport.abort()
        for _ in range(10):
            await asyncio.sleep(0)
        results: list[SpliceResult] = []
        splice = TransportSplice(transport, results.append)
        ends.client.open("kubernetes", splice.stream_side)
        splice.start(b"first")
        theirs = await ends.agent_handler.opened.get()
        with pytest.raises(StreamReset):
            await theirs.read_all()
        assert len(results) == 1
        far.close()


async def test_starting_with_more_than_the_stream_takes_reads_no_more() -> None:
    async with connected("memory") as ends:
        near, far = await tcp_pair()
        running = asyncio.get_running_loop()
        transport, _ = await running.connect_accepted_socket(asyncio.Protocol, near)
        transport.pause_reading()
        splice = TransportSplice(transport)
        ends.client.open("kubernetes", splice.stream_side)
        splice.start(b"x" * (2 * WRITE_HIGH))
        assert not transport.is_reading()
        theirs = await ends.agent_handler.opened.get()
        assert await theirs.read_exactly(2 * WRITE_HIGH) == b"x" * (2 * WRITE_HIGH)
        await soon(transport.is_reading)
        transport.abort()
        far.close()

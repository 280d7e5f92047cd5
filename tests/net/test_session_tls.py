"""The end-to-end TLS of sessions: over aiofastnet and over the loop's own, the same promises."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import socket
import ssl
import struct
import tempfile
import threading

import aiofastnet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcbridge.errors import ConnectionLost
from arcbridge.loop_shares import LoopShares, LoopTime, no_call
from arcbridge.mux import buffer
from arcbridge.mux.connection import MuxConnection
from arcbridge.net import fast_tls as fast_tls_module
from arcbridge.net import session_tls
from arcbridge.net.fast_tls import fast_tls
from arcbridge.net.session_tls import accept_session, connect_session
from arcbridge.wire.limits import Limits
from tests.mux.ends import LOOPS, Ends, make_sessions, run, tcp_pair, tls_contexts
from tests.support.stream_io import StreamIO

ENGINES = ("aiofastnet", "loop")
DEADLINE = 5.0


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose TLS serves the sessions of a test."""
    name: str = request.param
    if name == "loop":
        for module in (session_tls, fast_tls_module):  # of the agent, and of the client
            monkeypatch.setattr(module, "fast_tls", lambda: None)
    else:
        assert fast_tls() is aiofastnet, "aiofastnet is there, and directly on this Python's OpenSSL"
    return name


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A view of the receive buffer that is used too late holds wrong bytes."""
    monkeypatch.setattr(buffer, "POISON", True)


async def joined(ends: Ends, payer: LoopTime | None = None) -> tuple[socket.socket, socket.socket]:
    """Connect both sessions over TLS; (client's socket, agent's)."""
    server, client = tls_contexts()
    near, far = await tcp_pair()
    await asyncio.gather(
        accept_session(far, server, ends.agent.protocol(), payer, handshake_deadline=DEADLINE),
        connect_session(near, client, ends.client.protocol(), "agent.test", handshake_deadline=DEADLINE),
    )
    await ends.client.wait_established()
    await ends.agent.wait_established()
    return near, far


@pytest.mark.parametrize("loop", LOOPS)
def test_both_directions_carry_every_byte_and_both_ends_end(engine: str, loop: str) -> None:
    there, back = random.Random(1).randbytes(3_000_000), random.Random(2).randbytes(3_000_000)

    async def main() -> None:
        ends = make_sessions()
        await joined(ends)
        assert (ends.agent.transport.__class__.__module__.startswith("aiofastnet")) is (engine == "aiofastnet")
        mine, theirs = await ends.stream()

        async def send(stream: StreamIO, data: bytes) -> None:
            for start in range(0, len(data), 50_000):
                await stream.write(data[start : start + 50_000])
            stream.finish()

        _, _, came, answered = await asyncio.gather(
            send(mine, there), send(theirs, back), theirs.read_all(), mine.read_all()
        )
        assert hashlib.sha256(came).digest() == hashlib.sha256(there).digest()
        assert hashlib.sha256(answered).digest() == hashlib.sha256(back).digest()
        await ends.stop()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_handshake_is_charged_and_what_comes_later_is_not(engine: str, loop: str) -> None:
    """docs/threats.md#L47. The caller is not known before, and afterwards no reader is measured for it."""
    payer = LoopTime(LoopShares(), no_call)

    async def main() -> None:
        ends = make_sessions()
        await joined(ends, payer)
        mine, theirs = await ends.stream()
        spent = payer.spent
        assert spent > 0.0
        await mine.write(bytes(100_000))
        mine.finish()
        assert len(await theirs.read_all()) == 100_000
        assert payer.spent == spent
        await ends.stop()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_what_was_written_before_the_end_arrives_before_it(engine: str, loop: str) -> None:
    """A megabyte and the session's end in one turn of the loop: the other end gets all of it first."""
    data = random.Random(3).randbytes(1_000_000)

    async def main() -> None:
        ends = make_sessions()
        await joined(ends)
        mine, theirs = await ends.stream()
        await mine.write(data)
        mine.finish()
        ends.client.goaway(0)  # drains: the session ends behind its last stream
        assert await theirs.read_all() == data
        theirs.finish()
        await ends.client.wait_ended()
        await ends.stop()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_reset_behind_the_last_bytes_is_noticed(engine: str, loop: str) -> None:
    """uvloop tells `add_reader` of a socket's error once, together with the bytes before it."""

    async def main() -> None:
        ends = make_sessions(limits=Limits(replay=0))
        server, client = tls_contexts()
        near, far = await tcp_pair()
        far.setblocking(True)
        go = threading.Event()

        def peer() -> None:
            with server.wrap_socket(far, server_side=True) as tls:
                go.wait(10)
                tls.sendall(b"\x00")  # the beginning of a frame: it asks for nothing
                tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

        thread = threading.Thread(target=peer)
        thread.start()
        protocol = ends.client.protocol()
        await connect_session(near, client, protocol, "agent.test", handshake_deadline=DEADLINE)
        go.set()
        thread.join()  # blocks the loop: bytes and reset are both there when it looks
        assert isinstance(await asyncio.wait_for(ends.client.wait_ended(), 5), ConnectionLost)
        ends.agent.abort()
        await ends.agent.wait_ended()
        assert protocol._error_poll is None

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_connection_without_close_notify_is_a_loss(engine: str, loop: str, kind: str) -> None:
    async def main() -> None:
        ends = make_sessions(limits=Limits(replay=0))
        near, _ = await joined(ends)
        mine, theirs = await ends.stream()
        await mine.write(b"part of it")
        assert await theirs.read() == b"part of it"
        if kind == "reset":
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            assert ends.client.transport is not None
            ends.client.transport.abort()
        else:
            near.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionLost):
            await theirs.read()
        assert isinstance(await ends.agent.wait_ended(), ConnectionLost)
        await ends.client.wait_ended()
        await ends.stop()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_untrusted_agent_is_told_as_such(engine: str, loop: str) -> None:
    async def main() -> None:
        ends = make_sessions()
        server, _ = tls_contexts()
        near, far = await tcp_pair()
        stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        accepting = asyncio.ensure_future(
            accept_session(far, server, ends.agent.protocol(), handshake_deadline=DEADLINE)
        )
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect_session(near, stranger, ends.client.protocol(), "agent.test", handshake_deadline=DEADLINE)
        near.close()
        with pytest.raises(OSError):  # noqa: PT011
            await accepting
        far.close()
        assert not ends.client.closed
        for session in (ends.client, ends.agent):
            session.abort()
            await session.wait_ended()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
def test_another_name_in_the_certificate_is_refused(engine: str, loop: str) -> None:
    async def main() -> None:
        ends = make_sessions()
        server, client = tls_contexts()
        near, far = await tcp_pair()
        accepting = asyncio.ensure_future(
            accept_session(far, server, ends.agent.protocol(), handshake_deadline=DEADLINE)
        )
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect_session(near, client, ends.client.protocol(), "other.test", handshake_deadline=DEADLINE)
        near.close()
        with pytest.raises(OSError):  # noqa: PT011
            await accepting
        far.close()
        for session in (ends.client, ends.agent):
            session.abort()
            await session.wait_ended()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("side", ["client", "agent"])
def test_a_peer_that_leaves_within_the_handshake_is_no_fault_of_ours(engine: str, loop: str, side: str) -> None:
    async def main() -> None:
        ends = make_sessions()
        near, far = await tcp_pair()
        task = asyncio.ensure_future(_half(ends, near, side, deadline=DEADLINE))
        await asyncio.sleep(0.01)
        far.close()
        with pytest.raises(OSError):  # noqa: PT011
            await task
        near.close()
        for session in (ends.client, ends.agent):
            session.abort()
            await session.wait_ended()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("side", ["client", "agent"])
def test_a_handshake_that_takes_too_long_fails(engine: str, loop: str, side: str) -> None:
    async def main() -> None:
        ends = make_sessions()
        near, far = await tcp_pair()
        with pytest.raises(OSError):  # noqa: PT011
            await _half(ends, near, side, deadline=0.05)
        near.close()
        far.close()
        for session in (ends.client, ends.agent):
            session.abort()
            await session.wait_ended()

    run(loop, main)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("side", ["client", "agent"])
def test_a_cancelled_handshake_leaves_nothing(engine: str, loop: str, side: str) -> None:
    async def main() -> None:
        ends = make_sessions()
        near, far = await tcp_pair()
        task = asyncio.ensure_future(_half(ends, near, side, deadline=0.3))
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        near.close()
        far.settimeout(5)
        if side == "client":
            assert await asyncio.to_thread(_read_to_end, far), "the ClientHello went out, then the end"
        far.close()
        await asyncio.sleep(0.35)  # aiofastnet's handshake timer outlives the handshake, and does nothing
        for session in (ends.client, ends.agent):
            session.abort()
            await session.wait_ended()

    run(loop, main)


async def _half(ends: Ends, sock: socket.socket, side: str, *, deadline: float) -> None:
    server, client = tls_contexts()
    if side == "client":
        await connect_session(sock, client, ends.client.protocol(), "agent.test", handshake_deadline=deadline)
    else:
        await accept_session(sock, server, ends.agent.protocol(), handshake_deadline=deadline)


def _read_to_end(sock: socket.socket) -> bytes:
    found = b""
    while data := sock.recv(65536):
        found += data
    return found


@pytest.mark.parametrize("loop", LOOPS)
def test_a_session_aborted_within_a_delivery_gets_nothing_more(engine: str, loop: str) -> None:
    """Two full receive buffers are on the way when the first is delivered."""

    async def main() -> None:
        ends = make_sessions(limits=Limits(replay=0))
        await joined(ends)
        counts: list[int] = []

        class Aborting(asyncio.Protocol):
            def view_received(self, view: memoryview) -> None:
                counts.append(len(view))
                ends.agent.abort()

            def connection_lost(self, exc: Exception | None) -> None:
                assert isinstance(exc, ConnectionLost)

        ends.agent_handler.make = Aborting
        mine = StreamIO()
        ends.client.open("kubernetes", mine)
        await ends.agent_handler.opened.get()
        await mine.write(bytes(1_500_000))
        await ends.agent.wait_ended()
        await asyncio.sleep(0.05)
        assert len(counts) == 1
        await ends.client.wait_ended()
        await ends.stop()

    run(loop, main)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300_000), min_size=1, max_size=6),
    fast=st.booleans(),
    loop=st.sampled_from(sorted(LOOPS)),
    half_close_first=st.booleans(),
)
def test_any_writes_come_whole_and_in_order(sizes: list[int], fast: bool, loop: str, half_close_first: bool) -> None:
    parts = [random.Random(n).randbytes(size) for n, size in enumerate(sizes)]

    async def main() -> None:
        ends = make_sessions()
        await joined(ends)
        mine, theirs = await ends.stream()

        async def send(stream: StreamIO, order: list[bytes]) -> None:
            for part in order:
                await stream.write(part)
            if half_close_first or stream is theirs:
                stream.finish()

        _, came = await asyncio.gather(send(mine, parts), theirs.read_exactly(sum(sizes)))
        assert came == b"".join(parts)
        if half_close_first:
            assert await theirs.read() == b""
        _, answered = await asyncio.gather(send(theirs, parts[::-1]), mine.read_all())
        assert answered == b"".join(parts[::-1])
        await ends.stop()

    found = fast_tls() if fast else None
    with pytest.MonkeyPatch.context() as patch:
        for module in (session_tls, fast_tls_module):
            patch.setattr(module, "fast_tls", lambda: found)
        run(loop, main)


# -- which one is chosen ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_the_loop_serves_a_client_without_temporary_files(
    loop: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiofastnet decodes the agent's certificate from a temporary file; without one its handshake never ends."""
    caplog.set_level(logging.DEBUG, "arcbridge.net")
    assert fast_tls() is aiofastnet

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)

    async def main() -> None:
        ends = make_sessions()
        await joined(ends)
        assert not ends.client.transport.__class__.__module__.startswith("aiofastnet")
        mine, theirs = await ends.stream()
        await mine.write(b"x")
        assert await theirs.read() == b"x"
        await ends.stop()

    run(loop, main)
    assert "No space left on device" in caplog.text


def test_a_connection_that_is_gone_is_not_polled() -> None:
    async def main() -> None:
        ends = make_sessions()
        connection = MuxConnection(ends.client)
        connection.poll_for_errors()
        assert connection._error_poll is None
        for session in (ends.client, ends.agent):
            session.abort()
            await session.wait_ended()

    run("asyncio", main)

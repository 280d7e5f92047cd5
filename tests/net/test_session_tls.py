"""The end-to-end TLS of sessions: over aiofastnet and over the loop's own, the same promises."""

from __future__ import annotations

import asyncio
import random
import select
import socket
import ssl
import struct
import sys
import tempfile
import threading
from collections.abc import AsyncIterator

import aiofastnet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcbridge.errors import ConnectionLost
from arcbridge.loop_shares import LoopShares, LoopTime, no_call
from arcbridge.mux.connection import MuxConnection
from arcbridge.net import session_tls
from arcbridge.net.fast_tls import fast_tls
from arcbridge.net.session_tls import SessionStart, accept_session
from arcbridge.net.sockets import receive, send_all
from arcbridge.net.tls import add_trust, inner_client_context
from arcbridge.wire.limits import Limits
from tests.mux.ends import LOOPS, Ends, Faults, make_sessions, run, tcp_pair, tls_authority, tls_contexts
from tests.net.ends import completed_work
from tests.net.tlsends import watched_and_reset
from tests.support.eventually import until
from tests.support.stream_io import StreamIO

pytestmark = pytest.mark.usefixtures("faults", "poisoned")
both_sides = pytest.mark.parametrize("side", ["client", "agent"])
Apart = tuple[Ends, socket.socket, socket.socket]


def readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


@pytest.fixture(params=["aiofastnet", "loop"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose TLS serves the sessions of a test."""
    name: str = request.param
    if name == "loop":
        monkeypatch.setattr(session_tls, "fast_tls", lambda: None)
    else:
        assert fast_tls() is aiofastnet, "aiofastnet is there, and directly on this Python's OpenSSL"
    return name


@pytest.fixture
async def apart(faults: Faults) -> AsyncIterator[tuple[Ends, socket.socket, socket.socket]]:
    """Two sessions and two connected sockets, the client's and the agent's; all are gone in the end."""
    ends = make_sessions()
    near, far = await tcp_pair()
    yield ends, near, far
    near.close()
    far.close()
    for session in (ends.client, ends.agent):
        session.abort()
        await session.wait_ended()


async def half(
    ends: Ends, sock: socket.socket, side: str, payer: LoopTime | None = None, *, deadline: float = 5.0
) -> None:
    """Make the TLS of one end."""
    server, client = tls_contexts()
    if side == "client":
        await SessionStart(sock, client, "agent.test").finish(ends.client.protocol(), deadline)
    else:
        await accept_session(sock, server, ends.agent.protocol(), payer, handshake_deadline=deadline)


async def joined(ends: Ends, payer: LoopTime | None = None) -> tuple[socket.socket, socket.socket]:
    """Connect both sessions over TLS; (client's socket, agent's)."""
    near, far = await tcp_pair()
    await asyncio.gather(half(ends, far, "agent", payer), half(ends, near, "client"))
    await ends.client.wait_established()
    await ends.agent.wait_established()
    return near, far


async def test_the_handshake_is_charged_and_what_comes_later_is_not(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/threats.md#L47. The caller is not known before, and afterwards no reader is measured for it."""
    payer, payers = LoopTime(LoopShares(), no_call), completed_work(monkeypatch)
    ends = make_sessions()
    await joined(ends, payer)
    mine, theirs = await ends.stream()
    spent = payer.spent
    assert spent > 0.0
    assert payer in payers, "its last step, too"
    await mine.write(bytes(100_000))
    mine.finish()
    assert len(await theirs.read_all()) == 100_000
    assert payer.spent == spent
    await ends.stop()


async def test_a_handshake_writes_no_temporary_file(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """aiofastnet decodes the server's certificate from one, and where none can be written its handshake never ends."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    ends = make_sessions()
    async with asyncio.timeout(10):
        await joined(ends)
    await ends.stop()


async def test_what_was_written_before_the_end_arrives_before_it(engine: str) -> None:
    """A megabyte and the session's end in one turn of the loop: the other end gets all of it first."""
    data = random.Random(3).randbytes(1_000_000)
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


async def test_a_reset_behind_the_last_bytes_is_noticed(engine: str) -> None:
    """uvloop tells `add_reader` of a socket's error once, together with the bytes before it."""
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
    await SessionStart(near, client, "agent.test").finish(protocol, 5.0)
    go.set()
    thread.join()  # blocks the loop: bytes and reset are both there when it looks
    assert isinstance(await asyncio.wait_for(ends.client.wait_ended(), 5), ConnectionLost)
    ends.agent.abort()
    await ends.agent.wait_ended()
    assert protocol._error_poll is None


@pytest.mark.parametrize("kind", ["cut", "reset"])
async def test_a_connection_without_close_notify_is_a_loss(engine: str, kind: str) -> None:
    ends = make_sessions(limits=Limits(replay=0))
    near, _ = await joined(ends)
    mine, theirs = await ends.stream()
    await mine.write(b"part of it")
    assert await theirs.read() == b"part of it"
    if kind == "reset":
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        ends.client.transport.abort()
    else:
        near.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionLost):
        await theirs.read()
    assert isinstance(await ends.agent.wait_ended(), ConnectionLost)
    await ends.client.wait_ended()
    await ends.stop()


async def test_a_handshake_that_begins_while_another_reads(engine: str) -> None:
    """Where aiofastnet serves, ClientHello leaves at once. Nothing is read before `finish`, and until then a CA may
    come."""
    ends = make_sessions()
    near, far = await tcp_pair()
    start = SessionStart(near, inner_client_context(), "agent.test")
    start.begin()
    if engine == "aiofastnet":
        await until(lambda: far.recv(3, socket.MSG_PEEK) == b"\x16\x03\x01" if readable(far) else False)
    await send_all(far, b"for another")
    assert await receive(near, 100) == b"for another"
    add_trust(start.context, tls_authority())
    await asyncio.gather(half(ends, far, "agent"), start.finish(ends.client.protocol(), 5.0))
    await ends.client.wait_established()
    await ends.stop()


@pytest.mark.parametrize("turns", [0, 1, 3])
async def test_an_abandoned_handshake_leaves_its_descriptor_alone(engine: str, apart: Apart, turns: int) -> None:
    """The number belongs to another connection as soon as its owner has closed it."""
    _, near, far = apart
    start = SessionStart(near, inner_client_context(), "agent.test")
    start.begin()
    for _ in range(turns):
        await asyncio.sleep(0)
    number = near.fileno()
    start.abandon()
    near.close()
    await left_alone(number)
    assert far.fileno() >= 0


async def left_alone(number: int) -> None:
    """Use the number of a closed socket for another one."""
    mine, theirs = socket.socketpair()
    with mine, theirs:
        assert number in (mine.fileno(), theirs.fileno())
        other, peer = (mine, theirs) if mine.fileno() == number else (theirs, mine)
        other.setblocking(False)
        peer.setblocking(False)
        waiting = asyncio.ensure_future(receive(other, 10))
        for _ in range(5):
            await asyncio.sleep(0)
        await send_all(peer, b"still here")
        assert await asyncio.wait_for(waiting, 5) == b"still here"


@pytest.mark.parametrize("then", ["finish", "abandon"])
async def test_a_handshake_that_fails_while_another_reads(then: str, apart: Apart) -> None:
    """Its deadline may pass while a token is waited for. The socket stays open until its owner closes it."""
    ends, near, _ = apart
    start = SessionStart(near, inner_client_context(), "agent.test")
    start.begin(deadline=0.001)
    await until(lambda: start._handshake is not None and start._handshake.done())
    await asyncio.sleep(0)
    assert near.fileno() >= 0
    if then == "finish":
        with pytest.raises(ConnectionAbortedError):
            await start.finish(ends.client.protocol(), 5.0)
    number = near.fileno()
    start.abandon()
    near.close()
    await left_alone(number)


async def test_a_handshake_that_takes_too_long_is_let_go(apart: Apart) -> None:
    """Its timer, which was to outlast the join, would keep the transport and its buffers for a minute."""
    ends, near, _ = apart
    start = SessionStart(near, inner_client_context(), "agent.test")
    start.begin()
    held = start._held
    assert held is not None
    await until(lambda: held._timer)
    with pytest.raises(TimeoutError):
        await start.finish(ends.client.protocol(), 0.001)
    assert held._timer is not None
    assert held._timer.cancelled()


async def test_a_handshake_that_succeeds_in_the_turn_of_its_cancellation(apart: Apart) -> None:
    """Its transport reaches nobody, and leaves the descriptor alone."""
    ends, near, far = apart
    number, start = near.fileno(), SessionStart(near, inner_client_context(tls_authority()), "agent.test")
    start.begin()
    assert start._handshake is not None
    start._handshake.add_done_callback(lambda _: finishing.cancel())
    finishing = asyncio.ensure_future(start.finish(ends.client.protocol(), 5.0))
    accepting = asyncio.ensure_future(half(ends, far, "agent"))
    with pytest.raises(asyncio.CancelledError):
        await finishing
    assert not start._handshake.cancelled()
    near.close()
    await left_alone(number)
    await asyncio.wait([accepting])


@pytest.mark.parametrize("wrong", ["CA", "name"])
async def test_an_untrusted_agent_is_told_as_such(engine: str, wrong: str, apart: Apart) -> None:
    ends, near, far = apart
    accepting = asyncio.ensure_future(half(ends, far, "agent"))
    trusts, name = tls_contexts()[1], "other.test"
    if wrong == "CA":
        trusts, name = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "agent.test"
    with pytest.raises(ssl.SSLCertVerificationError):
        await SessionStart(near, trusts, name).finish(ends.client.protocol(), 5.0)
    near.close()
    with pytest.raises(OSError):  # noqa: PT011
        await accepting
    assert not ends.client.closed


@both_sides
async def test_a_peer_that_leaves_within_the_handshake_is_no_fault_of_ours(
    engine: str, side: str, apart: Apart
) -> None:
    ends, near, far = apart
    task = asyncio.ensure_future(half(ends, near, side))
    await asyncio.sleep(0.01)
    far.close()
    with pytest.raises(OSError):  # noqa: PT011
        await task


@pytest.mark.skipif(sys.platform == "win32", reason="a descriptor of Windows has no status, and uvloop is not there")
@pytest.mark.parametrize("loop", sorted(LOOPS))
@both_sides
def test_a_peer_that_resets_at_once_has_its_descriptor_closed_once(engine: str, side: str, loop: str) -> None:
    async def main() -> None:
        ends = make_sessions()
        for _ in range(5):
            sock = watched_and_reset()
            with pytest.raises(OSError):  # noqa: PT011
                await half(ends, sock, side)
            sock.close()
            assert not sock.closed_twice
        await ends.stop()

    run(loop, main)


@both_sides
async def test_a_handshake_that_takes_too_long_fails(engine: str, side: str, apart: Apart) -> None:
    ends, near, _ = apart
    with pytest.raises(OSError):  # noqa: PT011
        await half(ends, near, side, deadline=0.05)


@both_sides
async def test_a_cancelled_handshake_leaves_nothing(engine: str, side: str, apart: Apart) -> None:
    ends, near, far = apart
    task = asyncio.ensure_future(half(ends, near, side, deadline=0.3))
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    near.close()
    far.settimeout(5)
    if side == "client":
        with far.makefile("rb") as file:
            assert await asyncio.to_thread(file.read), "the ClientHello went out, then the end"
    await asyncio.sleep(0.35)  # aiofastnet's handshake timer outlives the handshake, and does nothing


async def test_a_session_aborted_within_a_delivery_gets_nothing_more(engine: str) -> None:
    """Two full receive buffers are on the way when the first is delivered."""
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
        assert (ends.agent.transport.__class__.__module__.startswith("aiofastnet")) is fast
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
        patch.setattr(session_tls, "fast_tls", lambda: found)
        run(loop, main)


async def test_a_connection_that_is_gone_is_not_polled(apart: Apart) -> None:
    connection = MuxConnection(apart[0].client)
    connection.poll_for_errors()
    assert connection._error_poll is None

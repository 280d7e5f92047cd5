"""The pump over real sockets: what goes in comes out; FIN as FIN, RST as RST, a cut as a cut (docs/threats.md#J9,
#J10, #J18, #R4, #R6).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable

import pytest

from arcbridge.identity.claims import Identity
from arcbridge.loop_shares import LoopTime
from arcbridge.mux import buffer
from arcbridge.net.sockets import receive, reset, send_all
from arcbridge.net.tls import ALPN_JOIN
from arcbridge.relay.pipes import CAPACITY, PipePool
from arcbridge.relay.pump import BUDGET, HELD, SAMPLE, Pump, Pumps
from arcbridge.wire.frames import FrameType, frame
from arcbridge.wire.limits import DEFAULT
from tests.net.ends import client_context, server_contexts, tcp_pair
from tests.relay.station import exactly
from tests.support.eventually import until

MIB = 1 << 20
TCP_CLOSE = 7


class Bench:
    """Pumps, and the four sockets of each pair: client end, relay's two, agent end."""

    def __init__(self, pipes: PipePool | None = None) -> None:
        self.ended: list[Pump] = []
        self.arrived = asyncio.Event()
        self.pumps = Pumps(self._done, pipes=pipes)
        self.ends: list[socket.socket] = []

    def _done(self, pump: Pump) -> None:
        self.ended.append(pump)
        self.arrived.set()

    async def pair(self, user: str = "", **left_over: bytes) -> tuple[socket.socket, socket.socket, Pump]:
        client, relay_client = await tcp_pair()
        agent, relay_agent = await tcp_pair()
        self.ends += [client, agent]
        identity = Identity(user, "", (), f"i#{user}", "i", 0.0) if user else None
        pump = self.pumps.join(relay_client, relay_agent, cluster="prod", identity=identity, **left_over)
        return client, agent, pump

    def over(self, pump: Pump, seconds: float) -> None:
        """Say that the payer of `pump` took more than its share."""
        pump.payer.held_until = time.monotonic() + seconds
        pump.payer.on_over(seconds)

    async def end(self) -> Pump:
        async with asyncio.timeout(5):
            await self.arrived.wait()
        self.arrived.clear()
        return self.ended[-1]


@pytest.fixture(params=["splice", "copy"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    before = len(os.listdir("/proc/self/fd"))
    made = Bench(PipePool() if request.param == "splice" else PipePool(0))
    yield made
    made.pumps.close()
    for end in made.ends:
        end.close()
    assert len(made.pumps) == 0
    assert made.pumps.pipes.open == 0
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_a_pair_that_cannot_begin_is_closed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sock: socket.socket, **values: int) -> None:
        raise OSError("no memory for it")

    monkeypatch.setattr("arcbridge.relay.pump.set_keepalive", fail)
    with pytest.raises(OSError, match="no memory"):
        await bench.pair("ann")
    assert len(bench.pumps) == 0
    for end in bench.ends:
        with pytest.raises(ConnectionResetError):
            await receive(end, 1)


async def read_all(sock: socket.socket, size: int = 1 << 18) -> tuple[int, str]:
    digest, count = hashlib.sha256(), 0
    while data := await receive(sock, size):
        digest.update(data)
        count += len(data)
    return count, digest.hexdigest()


async def send_in_pieces(sock: socket.socket, data: bytes, piece: Callable[[], int]) -> None:
    at = 0
    while at < len(data):
        size = piece()
        await send_all(sock, data[at : at + size])
        at += size
    sock.shutdown(socket.SHUT_WR)


async def test_both_directions_at_once_are_equal(bench: Bench) -> None:
    client, agent, pump = await bench.pair()
    up, down = random.Random(1).randbytes(24 * MIB), random.Random(2).randbytes(24 * MIB)
    draw = random.Random(3)
    results = await asyncio.gather(
        send_in_pieces(client, up, lambda: draw.choice([1, 100, 5000, 60_000, 300_000])),
        send_in_pieces(agent, down, lambda: 1 << 18),
        read_all(agent),
        read_all(client, 10_000),
    )
    assert results[2:] == [(len(up), hashlib.sha256(up).hexdigest()), (len(down), hashlib.sha256(down).hexdigest())]
    assert await bench.end() is pump
    assert pump.error is None
    assert (pump.bytes_to_agent, pump.bytes_to_client) == (len(up), len(down))
    assert bench.pumps.bytes() == (len(up), len(down))


@pytest.mark.parametrize("first", ["client", "agent"])
async def test_half_close_passes_after_the_last_byte(bench: Bench, first: str) -> None:
    client, agent, pump = await bench.pair()
    near, far = (client, agent) if first == "client" else (agent, client)
    await send_all(near, b"question")
    near.shutdown(socket.SHUT_WR)
    assert await read_all(far) == (8, hashlib.sha256(b"question").hexdigest())
    answer = random.Random(4).randbytes(64 * MIB)
    _, received = await asyncio.gather(send_in_pieces(far, answer, lambda: 1 << 20), read_all(near))
    assert received == (len(answer), hashlib.sha256(answer).hexdigest())
    await bench.end()
    assert pump.error is None
    assert pump.bytes_to_agent + pump.bytes_to_client == 8 + len(answer)


@pytest.mark.parametrize("first", ["client", "agent"])
async def test_a_reset_passes_as_a_reset(bench: Bench, first: str) -> None:
    client, agent, pump = await bench.pair()
    near, far = (client, agent) if first == "client" else (agent, client)
    await send_all(near, b"part")
    assert await exactly(far, 4) == b"part"
    reset(near)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(receive(far, 10), 5)
    assert await bench.end() is pump
    assert pump.error is not None


async def test_a_reset_after_half_close_is_found_by_the_sweep(bench: Bench) -> None:
    client, agent, pump = await bench.pair()
    client.shutdown(socket.SHUT_WR)
    assert await receive(agent, 10) == b""
    reset(client)
    assert await bench.end() is pump
    assert pump.error is not None
    # The agent has read the client's FIN already, so the reset shows at its next write.
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        await send_all(agent, b"answer")


def held_by(pump: Pump) -> int:
    """Count the bytes that were read from one end and not yet taken by the other."""
    return sum(len(one._memory) + one._piped for one in (pump._to_agent, pump._to_client))


async def fill(sock: socket.socket, pump: Pump) -> None:
    """Send until neither the kernel nor the pump takes more."""
    idle = 0
    while idle < 5:
        try:
            sock.send(bytes(MIB))
            idle = 0
        except BlockingIOError:
            idle += 1
            await asyncio.sleep(0.01)
    assert held_by(pump)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("other", ["quiet", "full"])
async def test_a_reset_of_an_end_that_is_not_read_reaches_the_other(bench: Bench, side: int, other: str) -> None:
    """One end has filled the pump and is reset: no read would tell, and the other end is not waiting for a write."""
    *ends, pump = await bench.pair()
    near, far = ends[side], ends[1 - side]
    await fill(near, pump)
    if other == "full":
        await fill(far, pump)
    reset(near)
    assert await bench.end() is pump
    assert pump.error is not None
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        await asyncio.wait_for(read_all(far), 5)


async def test_two_ends_in_order_are_no_death(bench: Bench) -> None:
    """The agent has ended its side, the client has sent much and ended as well: the kernel's connection to it is over
    (TIME_WAIT), and what it sent still has to be passed on."""
    client, agent, pump = await bench.pair()
    agent.shutdown(socket.SHUT_WR)
    assert await receive(client, 1) == b""
    data = random.Random(8).randbytes(64 * MIB)
    count = 0
    while not held_by(pump):
        # Little by little: what comes behind the bytes that are held has to fit into the kernel, with the FIN.
        count += client.send(data[count : count + 32 * 1024])
        await asyncio.sleep(0.001)
    client.shutdown(socket.SHUT_WR)
    await until(lambda: pump._to_agent.source.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE)
    for _ in range(10):
        pump.look()
        await asyncio.sleep(0.01)
    assert await read_all(agent) == (count, hashlib.sha256(data[:count]).hexdigest())
    assert await bench.end() is pump
    assert pump.error is None


async def test_who_vanishes_is_noticed_within_thirty_seconds(bench: Bench) -> None:
    await bench.pair()
    (pump,) = bench.pumps
    for sock in (pump._to_agent.source, pump._to_client.source):
        idle, interval, user = (
            sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT)
        )
        # The kernel looks at the user timeout when it sends a probe (tcp_timer.c, tcp_keepalive_timer).
        assert max(user / 1000, idle + interval) <= 30
        assert (user / 1000 - idle) % interval == 0


async def test_left_over_bytes_go_first(bench: Bench) -> None:
    early = random.Random(5).randbytes(9000)
    client, agent, _ = await bench.pair(to_agent=early, to_client=b"hello")
    await send_all(client, b"later")
    assert await exactly(agent, 9005) == early + b"later"
    assert await exactly(client, 5) == b"hello"


async def test_a_stalled_reader_bounds_what_is_held_and_frees_its_pipe(bench: Bench) -> None:
    """docs/threats.md#J10 and #R6: 20 pairs full to the brim; no pipe is held after a sweep, and every byte is still
    there.
    """
    pairs = [await bench.pair() for _ in range(20)]
    data = random.Random(6).randbytes(2 * MIB)
    sent = []
    for client, _, pump in pairs:
        # 50 ms without progress: neither the kernel nor the pump takes more.
        count, idle = 0, 0
        while idle < 5:
            try:
                count += client.send(data[count % len(data) :])
                idle = 0
            except BlockingIOError:
                idle += 1
                await asyncio.sleep(0.01)
        assert 0 < held_by(pump) <= HELD
        sent.append(count)
    for *_, pump in pairs:
        pump.look()
        pump.unload()
    assert bench.pumps.pipes.open == len(bench.pumps.pipes._free)
    for (client, agent, pump), count in zip(pairs, sent, strict=True):
        client.shutdown(socket.SHUT_WR)
        expected = hashlib.sha256((data * (count // len(data) + 1))[:count]).hexdigest()
        assert await read_all(agent) == (count, expected)
        agent.close()
        assert await receive(client, 1) == b""
        assert pump.bytes_to_agent == count


async def test_small_messages_pass_while_another_pair_moves_bulk(bench: Bench) -> None:
    client, agent, _ = await bench.pair()
    bulk_client, bulk_agent, bulk_pump = await bench.pair()
    bulk = asyncio.gather(
        send_in_pieces(bulk_client, bytes(64 * MIB), lambda: 1 << 20), read_all(bulk_agent), return_exceptions=True
    )
    most = beside = 0
    for n in range(200):
        message = n.to_bytes(100, "big")
        before = bulk_pump.bytes_to_agent
        await send_all(client, message)
        assert await exactly(agent, 100) == message
        most = max(most, bulk_pump.bytes_to_agent - before)
        beside += bulk_pump.bytes_to_agent > before
    await bulk
    # Bounded bytes per wake-up: a message waits for some of them, and never behind a whole window of the other pair.
    # Counted in bytes, which a busy machine does not change.
    assert beside
    assert most <= 4 * BUDGET


async def test_a_cut_resets_both_ends(bench: Bench) -> None:
    client, agent, pump = await bench.pair()
    pump.abort("revoked")
    assert pump.closed
    assert "revoked" in str(pump.error)
    for end in (client, agent):
        with pytest.raises(ConnectionResetError):
            await receive(end, 10)
    pump.abort()
    assert len(bench.ended) == 1


async def test_descriptor_numbers_are_reused_without_a_byte_astray(bench: Bench) -> None:
    """docs/threats.md#J18, short: pairs come and go beside one that runs; each byte carries its owner's tag."""
    client, agent, _ = await bench.pair()
    total = 0
    for round_ in range(150):
        tag = bytes([round_ % 255 + 1])
        near, far, pump = await bench.pair()
        await send_all(near, tag * 40_000)
        total += 1
        await send_all(client, b"\0" * 1000)
        assert set(await exactly(agent, 1000)) == {0}
        if round_ % 3 == 0:
            pump.abort()
        elif round_ % 3 == 1:
            assert set(await exactly(far, 40_000)) == set(tag)
            reset(near)
        else:
            near.shutdown(socket.SHUT_WR)
            far.shutdown(socket.SHUT_WR)
            assert set(await exactly(far, 40_000)) == set(tag)
        far.close()
        near.close()
    await send_all(client, b"end")
    assert await exactly(agent, 3) == b"end"
    assert bench.pumps.total == total + 1


async def test_only_pairs_of_which_a_side_is_not_read_are_looked_at(bench: Bench) -> None:
    client, agent, pump = await bench.pair()
    *_, idle = await bench.pair()
    await send_all(client, b"hello")
    assert await exactly(agent, 5) == b"hello"
    assert not bench.pumps.not_reading
    await fill(client, pump)
    assert bench.pumps.not_reading == {pump}
    bench.pumps._sweep()
    assert bench.pumps.not_reading == {pump}, "as long as it lasts"
    client.shutdown(socket.SHUT_WR)
    await read_all(agent)
    assert bench.pumps.not_reading == {pump}, "a direction that is over is read no more"
    agent.close()
    assert await bench.end() is pump
    assert not bench.pumps.not_reading
    assert not idle.look()


async def test_the_pairs_of_a_user_share_an_account_and_small_reads_are_sampled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/threats.md#L44."""
    client, agent, first = await bench.pair("alice")
    (_, _, second), (_, _, other), (_, _, unknown) = [await bench.pair(user) for user in ("alice", "bob", "")]
    assert first.payer is second.payer
    assert len({first.payer, other.payer, unknown.payer}) == 3, "without a user the cluster pays"
    measured = []
    charge = LoopTime.charge

    def counted(self: LoopTime, now: float, began: float, before: float) -> None:
        measured.append(self)
        charge(self, now, began, before)

    monkeypatch.setattr(LoopTime, "charge", counted)
    for _ in range(4 * SAMPLE):
        await send_all(client, b"key")
        assert await exactly(agent, 3) == b"key"
    assert measured == 4 * [first.payer]
    assert first.payer.spent > 0.0
    assert other.payer.spent == 0.0
    # Both at once: how much of it two kernels hold depends on how much memory is left for that.
    await asyncio.gather(send_all(client, bytes(MIB)), exactly(agent, MIB))
    if bench.pumps.pipes.open:
        assert len(measured) > 4 + MIB // BUDGET, "each move of bulk is measured"


async def test_pairs_of_a_user_over_the_share_pause_and_lose_nothing(bench: Bench) -> None:
    """docs/threats.md#L44. Both pairs move bulk both ways, are paused again and again, and end in order."""
    pairs = [await bench.pair("alice") for _ in range(2)]
    data = random.Random(1).randbytes(8 * MIB)
    stopped = False

    async def interfere() -> None:
        while not stopped:
            bench.over(pairs[0][2], 0.002)
            await asyncio.sleep(0.004)

    interfering = asyncio.create_task(interfere())
    moves = []
    for client, agent, _ in pairs:
        moves += [send_in_pieces(client, data, lambda: 100_000), read_all(agent)]
        moves += [send_in_pieces(agent, data, lambda: 1 << 18), read_all(client)]
    results = await asyncio.gather(*moves)
    stopped = True
    await interfering
    assert [one for one in results if one] == 4 * [(len(data), hashlib.sha256(data).hexdigest())]
    assert [pump.error for pump in bench.ended] == [None, None]
    assert not bench.pumps._accounts


async def test_a_pause_is_the_users_alone_and_a_new_pair_shares_it(bench: Bench) -> None:
    client, agent, pump = await bench.pair("alice")
    near, far, _ = await bench.pair("bob")
    bench.over(pump, 3600.0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    late, _, joined = await bench.pair("alice")
    assert pump.paused
    assert joined.paused
    for one in (client, agent, late, near):
        await send_all(one, b"bytes")
    assert await exactly(far, 5) == b"bytes"
    assert pump.bytes_to_agent == pump.bytes_to_client == joined.bytes_to_agent == 0
    reset(agent)  # the sweep finds what no read does
    assert await bench.end() is pump
    assert await receive(far, 0) == b""
    with pytest.raises(ConnectionResetError):
        await receive(client, 1)


async def test_a_pause_passes_on_what_is_held_and_an_end_comes_after_it(bench: Bench) -> None:
    client, agent, pump = await bench.pair("alice")
    await fill(client, pump)
    held = pump.bytes_to_agent + held_by(pump)
    bench.over(pump, 3600.0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    count = 0
    async with asyncio.timeout(5):
        while count < held:
            count += len(await receive(agent, 1 << 18))
    assert count == held, "what was held comes, and nothing else"
    client.shutdown(socket.SHUT_WR)
    pump.payer.held_until = 0.0
    bench.pumps._accounts[pump.payer]._go_on()
    await read_all(agent)
    agent.close()
    assert await bench.end() is pump
    assert pump.error is None


def test_a_full_frame_is_one_read_of_each_hop() -> None:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context(ALPN_JOIN).wrap_bio(to_client, to_server, server_hostname="relay.test")
    server = server_contexts()[ALPN_JOIN].wrap_bio(to_server, to_client, server_side=True)
    for end in (client, server, client, server):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
    assert (client.version(), to_server.pending) == ("TLSv1.3", 0)
    full = frame(FrameType.DATA, 1, bytes(buffer.PAYLOAD))
    sent = 0
    while sent < len(full):
        sent += client.write(full[sent:])
    assert to_server.pending <= min(buffer.SIZE, HELD, CAPACITY)
    assert buffer.PAYLOAD == DEFAULT.frame_alone == DEFAULT.ack_every

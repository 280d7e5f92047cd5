"""What every bidirectional stream must do, whatever carries it: one suite for every kind of stream.

`check(make_pair)` runs all checks; each gets a fresh pair from `make_pair`, an async context manager that gives two
ends of one stream. An end has the awaitable face of `tests.support.stream_io.StreamIO`: `read`, `write`, `finish`,
`reset`, and a `transport`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

from arcbridge.errors import ArcbridgeError, LocalProtocolError, StreamReset
from arcbridge.wire.frames import ResetCode
from tests.support.stream_io import StreamIO

MakePair = Callable[[], AbstractAsyncContextManager[tuple[StreamIO, StreamIO]]]
Check = Callable[[StreamIO, StreamIO], Awaitable[None]]

ROOM = 8 * 1024 * 1024
"""More bytes than any stream here takes from a writer whose reader does nothing."""


async def order(a: StreamIO, b: StreamIO) -> None:
    """Bytes come out in the order in which they went in, however they were cut."""
    source = random.Random(7)
    data = source.randbytes(700_000)

    async def send() -> None:
        at = 0
        while at < len(data):
            size = source.choice([1, 100, 5_000, 70_000, 300_000])
            await a.write(data[at : at + size])
            at += size
        a.finish()

    sender = asyncio.ensure_future(send())
    assert await b.read_all() == data
    await sender


async def both_ways_at_once(a: StreamIO, b: StreamIO) -> None:
    """The directions do not wait for each other."""

    async def send(end: StreamIO, byte: bytes) -> None:
        for _ in range(30):
            await end.write(byte * 50_000)
        end.finish()

    there, back, _, _ = await asyncio.gather(b.read_all(), a.read_all(), send(a, b"a"), send(b, b"b"))
    assert there == b"a" * 1_500_000
    assert back == b"b" * 1_500_000


async def empty_writes(a: StreamIO, b: StreamIO) -> None:
    """An empty write sends nothing, and above all does not end the stream."""
    await a.write(b"")
    await a.write(b"x")
    await a.write(b"")
    assert await b.read() == b"x"
    reading = asyncio.ensure_future(b.read())
    await asyncio.sleep(0.01)
    assert not reading.done(), "an empty write looked like the end"
    a.finish()
    assert await reading == b""
    b.finish()


async def half_close(a: StreamIO, b: StreamIO) -> None:
    """FIN ends one direction alone; a second FIN changes nothing; writing after it is the caller's mistake."""
    await a.write(b"stdin")
    a.finish()
    a.finish()
    assert await b.read_all() == b"stdin"
    assert await b.read() == b"", "the end stays the end"
    try:
        await a.write(b"late")
    except LocalProtocolError:
        pass
    else:
        raise AssertionError("a write after FIN went through")
    for _ in range(40):
        await asyncio.gather(b.write(b"o" * 50_000), a.read_exactly(50_000))
    b.finish()
    assert await a.read() == b""


async def half_close_at_once(a: StreamIO, b: StreamIO) -> None:
    """The FINs of both ends cross on the wire."""
    await asyncio.gather(a.write(b"1"), b.write(b"2"))
    a.finish()
    b.finish()
    assert await a.read_all() == b"2"
    assert await b.read_all() == b"1"


async def fin_behind_much(a: StreamIO, b: StreamIO) -> None:
    """FIN right behind more bytes than there is credit for: all come, then the end, and the stream is over."""
    assert a.transport is not None
    a.transport.write(b"x" * 1_000_000)
    a.finish()
    b.finish()
    assert await a.read() == b""
    assert len(await b.read_all()) == 1_000_000
    await _gone(a)
    await _gone(b)


async def reset_here(a: StreamIO, b: StreamIO) -> None:
    """RESET reaches the other end with its code; what it had read stays, nothing looks like the end."""
    await a.write(b"part")
    assert await b.read() == b"part"
    a.reset(ResetCode.TRUNCATED)
    await _fails(b.read(), ResetCode.TRUNCATED)
    await _fails(b.write(b"x"), ResetCode.TRUNCATED)
    await _fails(a.read(), ResetCode.TRUNCATED)


async def reset_after_half_close(a: StreamIO, b: StreamIO) -> None:
    """A direction that is complete stays complete; the other one fails."""
    a.finish()
    assert await b.read() == b""
    await b.write(b"half of it")
    assert await a.read() == b"half of it"
    b.reset(ResetCode.INTERNAL)
    await _fails(a.read(), ResetCode.INTERNAL)


async def reset_while_the_other_reads(a: StreamIO, b: StreamIO) -> None:
    """A reader that waits is woken by RESET."""
    reading = asyncio.ensure_future(b.read())
    await asyncio.sleep(0)
    a.reset()
    await _fails(reading, ResetCode.CANCELLED)


async def reset_while_the_other_writes(a: StreamIO, b: StreamIO) -> None:
    """A writer that waits for credit is woken by RESET."""
    writing = await _stuck_writer(b)
    a.reset()
    await _fails(writing, ResetCode.CANCELLED)


async def close_while_the_other_waits(a: StreamIO, b: StreamIO) -> None:
    """`close` ends a waiting reader in order, and a waiting writer with a reason."""
    reading = asyncio.ensure_future(b.read())
    await asyncio.sleep(0)
    assert a.transport is not None
    await a.write(b"last words")
    a.transport.close()
    assert await reading == b"last words"
    assert await b.read() == b""
    await _gone(a)
    await _gone(b)


async def close_against_a_stuck_writer(a: StreamIO, b: StreamIO) -> None:
    """The writer learns that its peer reads no more; its own reading side ended in order."""
    writing = await _stuck_writer(b)
    assert a.transport is not None
    a.transport.close()
    await _fails(writing, ResetCode.NO_ERROR)
    assert await b.read() == b""
    await _gone(a)


async def close_behind_much(a: StreamIO, b: StreamIO) -> None:
    """What was written before `close` arrives whole, also when it has to wait for credit."""
    assert a.transport is not None
    a.transport.write(b"y" * 1_200_000)
    a.transport.close()
    assert a.transport.is_closing()
    assert len(await b.read_all()) == 1_200_000
    await _gone(a)


async def both_close(a: StreamIO, b: StreamIO) -> None:
    """Both ends close at once, close again and abort: each sees one end."""
    for end in (a, b, a, b):
        assert end.transport is not None
        end.transport.close()
    await _gone(a)
    await _gone(b)
    assert a.transport is not None
    a.transport.abort()


async def a_full_peer_stops_the_writer(a: StreamIO, b: StreamIO) -> None:
    """A reader that does nothing bounds what a writer can write; reading lets it go on."""
    sent = 0

    async def send() -> None:
        nonlocal sent
        while sent < 4 * ROOM:
            await a.write(b"z" * 65_536)
            sent += 65_536
        a.finish()

    writing = asyncio.ensure_future(send())
    await _until_still(lambda: sent)
    assert 0 < sent < ROOM
    assert not writing.done()
    assert len(await b.read_all()) == 4 * ROOM
    await writing


async def a_cancelled_read_took_nothing(a: StreamIO, b: StreamIO) -> None:
    """Cancelling a waiting read loses no byte."""
    got = b""
    for n in range(20):
        reading = asyncio.ensure_future(b.read())
        await asyncio.sleep(0)
        reading.cancel()
        (outcome,) = await asyncio.gather(reading, return_exceptions=True)
        if isinstance(outcome, bytes):  # it was done before
            got += outcome
        await a.write(b"%02d" % n)
        if n % 3 == 0:
            await asyncio.sleep(0)
    a.finish()
    got += await b.read_all()
    assert got == b"".join(b"%02d" % n for n in range(20))


async def a_cancelled_write_sent_nothing(a: StreamIO, b: StreamIO) -> None:
    """Cancelling a write that waits sends none of it, and does not lose the wake-up of the next."""
    sent = 0
    while True:
        writing = asyncio.ensure_future(a.write(b"w" * 65_536))
        done, _ = await asyncio.wait({writing}, timeout=0.2)
        if not done:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            break
        await writing
        sent += 65_536
    again = asyncio.ensure_future(a.write(b"after"))
    assert await b.read_exactly(sent) == b"w" * sent
    await again
    a.finish()
    assert await b.read_all() == b"after"


async def small_ping_pong(a: StreamIO, b: StreamIO) -> None:
    """A small write leaves at once, without waiting for more."""
    for n in range(100):
        await a.write(bytes((n,)))
        assert await b.read() == bytes((n,))
        await b.write(bytes((n, n)))
        assert await a.read_exactly(2) == bytes((n, n))


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        order,
        both_ways_at_once,
        empty_writes,
        half_close,
        half_close_at_once,
        fin_behind_much,
        reset_here,
        reset_after_half_close,
        reset_while_the_other_reads,
        reset_while_the_other_writes,
        close_while_the_other_waits,
        close_against_a_stuck_writer,
        close_behind_much,
        both_close,
        a_full_peer_stops_the_writer,
        a_cancelled_read_took_nothing,
        a_cancelled_write_sent_nothing,
        small_ping_pong,
    )
}
"""Name -> check; parametrize a test over it."""


async def check(make_pair: MakePair, name: str) -> None:
    """Run one check over a fresh pair, in both orientations; no task may be left."""
    for swap in (False, True):
        before = asyncio.all_tasks()
        async with make_pair() as (a, b), asyncio.timeout(15):
            if swap:
                a, b = b, a
            await CHECKS[name](a, b)
            for end in (a, b):
                if end.transport is not None:
                    end.transport.abort()
        left = {task for task in asyncio.all_tasks() - before if not task.done()}
        assert not left, f"tasks left: {left}"


async def _gone(end: StreamIO) -> None:
    """Wait until the end's `connection_lost` came."""
    async with asyncio.timeout(5):
        while not end._over:
            await asyncio.sleep(0.001)


async def _fails(awaitable: Awaitable[object], code: ResetCode) -> None:
    result: object
    try:
        async with asyncio.timeout(5):
            result = await awaitable
    except ArcbridgeError as error:
        result = error
    assert isinstance(result, StreamReset), f"{result!r} instead of a reset"
    assert result.code == code, f"code {result.code} instead of {code}"


async def _stuck_writer(end: StreamIO) -> asyncio.Task[None]:
    async def send() -> None:
        while True:
            await end.write(b"s" * 65_536)

    sent = end.transport
    assert sent is not None
    task = asyncio.ensure_future(send())
    await _until_still(lambda: sent.bytes_sent + sent.get_write_buffer_size())
    assert not task.done()
    return task


async def _until_still(value: Callable[[], int]) -> None:
    """Wait until a number no longer changes."""
    last, same = -1, 0
    while same < 10:
        await asyncio.sleep(0.005)
        now = value()
        same = same + 1 if now == last else 0
        last = now

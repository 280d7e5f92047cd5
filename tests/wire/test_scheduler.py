"""Sparse streams first, bulk in large turns; each stream once per round, and none is starved."""

from __future__ import annotations

from arcbridge.wire.scheduler import BULK_BYTES, SPARSE_HOLD, Scheduler
from arcbridge.wire.stream import SendState, Stream
from arcbridge.wire.window import ReceiveWindow


def streams(count: int, queued: int = 10_000) -> list[Stream]:
    made = [Stream(2 * n + 1, "t", 1_000_000, ReceiveWindow(1, 1)) for n in range(count)]
    for stream in made:
        put(stream, queued)
    return made


def put(stream: Stream, count: int) -> None:
    stream.put(bytes(count))


def turn(ring: Scheduler, most: int = 1_000_000) -> tuple[Stream, int]:
    """Return the stream of the next turn, and the bytes that it sent."""
    found = ring.next()
    assert found is not None
    stream, count = found
    count = min(count, most, stream.queued)
    stream.take(count)
    ring.sent(stream, count)
    return stream, count


def test_a_stream_is_in_the_ring_once() -> None:
    ring, (one,) = Scheduler(100, 10), streams(1)
    ring.add(one)
    ring.add(one)
    assert len(ring) == 1
    assert ring.next() == (one, 100)
    assert not one.scheduled
    assert ring.next() is None


def test_bulk_takes_turns_of_a_quantum() -> None:
    ring, (a, b, c) = Scheduler(100, 10), streams(3)
    ring.set_pace(40)
    for stream in (a, b, c):
        ring.add(stream)
    assert [turn(ring) for _ in range(6)] == [(a, 40), (b, 40), (c, 40)] * 2
    ring.remove(a)
    ring.remove(a)
    ring.remove(b)
    assert turn(ring) == (c, 100), "alone"


def test_a_quantum_stays_within_the_sizes_of_frames() -> None:
    ring = Scheduler(100, 10)
    for pace, quantum in ((0, 10), (50, 50), (1000, 100)):
        ring.set_pace(pace)
        assert ring.quantum == quantum


def test_a_turn_that_was_cut_short_goes_on() -> None:
    ring, (a, b) = Scheduler(100, 10), streams(2)
    ring.add(a)
    ring.add(b)
    assert turn(ring, 70) == (a, 70)
    assert turn(ring) == (a, 30)
    assert turn(ring, 70) == (b, 70)
    ring.remove(b)
    assert turn(ring) == (a, 100), "what was left was the other one's"


def test_a_sparse_stream_overtakes() -> None:
    ring, (a, b, keys) = Scheduler(100, 10), streams(3)
    keys.take(10_000)
    ring.add(a)
    ring.add(b)
    assert turn(ring, 50) == (a, 50)
    put(keys, 1)
    ring.add(keys)
    assert turn(ring) == (keys, 1)
    assert turn(ring) == (a, 50), "its turn was not lost"
    assert turn(ring) == (b, 100)


def test_a_sparse_stream_that_gets_more_becomes_bulk() -> None:
    ring, (a, b) = Scheduler(100, 10), streams(2, 500)
    b.take(495)
    ring.add(a)
    ring.add(b)
    put(b, 300)
    assert turn(ring) == (b, 10), "its allowance"
    assert [turn(ring) for _ in range(4)] == [(a, 100), (b, 100), (a, 100), (b, 100)]


def test_sparse_streams_do_not_starve_bulk() -> None:
    ring, (a, b, *many) = Scheduler(100, 10), streams(22)
    for stream in many:
        stream.take(10_000)
    ring.add(a)
    ring.add(b)
    for _ in range(1000):
        for stream in many:
            if not stream.queued:
                put(stream, 10)
                ring.add(stream)
        turn(ring)
    least = min(a.queued, b.queued)
    assert 10_000 - least >= 2_000
    assert ring.served >= sum(stream.renewed_at for stream in many) / len(many)
    for stream in many:
        ring.remove(stream)
        stream.take(stream.queued)
    assert turn(ring)[0] in (a, b)


def test_an_allowance_is_renewed_after_a_round_of_bulk() -> None:
    ring, (a, b, keys) = Scheduler(100, 10), streams(3)
    keys.take(10_000)
    ring.add(a)
    ring.add(b)

    def key() -> Stream:
        put(keys, 10)
        ring.add(keys)
        return turn(ring)[0]

    assert key() is keys
    assert key() is a, "it has had its allowance of this round"
    assert turn(ring)[0] is b
    assert turn(ring)[0] is keys
    assert turn(ring)[0] is a
    assert key() is keys


def test_a_stream_without_credit_leaves_the_ring() -> None:
    ring, (a, b) = Scheduler(100, 10), streams(2)
    ring.add(a)
    ring.add(b)
    found = ring.next()
    assert found is not None
    a.credit = 0
    ring.sent(a, 60)
    assert not a.scheduled
    assert turn(ring) == (b, 100)
    a.credit = 5
    ring.add(a)
    assert turn(ring)[0] is b
    assert turn(ring)[0] is a


# -- is a sparse stream active beside bulk? ---------------------------------------------------------------------------


def send(ring: Scheduler, stream: Stream, count: int, now: float) -> bool:
    stream.bytes_sent += count
    if stream is not ring.last_sender:
        ring.sender_changed(stream, now)
    return ring.interactive_until > now


def test_a_keystroke_beside_a_copy_counts_for_a_while() -> None:
    ring, (copy, keys) = Scheduler(100, 10), streams(2)
    assert not send(ring, copy, 10 * BULK_BYTES, 100.0)
    assert send(ring, keys, 1, 100.1)
    assert send(ring, copy, BULK_BYTES, 100.2)
    assert not send(ring, copy, BULK_BYTES, 100.3 + SPARSE_HOLD)
    assert send(ring, keys, 1, 101.0)


def test_copies_alone_are_not_sparse() -> None:
    ring, (a, b) = Scheduler(100, 10), streams(2)
    send(ring, a, 10 * BULK_BYTES, 100.0)
    assert send(ring, b, BULK_BYTES // 2, 100.01), "that it will be a copy is not known yet"
    shared = [n for n in range(1000) if send(ring, (a, b)[n & 1], BULK_BYTES, 100.02 + n / 100)]
    assert shared == [0], "from its second turn on it is"


def test_keystrokes_alone_disturb_no_copy() -> None:
    ring, (a, b) = Scheduler(100, 10), streams(2)
    assert not [n for n in range(100) if send(ring, (a, b)[n & 1], 100, 100 + n / 100)]


def test_a_copy_that_is_over_is_none() -> None:
    ring, (copy, keys) = Scheduler(100, 10), streams(2)
    send(ring, copy, 10 * BULK_BYTES, 100.0)
    copy.sending = SendState.FINISHED
    assert not send(ring, keys, 1, 100.1)
    send(ring, copy, 0, 100.2)

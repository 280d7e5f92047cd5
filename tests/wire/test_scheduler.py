"""Round robin: each ready stream once per round, small turns only while another waits."""

from __future__ import annotations

from arcbridge.wire.scheduler import Scheduler
from arcbridge.wire.stream import Stream
from arcbridge.wire.window import ReceiveWindow


def streams(count: int) -> list[Stream]:
    return [Stream(2 * n + 1, "t", 0, ReceiveWindow(1, 1)) for n in range(count)]


def test_a_stream_is_in_the_ring_once() -> None:
    ring, (one,) = Scheduler(100, 10), streams(1)
    ring.add(one)
    ring.add(one)
    ring.put_back(one)
    assert len(ring) == 1
    assert ring.next() == (one, 100)
    assert ring.next() is None
    assert not one.scheduled


def test_turns_are_small_while_another_waits() -> None:
    ring, (a, b, c) = Scheduler(100, 10), streams(3)
    for stream in (a, b, c):
        ring.add(stream)
    order = []
    for _ in range(6):
        turn = ring.next()
        assert turn is not None
        order.append(turn)
        ring.add(turn[0])
    assert order == [(a, 10), (b, 10), (c, 10)] * 2
    ring.remove(a)
    ring.remove(a)
    ring.remove(b)
    assert ring.next() == (c, 100)


def test_put_back_keeps_the_turn() -> None:
    ring, (a, b) = Scheduler(100, 10), streams(2)
    ring.add(a)
    ring.add(b)
    turn = ring.next()
    assert turn is not None
    ring.put_back(turn[0])
    assert ring.next() == (a, 10)

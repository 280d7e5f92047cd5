"""One stream's own state: taking queued bytes, waiting payload, when it is over."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.wire.stream import SMALL, ReceiveState, SendState, Stream
from arcbridge.wire.window import ReceiveWindow


def stream() -> Stream:
    return Stream(1, "kubernetes", 100, ReceiveWindow(100, 100))


@given(st.lists(st.binary(min_size=1, max_size=50)), st.lists(st.integers(1, 60)))
def test_taking_gives_the_bytes_in_order(chunks: list[bytes], turns: list[int]) -> None:
    one = stream()
    for chunk in chunks:
        one.put(chunk)
    out = b""
    for most in turns:
        pieces = one.take(most)
        assert sum(map(len, pieces)) == min(most, len(b"".join(chunks)) - len(out))
        out += b"".join(pieces)
        assert one.queued == sum(map(len, one.outbox))
    assert b"".join(chunks).startswith(out)
    assert out + b"".join(one.take(10**6)) == b"".join(chunks)


sizes = st.one_of(st.integers(1, 3), st.integers(1, 5000))


@given(st.lists(st.tuples(sizes, st.integers(0, 6000)), max_size=60))
def test_m9_what_a_stream_holds_is_counted_whatever_the_pieces(steps: list[tuple[int, int]]) -> None:
    """Pieces of one byte, and large ones of which all but one byte was taken: the count is that of the memory."""
    one = stream()
    for put, take in steps:
        one.put(bytes(put))
        one.take(take)
        whole = [piece.obj if isinstance(piece, memoryview) else piece for piece in one.outbox]
        assert one.held == sum(map(len, whole)) >= one.queued
        assert sum(map(sys.getsizeof, whole)) <= one.held * 1.05 + 2 * SMALL
    one.take(one.queued)
    assert one.held == one.queued == 0


def test_payload_waits_until_there_is_a_sink() -> None:
    one = stream()
    buffer = bytearray(b"early")
    one.deliver(memoryview(buffer))
    buffer[:] = b"XXXXX"
    assert list(one.inbox) == [b"early"]
    got: list[bytes] = []
    one.sink = lambda view: got.append(bytes(view))
    one.deliver(memoryview(b"late"))
    assert got == [b"late"]
    assert one.bytes_received == 9


def test_m20_payload_that_waits_takes_little_more_than_its_bytes() -> None:
    """In frames of two bytes: one object for each took thirty times as much."""
    one = stream()
    for _ in range(20_000):
        one.deliver(memoryview(b"ab"))
    assert b"".join(one.inbox) == b"ab" * 20_000
    assert sum(map(sys.getsizeof, one.inbox)) < 1.1 * 40_000


@pytest.mark.parametrize("state", [ReceiveState.FINISHED, ReceiveState.RESET])
def test_payload_after_the_end_is_dropped(state: ReceiveState) -> None:
    one = stream()
    one.receiving = state
    one.deliver(memoryview(b"late"))
    assert not one.inbox
    assert one.bytes_received == 0


@pytest.mark.parametrize(("sending", "receiving"), list(itertools.product(SendState, ReceiveState)))
def test_over_is_when_both_halves_have_ended(sending: SendState, receiving: ReceiveState) -> None:
    one = stream()
    one.sending, one.receiving = sending, receiving
    ended = sending in (SendState.FINISHED, SendState.RESET) and receiving is not ReceiveState.OPEN
    assert one.over is ended
    assert sending.value in repr(one)
    assert receiving.value in repr(one)

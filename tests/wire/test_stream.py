"""One stream's own state: taking queued bytes, waiting payload, when it is over."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.wire.stream import ReceiveState, SendState, Stream
from arcbridge.wire.window import ReceiveWindow


def stream() -> Stream:
    return Stream(1, "kubernetes", 100, ReceiveWindow(100, 100))


@given(st.lists(st.binary(min_size=1, max_size=50)), st.lists(st.integers(1, 60)))
def test_taking_gives_the_bytes_in_order(chunks: list[bytes], turns: list[int]) -> None:
    one = stream()
    for chunk in chunks:
        one.outbox.append(chunk)
        one.queued += len(chunk)
    out = b""
    for most in turns:
        pieces = one.take(most)
        assert sum(map(len, pieces)) == min(most, len(b"".join(chunks)) - len(out))
        out += b"".join(pieces)
        assert one.queued == sum(map(len, one.outbox))
    assert b"".join(chunks).startswith(out)
    assert out + b"".join(one.take(10**6)) == b"".join(chunks)


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

"""What the records catch: anything lost, doubled, swapped, changed or foreign, at any place, however it is cut up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.soak.records import TRAILER_SIZE, Direction, Kind, Mismatch, Preamble, Receiver, Sender

SEED = bytes(range(16))


def spoken(preamble: Preamble, direction: Direction, records: int) -> tuple[bytes, Sender]:
    """Return all bytes of a direction behind the preamble."""
    sender = Sender(preamble, direction)
    sender.opening()
    return b"".join(sender.next() for _ in range(records)) + sender.trailer(), sender


def heard(preamble: Preamble, direction: Direction, data: bytes, step: int = 1000) -> Receiver:
    """Return a receiver that was given `data` in pieces, and then the end."""
    receiver = Receiver(preamble, direction)
    for at in range(0, len(data), step):
        receiver.feed(data[at : at + step])
    receiver.eof()
    return receiver


@settings(max_examples=25)
@given(
    kind=st.sampled_from(list(Kind)), seed=st.integers(0, 2**32), size=st.integers(1, 5000), step=st.integers(100, 9000)
)
def test_lost_bytes_are_counted_wherever_they_were(kind: Kind, seed: int, size: int, step: int) -> None:
    preamble = Preamble(SEED, 1, kind, 0)
    data, _ = spoken(preamble, Direction.DOWN, 100)
    at = random.Random(seed).randrange(len(data) - TRAILER_SIZE - size - 24)
    with pytest.raises(Mismatch) as caught:
        heard(preamble, Direction.DOWN, data[:at] + data[at + size :], step)
    assert (caught.value.what, caught.value.count) == ("lost", size)


@settings(max_examples=25)
@given(
    kind=st.sampled_from(list(Kind)), seed=st.integers(0, 2**32), size=st.integers(1, 5000), step=st.integers(100, 9000)
)
def test_doubled_bytes_are_counted_wherever_they_were(kind: Kind, seed: int, size: int, step: int) -> None:
    preamble = Preamble(SEED, 1, kind, 0)
    data, _ = spoken(preamble, Direction.UP, 100)
    at = random.Random(seed).randrange(size, len(data) - TRAILER_SIZE - 24)
    with pytest.raises(Mismatch) as caught:
        heard(preamble, Direction.UP, data[:at] + data[at - size :], step)
    assert (caught.value.what, caught.value.count) == ("doubled", size)


def test_records_lost_before_the_trailer_are_counted() -> None:
    preamble = Preamble(SEED, 1, Kind.CHATTY, 0)
    sender = Sender(preamble, Direction.DOWN)
    first, second = sender.next(), sender.next()
    with pytest.raises(Mismatch) as caught:
        heard(preamble, Direction.DOWN, first + sender.trailer())
    assert (caught.value.what, caught.value.count) == ("lost", len(second))


@pytest.mark.parametrize("keep", [0, 1, 11, 500, -TRAILER_SIZE, -1])
def test_an_end_in_order_without_a_whole_trailer_is_no_end(keep: int) -> None:
    preamble = Preamble(SEED, 1, Kind.CHATTY, 0)
    data, _ = spoken(preamble, Direction.DOWN, 20)
    receiver = Receiver(preamble, Direction.DOWN)
    receiver.feed(data[:keep])
    with pytest.raises(Mismatch) as caught:
        receiver.eof()
    assert (caught.value.what, caught.value.count) == ("lost", 0), "how much is missing the other end knows"
    assert receiver.tally.bytes == len(data[:keep]), "what did come counts"


def test_bytes_of_another_stream_are_wrong() -> None:
    mine, theirs = (Preamble(SEED, stream, Kind.BULKY, 0) for stream in (1, 2))
    data, _ = spoken(theirs, Direction.DOWN, 3)
    with pytest.raises(Mismatch, match="wrong"):
        heard(mine, Direction.DOWN, data)
    data, _ = spoken(theirs, Direction.DOWN, 0)
    with pytest.raises(Mismatch, match="a trailer that is none"):
        heard(mine, Direction.DOWN, data)

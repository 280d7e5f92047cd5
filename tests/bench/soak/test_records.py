"""What the records catch: anything lost, doubled, swapped, changed or foreign, at any place, however it is cut up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.soak.records import PREAMBLE_SIZE, TRAILER_SIZE, Direction, Kind, Mismatch, Preamble, Receiver, Sender

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


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("step", [1, 13, 4096, 10_000_000])
def test_both_ends_count_the_same(kind: Kind, direction: Direction, step: int) -> None:
    preamble = Preamble(SEED, 7, kind, 0)
    data, sender = spoken(preamble, direction, 5)
    receiver = heard(preamble, direction, data, step)
    assert receiver.ended
    assert (receiver.tally.records, receiver.tally.bytes) == (5, sender.tally.bytes)
    assert receiver.tally.digest == sender.tally.digest
    assert sender.tally.bytes == len(data) + (PREAMBLE_SIZE if direction is Direction.UP else 0)


def test_a_preamble_is_what_was_sent() -> None:
    preamble = Preamble(SEED, 2**40, Kind.BULKY, 17)
    assert Preamble.decode(preamble.encode()) == preamble
    for at in range(PREAMBLE_SIZE):
        changed = bytearray(preamble.encode())
        changed[at] ^= 1
        with pytest.raises(Mismatch, match="preamble"):
            Preamble.decode(bytes(changed))


def test_no_two_directions_say_the_same() -> None:
    said = {
        spoken(Preamble(seed, stream, kind, 0), direction, 1)[0][:40]
        for seed in (SEED, SEED[::-1])
        for stream in (1, 2)
        for kind in Kind
        for direction in Direction
    }
    assert len(said) == 16


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


@pytest.mark.parametrize("size", [1, 11, 12, 400])
def test_bytes_behind_the_trailer_are_too_many(size: int) -> None:
    preamble = Preamble(SEED, 1, Kind.CHATTY, 0)
    data, _ = spoken(preamble, Direction.DOWN, 20)
    with pytest.raises(Mismatch) as caught:
        heard(preamble, Direction.DOWN, data + data[-size:])
    assert caught.value.what == "doubled"


def test_a_changed_byte_is_wrong_wherever_it_is() -> None:
    preamble = Preamble(SEED, 1, Kind.CHATTY, 0)
    data, _ = spoken(preamble, Direction.DOWN, 2)
    for at in range(0, len(data), 9):
        changed = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        with pytest.raises(Mismatch) as caught:
            heard(preamble, Direction.DOWN, changed)
        assert caught.value.what == "wrong"


def test_bytes_of_another_stream_are_wrong() -> None:
    mine, theirs = (Preamble(SEED, stream, Kind.BULKY, 0) for stream in (1, 2))
    data, _ = spoken(theirs, Direction.DOWN, 3)
    with pytest.raises(Mismatch, match="wrong"):
        heard(mine, Direction.DOWN, data)
    data, _ = spoken(theirs, Direction.DOWN, 0)
    with pytest.raises(Mismatch, match="a trailer that is none"):
        heard(mine, Direction.DOWN, data)

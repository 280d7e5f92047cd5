"""The entries of a ledger: their frames, their digest, and what an end keeps of them."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.errors import RemoteProtocolError
from arcbridge.wire.frames import FRAMES, FrameType
from arcbridge.wire.ledger import MOST_ENTRIES, MOST_ENTRY, MOST_HELD, LedgerEntries, entries_of, frames
from arcbridge.wire.records import Ledger

ENTRIES = st.lists(st.binary(min_size=17, max_size=MOST_ENTRY), max_size=8)


@given(ENTRIES)
def test_what_goes_into_frames_comes_out_and_each_fits(entries: list[bytes]) -> None:
    sent = list(frames(entries, first=True, last=True))
    assert [one for frame in sent for one in entries_of(Ledger.decode(frame.encode()))] == entries
    assert all(len(frame.encode()) <= FRAMES[FrameType.LEDGER].largest for frame in sent)
    assert [frame.first for frame in sent] == [True] + [False] * (len(sent) - 1)
    assert [frame.last for frame in sent] == [False] * (len(sent) - 1) + [True]


@pytest.mark.parametrize("body", [b"\0", b"\0\x14short", b"\0\x10" + b"i" * 16, b"\x1f\x41" + b"i" * 8001])
def test_an_entry_that_is_cut_off_too_short_or_too_long_is_an_error(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="impossible size"):
        list(entries_of(Ledger(body)))


def test_an_entry_replaces_the_one_of_its_id_and_the_digest_knows_no_order() -> None:
    entries = [bytes([number]) * 20 for number in range(9)]
    one, other = LedgerEntries(), LedgerEntries()
    for entry in entries:
        one.put(entry)
    for entry in random.sample(entries, 9):
        other.put(entry[:16] + b"former")
        other.put(entry)
    assert len(other) == 9
    assert one.digest() == other.digest()
    other.put(entries[0][:16] + b"news")
    assert one.digest() != other.digest()


@pytest.mark.parametrize("times", [1, 4])
def test_what_is_kept_is_bounded_however_much_comes(times: int) -> None:
    held = LedgerEntries()
    for number in range(times * MOST_HELD // 4000):
        held.put(number.to_bytes(16, "big") + b"x" * 4000)
    assert len(held) == MOST_HELD // 4016, "all that there is room for"
    assert sum(map(len, held)) <= MOST_HELD


@pytest.mark.parametrize("times", [1, 4])
def test_many_of_the_smallest_entries_take_no_more_memory(times: int) -> None:
    held = LedgerEntries()
    tracemalloc.start()
    try:
        for number in range(times * MOST_ENTRIES):
            held.put(number.to_bytes(16, "big") + b"x")
        assert tracemalloc.get_traced_memory()[0] < 3 * MOST_HELD
    finally:
        tracemalloc.stop()
    assert len(held) == MOST_ENTRIES

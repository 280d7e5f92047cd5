"""The decoder: whole, byte by byte, with left-overs; lengths are judged before anything is kept."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcbridge.errors import RemoteProtocolError
from arcbridge.wire.decoder import Decoder
from arcbridge.wire.frames import (
    FRAMES,
    HEADER_SIZE,
    IGNORABLE_FROM,
    MAX_DATA,
    MAX_IGNORABLE,
    FrameType,
    frame,
    pack_header,
)


class Log:
    """A sink that remembers; DATA pieces of one frame are joined, for their cutting is not part of the meaning."""

    def __init__(self, drop: frozenset[int] = frozenset()) -> None:
        self.frames: list[tuple[int, int, bytes]] = []
        self.positions: list[int] = []
        self.decoder: Decoder | None = None
        self.drop = drop

    def data_begins(self, stream_id: int, length: int) -> Callable[[memoryview], None] | None:
        self.frames.append((FrameType.DATA, stream_id, b""))
        if stream_id in self.drop:
            return None
        at = len(self.frames) - 1

        def take(view: memoryview) -> None:
            kind, stream, sofar = self.frames[at]
            self.frames[at] = (kind, stream, sofar + bytes(view))
            assert len(self.frames[at][2]) <= length

        return take

    def frame_received(self, kind: int, stream_id: int, body: bytes) -> None:
        assert type(body) is bytes
        self.frames.append((kind, stream_id, body))
        if self.decoder is not None:
            self.positions.append(self.decoder.position)


def feed(decoder: Decoder, sink: Log, data: bytes) -> None:
    scratch = bytearray(data)
    decoder.feed(memoryview(scratch), sink)
    scratch[:] = b"\xdb" * len(scratch)


ALL_TYPES = [*FrameType, sorted(set(range(IGNORABLE_FROM, 256)) - set(FrameType))[0], 255]
"""Types that this version knows, and two of the ignorable range that it does not."""


def largest(kind: int) -> int:
    return FRAMES[kind].largest if kind in FRAMES else MAX_IGNORABLE


def frames_of(kind: int) -> st.SearchStrategy[tuple[int, int, bytes]]:
    """Frames of a type, of any lawful size up to 600 bytes."""
    least = FRAMES[kind].smallest if kind in FRAMES else 0
    return st.tuples(st.just(int(kind)), st.integers(0, 9), st.binary(min_size=least, max_size=min(largest(kind), 600)))


@settings(max_examples=300)
@given(
    st.lists(st.one_of([frames_of(kind) for kind in ALL_TYPES]), max_size=12),
    st.lists(st.one_of(st.integers(1, 9), st.integers(1, 400)), max_size=40),
    st.sets(st.integers(0, 9)),
)
def test_any_cut_gives_the_same_frames(frames: list[tuple[int, int, bytes]], cuts: list[int], drop: set[int]) -> None:
    raw = b"".join(frame(*one) for one in frames)
    decoder, log = Decoder(), Log(frozenset(drop))
    log.decoder = decoder
    at = 0
    for size in [*cuts, len(raw)]:
        feed(decoder, log, raw[at : at + size])
        at += size
        assert decoder.position == min(at, len(raw))
    assert log.frames == [(k, s, b"" if k == FrameType.DATA and s in drop else b) for k, s, b in frames]
    ends, total = [], 0
    for kind, _, body in frames:
        total += HEADER_SIZE + len(body)
        if kind != FrameType.DATA:
            ends.append(total)
    assert log.positions == ends, "`position` is the end of the frame that is handed over"


@pytest.mark.parametrize("kind", ALL_TYPES)
@pytest.mark.parametrize("how", ["cap + 1", "2^24 - 1"])
def test_m4_lengths_over_the_cap_are_refused_at_the_header(kind: int, how: str) -> None:
    length = largest(kind) + 1 if how == "cap + 1" else 2**24 - 1
    header = pack_header(length << 8 | kind, 1)
    tracemalloc.start()
    try:
        decoder, log = Decoder(), Log()
        with pytest.raises(RemoteProtocolError):
            feed(decoder, log, header)
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024
    finally:
        tracemalloc.stop()
    assert log.frames == []


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_m4_the_cap_itself_is_taken(kind: int) -> None:
    body = b"q" * largest(kind)
    decoder, log = Decoder(), Log()
    raw = frame(kind, 1, body)
    for at in range(0, len(raw), 60_000):
        feed(decoder, log, raw[at : at + 60_000])
    assert log.frames == [(kind, 1, body)]


@pytest.mark.parametrize("kind", [kind for kind, layout in FRAMES.items() if layout.smallest])
def test_a_body_too_short_is_refused_at_the_header(kind: int) -> None:
    for length in range(FRAMES[kind].smallest):
        with pytest.raises(RemoteProtocolError):
            feed(Decoder(), Log(), pack_header(length << 8 | kind, 0))


@pytest.mark.parametrize("kind", [0, *range(max(FrameType) + 1, IGNORABLE_FROM)])
def test_m6_unknown_types_below_the_ignorable_range(kind: int) -> None:
    with pytest.raises(RemoteProtocolError, match="unknown type"):
        feed(Decoder(), Log(), pack_header(kind, 0))


def test_an_announced_body_is_not_allocated_before_it_comes() -> None:
    decoder, log = Decoder(), Log(frozenset({1}))
    tracemalloc.start()
    try:
        feed(decoder, log, pack_header(MAX_DATA << 8 | FrameType.DATA, 1))
        feed(decoder, log, b"x" * 100)
        feed(Decoder(), log, pack_header(FRAMES[FrameType.AUTH].largest << 8 | FrameType.AUTH, 0) + b"y")
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024
    finally:
        tracemalloc.stop()


def test_what_a_sink_raises_ends_the_decoding_at_once() -> None:
    class Raising(Log):
        def frame_received(self, kind: int, stream_id: int, body: bytes) -> None:
            super().frame_received(kind, stream_id, body)
            raise RemoteProtocolError("no")

    log = Raising()
    with pytest.raises(RemoteProtocolError, match="no"):
        feed(Decoder(), log, frame(FrameType.FIN, 1) * 3)
    assert len(log.frames) == 1


def test_the_rest_of_an_abandoned_frame_is_dropped_and_no_other() -> None:
    decoder, log = Decoder(), Log()
    whole = pack_header(8 << 8 | FrameType.DATA, 1) + b"abcdefgh"
    feed(decoder, log, whole[:11])
    decoder.abandon(3)
    feed(decoder, log, whole[11:13])
    decoder.abandon(1)
    feed(decoder, log, whole[13:] + frame(FrameType.DATA, 3, b"next") + frame(FrameType.DATA, 1, b"again"))
    decoder.abandon(1)  # nothing of it has begun
    feed(decoder, log, frame(FrameType.PING, 0, bytes(16)))
    assert [body for _, _, body in log.frames] == [b"abcde", b"next", b"again", bytes(16)]

"""The decoder: whole, byte by byte, with left-overs; lengths are judged before anything is kept."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
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


CASES: dict[str, list[tuple[int, int, bytes]]] = {
    "nothing": [],
    "empty FIN": [(FrameType.FIN, 1, b"")],
    "one small": [(FrameType.PING, 0, b"0123456789abcdef")],
    "empty DATA": [(FrameType.DATA, 1, b"")],
    "DATA": [(FrameType.DATA, 1, b"payload")],
    "DATA then FIN": [(FrameType.DATA, 1, b"payload"), (FrameType.FIN, 1, b"")],
    "small after DATA after small": [
        (FrameType.OPEN, 3, b"\x01\0\0\x02ab"),
        (FrameType.DATA, 3, b"x" * 50),
        (FrameType.WINDOW, 0, b"\0\0\1\0"),
    ],
    "ignorable": [(IGNORABLE_FROM, 7, b"whatever"), (255, 0, b"")],
    "every type": [(kind, 5, b"z" * min(layout.largest, 20)) for kind, layout in FRAMES.items()],
}


@pytest.mark.parametrize("frames", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 10_000])
def test_any_cut_gives_the_same_frames(frames: list[tuple[int, int, bytes]], size: int) -> None:
    raw = b"".join(frame(*one) for one in frames)
    decoder, log = Decoder(), Log()
    log.decoder = decoder
    for at in range(0, len(raw), size):
        feed(decoder, log, raw[at : at + size])
        assert decoder.position == min(at + size, len(raw))
    assert log.frames == frames
    ends, total = [], 0
    for kind, _, body in frames:
        total += HEADER_SIZE + len(body)
        if kind != FrameType.DATA:
            ends.append(total)
    assert log.positions == ends, "`position` is the end of the frame that is handed over"


@pytest.mark.parametrize("frames", CASES.values(), ids=CASES.keys())
def test_what_is_left_over_waits(frames: list[tuple[int, int, bytes]]) -> None:
    raw = b"".join(frame(*one) for one in frames)
    rest = frame(FrameType.PONG, 0, b"f" * 16)
    for cut in range(1, len(rest)):
        decoder, log = Decoder(), Log()
        feed(decoder, log, raw + rest[:cut])
        assert log.frames == frames
        feed(decoder, log, rest[cut:])
        assert log.frames == [*frames, (FrameType.PONG, 0, b"f" * 16)]


UNKNOWN = sorted(set(range(IGNORABLE_FROM, 256)) - set(FrameType))
"""Ignorable types that this version does not know: QUIET, which it knows, has no body."""


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just(int(FrameType.DATA)), st.integers(0, 9), st.binary(max_size=600)),
            st.tuples(st.sampled_from(UNKNOWN), st.integers(0, 9), st.binary(max_size=60)),
            st.tuples(st.just(int(FrameType.QUIET)), st.integers(0, 9), st.just(b"")),
            st.tuples(st.just(int(FrameType.OPEN)), st.integers(0, 9), st.binary(max_size=60)),
        ),
        max_size=12,
    ),
    st.lists(st.integers(1, 400), max_size=40),
    st.sets(st.integers(0, 9)),
)
def test_random_cuts(frames: list[tuple[int, int, bytes]], cuts: list[int], drop: set[int]) -> None:
    raw = b"".join(frame(*one) for one in frames)
    decoder, log = Decoder(), Log(frozenset(drop))
    at = 0
    for size in [*cuts, len(raw)]:
        feed(decoder, log, raw[at : at + size])
        at += size
    dropped = [(k, s, b"" if k == FrameType.DATA and s in drop else b) for k, s, b in frames]
    assert log.frames == dropped
    assert decoder.position == len(raw)


ALL_TYPES = [*FrameType, IGNORABLE_FROM, 255]


@pytest.mark.parametrize("kind", ALL_TYPES)
@pytest.mark.parametrize("how", ["cap + 1", "2^24 - 1"])
def test_m4_lengths_over_the_cap_are_refused_at_the_header(kind: int, how: str) -> None:
    cap = FRAMES[kind].largest if kind in FRAMES else MAX_IGNORABLE
    length = cap + 1 if how == "cap + 1" else 2**24 - 1
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
    body = b"q" * (FRAMES[kind].largest if kind in FRAMES else MAX_IGNORABLE)
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

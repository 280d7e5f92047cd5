"""The frame table is consistent with itself."""

from __future__ import annotations

import pytest

from arcbridge.wire.frames import (
    HEADER_SIZE,
    IGNORABLE_FROM,
    LARGEST,
    ON_SESSION_ID,
    ON_STREAM_ID,
    SMALLEST,
    FrameType,
    frame,
    pack_header,
    unpack_header,
)


def test_every_type_has_a_largest_size_and_a_place() -> None:
    assert set(LARGEST) == set(FrameType)
    assert ON_SESSION_ID | ON_STREAM_ID | {FrameType.WINDOW} == set(FrameType)
    assert not ON_SESSION_ID & ON_STREAM_ID
    assert all(SMALLEST[kind] <= LARGEST[kind] for kind in SMALLEST)
    assert all(kind < IGNORABLE_FROM for kind in FrameType if kind not in (FrameType.MOVE, FrameType.QUIET))


@pytest.mark.parametrize("kind", list(FrameType))
def test_header_layout(kind: FrameType) -> None:
    raw = frame(kind, 0x01020304, b"abc")
    assert raw == bytes((0, 0, 3, kind, 1, 2, 3, 4)) + b"abc"
    assert len(raw) == HEADER_SIZE + 3
    assert unpack_header(raw) == (3 << 8 | kind, 0x01020304)


def test_largest_numbers_fit_the_header() -> None:
    assert unpack_header(pack_header((2**24 - 1) << 8 | 255, 2**32 - 1)) == (2**32 - 1, 2**32 - 1)

"""Handshake frames of a resumed connection, cut anywhere, and not a byte more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.errors import RemoteProtocolError
from arcbridge.wire.frames import FrameType, frame, pack_header
from arcbridge.wire.resume_handshake import ResumeHandshake

FLIGHT = frame(FrameType.HELLO, 0, b"hello") + frame(FrameType.AUTH_OK, 0, b"") + b"what follows"


@given(st.lists(st.integers(1, 9), max_size=30))
def test_it_takes_frame_by_frame_however_they_arrive(cuts: list[int]) -> None:
    greeting, frames, rest, sofar = ResumeHandshake(), [], b"", 0
    for size in [*cuts, len(FLIGHT)]:
        data = memoryview(FLIGHT[sofar : sofar + size])
        sofar += len(data)
        at = 0
        while at < len(data) and len(frames) < 2:
            at, whole = greeting.next(data, at)
            if whole is not None:
                frames.append(whole)
        rest += bytes(data[at:])
    assert frames == [(FrameType.HELLO, b"hello"), (FrameType.AUTH_OK, b"")]
    assert rest == b"what follows"


@pytest.mark.parametrize(
    "header",
    [
        pack_header(0 << 8 | FrameType.DATA, 0),
        pack_header(16 << 8 | FrameType.PING, 0),
        pack_header(5 << 8 | FrameType.HELLO, 1),
        pack_header(4097 << 8 | FrameType.HELLO, 0),
        pack_header(5 << 8 | 200, 0),
    ],
)
def test_anything_else_is_refused_at_its_header(header: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        ResumeHandshake().next(memoryview(header), 0)

"""Defaults fit each other, and impossible ones are refused."""

from __future__ import annotations

import pytest

from arcbridge.errors import LocalProtocolError
from arcbridge.wire.frames import FIRST_CREDIT, MAX_DATA
from arcbridge.wire.limits import Limits
from arcbridge.wire.window import MAX_CREDIT


@pytest.mark.parametrize(
    "wrong",
    [
        {"stream_window": FIRST_CREDIT - 1},
        {"stream_window": 2**20, "max_stream_window": 2**19},
        {"max_stream_window": MAX_CREDIT + 1},
        {"session_window": FIRST_CREDIT - 1},
        {"session_window": MAX_CREDIT + 1},
        {"frame_shared": 0},
        {"frame_alone": MAX_DATA + 1},
        {"frame_shared": 2**17, "frame_alone": 2**16},
    ],
)
def test_limits_that_a_peer_would_refuse(wrong: dict[str, int]) -> None:
    with pytest.raises(LocalProtocolError):
        Limits(**wrong)

"""Defaults fit each other, and impossible ones are refused."""

from __future__ import annotations

import pytest

from arcbridge.errors import LocalProtocolError
from arcbridge.wire.frames import FIRST_CREDIT, MAX_DATA
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.window import MAX_CREDIT


def test_defaults_fit_each_other() -> None:
    assert DEFAULT.stream_window <= DEFAULT.max_stream_window <= DEFAULT.session_window <= MAX_CREDIT
    assert DEFAULT.frame_shared <= DEFAULT.frame_alone <= MAX_DATA
    assert 2 * DEFAULT.ping_interval < DEFAULT.ping_timeout
    assert DEFAULT.max_queued_control >= 1000 * 12, "a burst of resets fits the queue"


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

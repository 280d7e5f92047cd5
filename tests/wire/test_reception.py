"""Frames in, at the edges; every frame in every state is in test_session.py."""

from __future__ import annotations

import pytest

from arcbridge.errors import SessionEnded
from arcbridge.wire.books import Violation
from arcbridge.wire.frames import U32, FrameType, GoawayCode, frame
from arcbridge.wire.reception import ended_by
from arcbridge.wire.records import Goaway
from tests.wire.scripted import agent, data, opening


def test_a_goaway_becomes_the_sessions_end() -> None:
    error = ended_by(Goaway(5, GoawayCode.REVOKED, "no more", 7))
    assert isinstance(error, SessionEnded)
    assert (error.code, error.retry_after) == (GoawayCode.REVOKED, 7)
    assert "no more" in str(error)
    silent = ended_by(Goaway(0, GoawayCode.DONE))
    assert "the other end ended the session" in str(silent)
    assert silent.retry_after is None


def test_every_known_frame_but_data_has_its_place() -> None:
    assert set(agent().machine._frames) == set(FrameType) - {FrameType.DATA}


@pytest.mark.parametrize(("kind", "stream_id"), [(FrameType.PING, 1), (FrameType.OPEN, 0), (FrameType.FIN, 0)])
def test_a_frame_on_the_wrong_kind_of_id_is_told_to_the_caller(kind: FrameType, stream_id: int) -> None:
    with pytest.raises(Violation) as caught:
        agent().machine.frame_received(kind, stream_id, b"")
    assert caught.value.code is GoawayCode.PROTOCOL


def test_a_frame_that_may_be_ignored_is_counted() -> None:
    one = agent().feed(frame(200, 9, b"later"), frame(255, 0))
    assert one.machine.stats.ignored_frames == 2
    assert one.machine.error is None


def test_late_data_is_dropped_and_its_credit_comes_back() -> None:
    one = agent().feed(opening(1), frame(FrameType.RESET, 1, U32.pack(3)))
    before = one.machine.unconsumed
    one.feed(data(1, 5_000))
    assert one.machine.stats.dropped_bytes == 5_000
    assert one.machine.unconsumed == before
    assert one.machine.error is None

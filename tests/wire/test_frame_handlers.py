"""What frames mean, at the edges; every frame in every state is in test_session.py."""

from __future__ import annotations

import pytest

from arcbridge.wire.frame_handlers import misplaced
from arcbridge.wire.frames import FrameType
from arcbridge.wire.lifecycle import Violation
from arcbridge.wire.state import Kind
from tests.wire.scripted import agent


def test_every_known_frame_but_data_has_its_handler() -> None:
    assert set(agent().machine.receiver.handlers.table) == set(FrameType) - {FrameType.DATA}


def test_the_reason_is_the_connection_where_it_carries_no_such_frame() -> None:
    for kind, connection, reason in (
        (FrameType.OPEN, Kind.CONTROL, "OPEN on a control connection"),
        (FrameType.MOVE, Kind.CONTROL, "MOVE on a control connection"),
        (FrameType.MOVE, Kind.SESSION, "MOVE from the wrong side"),
        (FrameType.AUTH, Kind.CONTROL, "AUTH from the wrong side"),
        (FrameType.DIAL, Kind.SESSION, "DIAL from the wrong side"),
    ):
        with pytest.raises(Violation, match=reason):
            misplaced(kind, connection)(agent().machine.receiver.handlers, 0, b"")

"""What frames mean, at the edges; every frame in every state is in test_session.py."""

from __future__ import annotations

import pytest

from arcbridge.wire.frame_handlers import FrameHandlers, misplaced
from arcbridge.wire.frames import FRAMES, MAY_SEND, FrameType, GoawayCode
from arcbridge.wire.lifecycle import Violation
from arcbridge.wire.state import Kind, Side, State
from tests.wire.parts import Parts
from tests.wire.scripted import Scripted, agent, goaway, hello


def test_every_known_frame_but_data_has_its_handler() -> None:
    assert set(agent().machine.receiver.handlers) == set(FrameType) - {FrameType.DATA}


@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("connection", list(Kind))
@pytest.mark.parametrize("kind", sorted(set(FrameType) - {FrameType.DATA}))
def test_a_type_that_this_peer_may_not_send_is_refused(side: Side, connection: Kind, kind: FrameType) -> None:
    peer = Side.ACCEPTOR if side is Side.INITIATOR else Side.INITIATOR
    handler = Scripted(side, connection).machine.receiver.handlers[kind]
    if (connection, peer) in MAY_SEND[FRAMES[kind].sender]:
        assert handler.__name__ == f"_on_{kind.name.lower()}"
        return
    with pytest.raises(Violation, match=f"{kind.name} (from the wrong side|on a control connection)") as caught:
        handler(0, b"")
    assert caught.value.code is GoawayCode.PROTOCOL


def test_the_reason_is_the_connection_where_it_carries_no_such_frame() -> None:
    for kind, connection, reason in (
        (FrameType.OPEN, Kind.CONTROL, "OPEN on a control connection"),
        (FrameType.MOVE, Kind.CONTROL, "MOVE on a control connection"),
        (FrameType.MOVE, Kind.SESSION, "MOVE from the wrong side"),
        (FrameType.AUTH, Kind.CONTROL, "AUTH from the wrong side"),
        (FrameType.DIAL, Kind.SESSION, "DIAL from the wrong side"),
    ):
        with pytest.raises(Violation, match=reason):
            misplaced(kind, connection)(0, b"")


# -- the handlers alone -----------------------------------------------------------------------------------------------


def alone(side: Side = Side.ACCEPTOR, kind: Kind = Kind.SESSION, *, established: bool = True) -> Parts:
    """Parts whose receiver has the real handlers."""
    parts = Parts(side, kind, established=established)
    parts.receiver.handlers = FrameHandlers(
        parts.context, parts.lifecycle, parts.sender, parts.receiver, parts.table, parts.resumption
    ).table
    return parts


def test_hello_is_answered_once_and_names_the_credit_of_streams() -> None:
    parts = alone(established=False)
    parts.feed(hello(stream_window=100_000))
    assert parts.notes.hellos == 1
    assert parts.table.first_credit == 100_000
    assert parts.lifecycle.state is State.AUTH
    with pytest.raises(Violation, match="a second HELLO"):
        parts.feed(hello())


def test_a_control_connection_is_established_by_hello() -> None:
    parts = alone(kind=Kind.CONTROL, established=False)
    parts.feed(hello())
    assert (parts.notes.established, parts.receiver.counting) == (1, True)


def test_goaway_ends_or_drains() -> None:
    for code, ends in ((GoawayCode.DRAINING, 0), (GoawayCode.REVOKED, 1)):
        parts = alone()
        parts.feed(goaway(code))
        assert len(parts.notes.ends) == ends
        assert parts.lifecycle.draining is (not ends)

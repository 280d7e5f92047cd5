"""What frames mean, at the edges; every frame in every state is in test_session.py."""

from __future__ import annotations

import pytest

from arcbridge.wire.frame_handlers import FrameHandlers, misplaced
from arcbridge.wire.frames import FRAMES, HEADER_SIZE, MAY_SEND, PING_BODY, U32, FrameType, GoawayCode, frame
from arcbridge.wire.lifecycle import Violation
from arcbridge.wire.records import Hello
from arcbridge.wire.state import Kind, Side, State
from tests.wire.parts import Parts
from tests.wire.scripted import Scripted, agent, data, goaway, hello, opening


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


@pytest.mark.parametrize(("kind", "stream_id"), [(FrameType.PING, 1), (FrameType.OPEN, 0), (FrameType.FIN, 0)])
def test_a_frame_on_the_wrong_kind_of_id_is_told_to_the_caller(kind: FrameType, stream_id: int) -> None:
    with pytest.raises(Violation) as caught:
        agent().machine.receiver.frame_received(kind, stream_id, b"")
    assert caught.value.code is GoawayCode.PROTOCOL


def test_a_frame_that_may_be_ignored_is() -> None:
    one = agent().feed(frame(200, 9, b"later"), frame(255, 0))
    assert one.machine.error is None


def test_late_data_is_dropped_and_its_credit_comes_back() -> None:
    one = agent().feed(opening(1), frame(FrameType.RESET, 1, U32.pack(3)))
    before = one.machine.unconsumed
    one.feed(data(1, 5_000))
    assert one.machine.unconsumed == before
    assert one.machine.error is None


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


def test_a_ping_is_answered_with_what_has_arrived() -> None:
    parts = alone()
    parts.receiver.peer_hello = Hello()
    parts.feed(frame(FrameType.PING, 0, PING_BODY.pack(7, 0)))
    assert parts.notes.counts == [0]
    assert frame(FrameType.PONG, 0, PING_BODY.pack(7, HEADER_SIZE + PING_BODY.size)) in parts.written()


def test_goaway_ends_or_drains() -> None:
    for code, ends in ((GoawayCode.DRAINING, 0), (GoawayCode.REVOKED, 1)):
        parts = alone()
        parts.feed(goaway(code))
        assert len(parts.notes.ends) == ends
        assert parts.lifecycle.draining is (not ends)

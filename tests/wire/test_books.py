"""The books alone: what no frame of the peer and no command has touched yet. Their work is tested through both."""

from __future__ import annotations

import pytest

from arcbridge.errors import LocalProtocolError
from arcbridge.wire.books import HANDSHAKE, Books, Violation
from arcbridge.wire.frames import FIRST_CREDIT, HEADER_SIZE, LARGEST, FrameType, GoawayCode, ResetCode
from arcbridge.wire.limits import Limits
from arcbridge.wire.records import Auth, Hello, Open
from arcbridge.wire.state import Kind, Side, State
from tests.wire.scripted import agent, client


def test_the_beginning() -> None:
    for side in Side:
        books = Books(side, Kind.SESSION, 5.0, agent="i1", software="test", limits=Limits(max_streams=7))
        assert books.state is State.HELLO
        assert books.received == books.sent == 0
        assert bool(books._prelude) is (side is Side.INITIATOR), "an acceptor says nothing to a stranger"
        hello = Hello.decode(books._hello[HEADER_SIZE:])
        assert (hello.version, hello.max_streams, hello.agent, hello.software) == (1, 7, "i1", "test")
        assert books._credit == FIRST_CREDIT


def test_a_record_that_the_peer_would_refuse_is_our_callers_mistake() -> None:
    with pytest.raises(LocalProtocolError, match="OPEN of 2004 bytes, more than 1024"):
        Books._record(FrameType.OPEN, Open("t" * 2000), 1)
    with pytest.raises(LocalProtocolError) as caught:
        Books._record(FrameType.AUTH, Auth("oidc", "canary" * 20_000))
    assert "canary" not in str(caught.value)
    whole = Books._record(FrameType.OPEN, Open("t" * 1000), 1)
    assert len(whole) - HEADER_SIZE <= LARGEST[FrameType.OPEN]


def test_control_bytes_that_nobody_reads_end_the_session() -> None:
    one = client(Limits(max_queued_control=1000))
    one.machine._queue_control(b"c" * 1000)
    assert one.machine.state is State.OPEN
    one.machine._queue_control(b"c")
    assert one.machine.state is State.CLOSED
    assert one.machine.error is not None


def test_a_flood_is_what_our_own_payload_does_not_explain() -> None:
    books = agent(Limits(small_frame_burst=3, small_frame_rate=1.0)).machine
    with pytest.raises(Violation) as caught:  # noqa: PT012
        for _ in range(10):
            books._spend_control_budget()
    assert caught.value.code is GoawayCode.LIMIT
    books._earned = 20 * 32_768
    books._spend_control_budget()
    assert books._earned == 0


def test_streams_end_where_their_credit_is_settled() -> None:
    one = agent()
    machine = one.machine
    mine = machine._new_stream(2, "kubernetes")
    machine._next_id = 4
    assert machine.streams == {2: mine}
    before = machine._window.consumed
    assert machine._window.receive(100_000)
    assert mine.window.receive(100_000)
    machine._reset_stream(mine, ResetCode.INTERNAL)
    assert machine.streams == {}
    assert machine._window.consumed - before == 100_000, "the session has back what the stream held"
    one.collect()
    assert one.resets() == {2: ResetCode.INTERNAL}


def test_what_may_come_before_the_byte_sequence() -> None:
    assert {FrameType.HELLO, FrameType.AUTH, FrameType.AUTH_OK, FrameType.GOAWAY} == HANDSHAKE
    violation = Violation(GoawayCode.PROTOCOL, "why")
    assert (violation.code, violation.message, str(violation)) == (GoawayCode.PROTOCOL, "why", "why")

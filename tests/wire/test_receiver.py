"""The receiver alone: where payload goes, what a frame must satisfy, counts, and floods."""

from __future__ import annotations

import pytest

from arcbridge.wire.frames import FIRST_CREDIT, PING_BODY, U32, U64, FrameType, GoawayCode, ResetCode, frame
from arcbridge.wire.lifecycle import Violation
from arcbridge.wire.limits import DEFAULT, KIB, Limits
from arcbridge.wire.receiver import PAYLOAD_EXPLAINS, SENT_EXPLAINS
from arcbridge.wire.records import Hello
from arcbridge.wire.state import Kind, Side
from arcbridge.wire.stream import ReceiveState
from tests.wire.parts import Parts

ACK = frame(FrameType.ACK, 0, U64.pack(0))
PING = frame(FrameType.PING, 0, PING_BODY.pack(1, 0))


def data(stream_id: int, payload: bytes) -> bytes:
    return frame(FrameType.DATA, stream_id, payload)


def known(parts: Parts) -> Parts:
    parts.receiver.peer_hello = Hello()
    return parts


def test_payload_goes_to_the_sink_or_waits() -> None:
    parts = Parts()
    stream = parts.stream(1)
    parts.feed(data(1, b"waits"))
    taken: list[bytes] = []
    stream.sink = lambda view: taken.append(bytes(view))
    parts.feed(data(1, b"goes on"))
    assert (list(stream.inbox), taken) == ([b"waits"], [b"goes on"])
    assert stream.bytes_received == stream.window.received == parts.window.account.received == 12


def test_late_data_is_dropped_and_its_credit_comes_back() -> None:
    parts = Parts()
    parts.table.last_peer_id = 3
    parts.feed(data(1, b"late"))
    assert parts.window.account.unconsumed == 0


@pytest.mark.parametrize(
    ("receiving", "size", "code"),
    [(ReceiveState.FINISHED, 4, ResetCode.PROTOCOL), (ReceiveState.OPEN, 60 * KIB, ResetCode.FLOW_CONTROL)],
)
@pytest.mark.parametrize("side", Side)
def test_data_that_breaks_a_streams_rules_resets_it_alone(
    receiving: ReceiveState, size: int, code: ResetCode, side: Side
) -> None:
    parts = Parts(side)
    stream, other = parts.stream(1), parts.stream(3)
    stream.receiving, stream.window.received = receiving, stream.window.granted - 50 * KIB
    parts.feed(data(1, bytes(size)))
    assert frame(FrameType.RESET, 1, U32.pack(code)) in parts.written()
    assert parts.context.streams == {3: other}
    assert DEFAULT.churn_burst - parts.table.churn.left == 1, "it is churn, whichever end opened it"
    assert parts.failures == []


@pytest.mark.parametrize(
    "what", ["before the handshake", "on a control connection", "never opened", "beyond the session"]
)
def test_data_that_breaks_the_sessions_rules(what: str) -> None:
    parts = Parts(kind=Kind.CONTROL if what == "on a control connection" else Kind.SESSION)
    parts.receiver.counting = what != "before the handshake"
    if what == "beyond the session":
        parts.stream(1)
    with pytest.raises(Violation) as caught:
        parts.feed(data(1, bytes(FIRST_CREDIT + 1)))
    flow = what == "beyond the session"
    assert caught.value.code is (GoawayCode.FLOW_CONTROL if flow else GoawayCode.PROTOCOL)


def test_a_frame_goes_to_its_handler() -> None:
    parts = known(Parts())
    parts.feed(ACK, frame(FrameType.FIN, 7))
    assert parts.handled == [(FrameType.ACK, 0, U64.pack(0)), (FrameType.FIN, 7, b"")]


def test_consumed_bytes_are_granted_again_when_enough_came_together() -> None:
    parts = Parts(limits=Limits(stream_window=FIRST_CREDIT, max_stream_window=FIRST_CREDIT))
    stream = parts.stream(1)
    parts.feed(data(1, bytes(FIRST_CREDIT)))
    parts.receiver.consumed(stream, FIRST_CREDIT // 4 - 1)
    assert parts.written() == b""
    parts.receiver.consumed(stream, 1)
    assert frame(FrameType.WINDOW, 1, U32.pack(FIRST_CREDIT // 4)) in parts.written()
    assert parts.owner.send_ping.call_count == 0
    parts.context.now += 60
    parts.receiver.consumed(stream, FIRST_CREDIT // 4)
    assert parts.owner.send_ping.call_count == 1, "the window grows by the round trip, which was not measured of late"


def test_an_end_that_reads_on_after_the_streams_end_returns_its_growth() -> None:
    parts = Parts()
    parts.table.peer_opens(1, "kubernetes")
    stream = parts.table.streams[1]
    parts.feed(data(1, bytes(1000)))
    stream.window.grown = parts.table.growth.take(5000)
    parts.table.peer_finished(stream)
    parts.table.finish(stream)
    assert 1 not in parts.context.streams
    assert parts.budget.held == 5000
    parts.receiver.consumed(stream, 1000)
    assert parts.budget.held == 0
    assert parts.window.account.unconsumed == 0


def test_counts_begin_behind_the_handshake_and_are_told() -> None:
    parts = known(Parts(limits=Limits(ack_every=1000)))
    parts.stream(1)
    parts.receiver.counting = False
    parts.decoder.position = 70
    assert parts.receiver.received == 70
    parts.receiver.begin_counting()
    assert (parts.receiver.received, parts.receiver.counting) == (0, True)
    assert parts.receiver.report() == 0
    parts.feed(data(1, bytes(992)))
    assert parts.decoder.position - parts.receiver.reported_position == 1000
    parts.receiver.acknowledge()
    assert parts.written().startswith(frame(FrameType.ACK, 0, U64.pack(1000)))
    assert parts.decoder.position == parts.receiver.reported_position


def test_a_new_connection_starts_anew_what_belongs_to_the_path() -> None:
    parts = Parts()
    parts.decoder.position = 500
    parts.receiver.usual_window = 1 << 20
    parts.receiver.connection_changed(700)
    assert (parts.receiver.answers_from, parts.receiver.usual_window) == (700, 0)
    assert parts.receiver.reported_position == 500, "the handshake told the peer"


def test_a_flood_is_what_our_own_bytes_do_not_explain() -> None:
    parts = Parts(limits=Limits(small_frame_burst=3, small_frame_rate=0.0))
    for _ in range(3):
        parts.receiver.spend_control_budget()
    with pytest.raises(Violation) as caught:
        parts.receiver.spend_control_budget()
    assert caught.value.code is GoawayCode.LIMIT
    parts.sender.sent = 3 * SENT_EXPLAINS - 1
    parts.receiver.spend_control_budget()
    with pytest.raises(Violation):
        parts.receiver.spend_control_budget()
    parts.sender.sent += 1 + 2 * SENT_EXPLAINS
    parts.receiver.spend_control_budget()


def test_a_ping_that_asks_about_payload_is_no_flood() -> None:
    parts = Parts(limits=Limits(small_frame_burst=1, small_frame_rate=0.0))
    stream = parts.stream(1)
    for _ in range(5):
        parts.feed(data(1, bytes(PAYLOAD_EXPLAINS)))
        assert parts.receiver.ping_came() == PAYLOAD_EXPLAINS
        parts.receiver.consumed(stream, PAYLOAD_EXPLAINS)
    assert parts.receiver.ping_came() == 0
    with pytest.raises(Violation):
        parts.receiver.ping_came()


def test_m20_bytes_of_a_complete_stream_count_until_their_reader_has_them() -> None:
    parts = Parts()
    parts.table.peer_opens(1, "kubernetes")
    stream = parts.table.streams[1]
    parts.feed(data(1, bytes(1000)))
    parts.table.peer_finished(stream)
    parts.table.finish(stream)
    assert list(parts.table.unread) == [1]
    parts.receiver.consumed(stream, 400)
    parts.lifecycle.close(Violation(GoawayCode.DONE, ""))
    parts.table.close()
    assert parts.context.ahead.held == 600
    parts.receiver.consumed(stream, 600)
    assert parts.context.ahead.held == 0
    assert not parts.table.unread

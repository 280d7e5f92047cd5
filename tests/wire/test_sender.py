"""The sender alone: order, credit, reasons to wait, history and path."""

from __future__ import annotations

import pytest

from arcbridge.errors import LocalProtocolError
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.frames import (
    FIRST_CREDIT,
    HEADER_SIZE,
    MAX_DATA,
    PING_BODY,
    U32,
    FrameType,
    GoawayCode,
    ResetCode,
    frame,
)
from arcbridge.wire.limits import KIB, Limits
from arcbridge.wire.replay import Replay
from arcbridge.wire.sender import QUEUE_AHEAD, Blocked, gathered
from arcbridge.wire.stream import PROGRESS, SendState
from arcbridge.wire.window import MAX_CREDIT
from tests.wire.parts import Parts


def data(stream_id: int, payload: bytes) -> bytes:
    return frame(FrameType.DATA, stream_id, payload)


def test_the_order_of_what_leaves() -> None:
    parts = Parts()
    sender, stream = parts.sender, parts.stream(2, credit=4)
    sender.queue(b"finished frame")
    assert sender.send(stream, b"waits: more than credit") == 23
    sender.queue_control(b"control frame")
    sender.pong = b"pong"
    sender.prelude.append(b"hello")
    assert parts.written() == b"hello" + b"pong" + b"control frame" + b"finished frame" + data(2, b"wait")
    assert not sender.has_output
    assert stream.queued == 19


def test_only_the_sequence_is_counted_and_the_handshake_goes_first() -> None:
    parts = Parts()
    parts.sender.handshake_done = False
    parts.sender.prelude.append(b"hello")
    parts.sender.queue(b"frame")
    assert parts.written() == b"hello", "nothing more to a peer that is not known yet"
    assert parts.sender.sent == 0
    parts.sender.handshake_done = True
    assert parts.written() == b"frame"
    assert parts.sender.sent == 5
    assert parts.context.stats.bytes_sent == 10


def test_credit_of_stream_and_session_is_spent() -> None:
    parts = Parts()
    sender, stream = parts.sender, parts.stream(1, credit=100)
    assert sender.send(stream, b"x" * 60) == 0
    assert (stream.credit, sender.credit, stream.bytes_sent) == (40, FIRST_CREDIT - 60, 60)
    assert sender.send(stream, b"y" * 50) == 50
    assert parts.written() == data(1, b"x" * 60) + data(1, b"y" * 40)
    assert stream.credit == 0
    sender.add_credit(stream, 10)
    assert parts.written() == data(1, b"y" * 10)
    assert sender.credit == FIRST_CREDIT - 110


def test_the_sessions_credit_stops_all_streams() -> None:
    parts = Parts()
    sender, stream = parts.sender, parts.stream()
    sender.credit = 0
    sender.send(stream, b"waits")
    assert not sender.has_output
    assert parts.written() == b""
    sender.credit = 3
    assert parts.written() == data(1, b"wai")


def test_only_the_latest_ping_is_answered() -> None:
    parts = Parts()
    parts.sender.answer_ping(1, 10)
    parts.sender.answer_ping(2, 20)
    assert parts.written() == frame(FrameType.PONG, 0, PING_BODY.pack(2, 20))
    assert parts.written() == b""


@pytest.mark.parametrize("why", list(Blocked))
def test_each_reason_alone_holds_payload_back_and_nothing_else(why: Blocked) -> None:
    parts = Parts()
    sender, stream = parts.sender, parts.stream()
    sender.blocked = int(why)
    assert sender.blocked_by is why
    assert sender.send(stream, b"payload") == 7
    sender.queue_control(b"control")
    assert parts.written() == b"control"
    assert not sender.has_output
    sender.blocked = 0
    assert parts.written() == data(1, b"payload")


def test_the_pacers_word_does_not_undo_another_reason() -> None:
    sender = Parts().sender
    sender.set_writable(False)
    sender.set_paced(True)
    assert sender.blocked_by == Blocked.SOCKET | Blocked.RATE
    sender.set_writable(True)
    assert sender.blocked_by is Blocked.RATE
    sender.set_writable(False)
    sender.set_paced(False)
    assert sender.blocked_by is Blocked.SOCKET


def test_bytes_after_the_end_are_the_callers_mistake_and_after_a_reset_a_race() -> None:
    parts = Parts()
    stream = parts.stream()
    stream.sending = SendState.FINISHED
    with pytest.raises(LocalProtocolError, match="after the end"):
        parts.sender.send(stream, b"late")
    stream.sending = SendState.RESET
    assert parts.sender.send(stream, b"late") == 0
    assert parts.written() == b""


def test_empty_and_huge_writes() -> None:
    parts = Parts(limits=Limits(under_way=0))
    sender, stream = parts.sender, parts.stream(credit=1 << 30)
    sender.credit = 1 << 30
    assert sender.send(stream, b"") == 0
    assert sender.send(stream, bytes(MAX_DATA + 1)) == MAX_DATA + 1, "more than one frame: the scheduler cuts it"
    most = Limits().frame_alone
    assert parts.written(1 << 30) == data(1, bytes(most)) + data(1, bytes(MAX_DATA + 1 - most))


def test_finished_frames_are_few_and_the_rest_waits_where_it_is_fair() -> None:
    parts = Parts()
    sender, stream = parts.sender, parts.stream(credit=1 << 30)
    sender.credit = 1 << 30
    sent = 0
    while not stream.queued:
        sender.send(stream, bytes(64 * KIB))
        sent += 64 * KIB
    assert sender.out_bytes <= QUEUE_AHEAD + HEADER_SIZE * 8
    assert stream.queued == 64 * KIB


def test_a_finishing_stream_ends_behind_its_last_byte() -> None:
    parts = Parts()
    sender, stream = parts.sender, parts.stream(credit=3)
    sender.send(stream, b"last")
    stream.sending = SendState.FINISHING
    assert parts.written() == data(1, b"las")
    assert not parts.owner.stream_sent.called
    sender.add_credit(stream, 10)
    assert parts.written() == data(1, b"t") + frame(FrameType.FIN, 1)
    parts.owner.stream_sent.assert_called_once_with(stream)
    assert stream.sending is SendState.FINISHED
    assert sender.take_unblocked() == [stream], "a writer that waits for the end is told"
    assert sender.take_unblocked() == []


def test_a_cut_stream_is_reset_behind_its_last_byte() -> None:
    parts = Parts()
    stream = parts.stream(credit=1 << 20)
    parts.sender.blocked = int(Blocked.SOCKET)
    parts.sender.send(stream, b"last")
    stream.sending = SendState.CUTTING
    parts.sender.set_writable(True)
    assert parts.written() == data(1, b"last") + frame(FrameType.RESET, 1, U32.pack(ResetCode.TRUNCATED))
    parts.owner.stream_cut.assert_called_once_with(stream)


def test_a_writer_goes_on_at_its_low_water_mark() -> None:
    parts = Parts()
    sender, stream = parts.sender, parts.stream(credit=0)
    stream.low_water, stream.blocked = 10, True
    sender.send(stream, bytes(30))
    sender.add_credit(stream, 15)
    parts.written()
    assert sender.take_unblocked() == []
    sender.add_credit(stream, 5)
    parts.written()
    assert sender.take_unblocked() == [stream]
    assert not stream.blocked


def test_m8_control_bytes_that_the_peer_does_not_read_end_the_session() -> None:
    parts = Parts(limits=Limits(max_queued_control=1000))
    parts.sender.queue_control(b"c" * 1000)
    assert parts.failures == []
    parts.written()
    parts.sender.queue_control(b"c" * 1001)
    assert parts.failures == [GoawayCode.LIMIT]


LITTLE = Limits(replay=512 * KIB, ack_every=1 * KIB, under_way=0)


def test_history_pauses_payload_until_half_of_it_is_confirmed() -> None:
    parts = Parts(limits=LITTLE, history=True)
    sender, stream = parts.sender, parts.stream(credit=1 << 30)
    sender.credit = 1 << 30
    sender.send(stream, bytes(800 * KIB))
    while parts.written(64 * KIB):
        pass
    assert sender.blocked_by is Blocked.HISTORY
    assert stream.queued
    assert sender.confirmed(100 * KIB) == 0.0
    assert sender.blocked_by is Blocked.HISTORY
    sender.confirmed(sender.sent - 200 * KIB)
    assert sender.blocked_by is Blocked(0)
    assert sender.history.size == 200 * KIB


def test_a_peer_that_confirms_nothing_ends_the_session() -> None:
    parts = Parts(limits=Limits(replay=4 * KIB, ack_every=1 * KIB, max_queued_control=1 * KIB), history=True)
    for _ in range(9):
        parts.sender.queue(bytes(1 * KIB))
        parts.written()
    assert parts.failures == []
    parts.sender.queue(b"one byte more")
    parts.written()
    assert parts.failures == [GoawayCode.LIMIT]


def test_without_a_session_to_resume_nothing_is_kept() -> None:
    parts = Parts(limits=LITTLE, history=True)
    parts.sender.queue(bytes(600 * KIB))
    parts.written()
    assert parts.sender.blocked_by is Blocked.HISTORY
    assert parts.budget.held == 600 * KIB
    parts.sender.forget_history()
    assert parts.sender.blocked_by is Blocked(0)
    assert parts.budget.held == 0
    assert parts.sender.history is None


def test_at_the_cap_payload_waits_and_a_ping_has_asked() -> None:
    parts = Parts(congestion=True)
    sender, stream = parts.sender, parts.stream(credit=1 << 30)
    sender.credit = 1 << 30
    sender.send(stream, b"the first flush makes room for the next")
    parts.written()
    sender.send(stream, bytes(1024 * KIB))
    now = 100.0
    while parts.written(64 * KIB, now):
        now += 0.001
    assert Blocked.PATH in sender.blocked_by
    assert sender.congestion.cap - sender.congestion.least < sender.sent <= sender.congestion.cap + HEADER_SIZE
    assert parts.owner.send_ping.call_count > 0
    sender.ping(1, 0)
    parts.written(64 * KIB, now)
    parts.context.now = now + 0.01
    assert sender.confirmed(sender.sent) == pytest.approx(0.01)
    assert sender.blocked_by is Blocked(0)


def test_what_a_new_connection_carries_first() -> None:
    parts = Parts(limits=LITTLE, history=True)
    sender = parts.sender
    sender.queue(b"0123456789")
    parts.written()
    sender.queue(b"next")
    sender.pong = b"pong"
    sender.detach()
    assert sender.blocked_by is Blocked.SOCKET
    assert parts.written() == b""
    assert sender.pong is None, "the answer to a PING of the old connection"
    sender.replay_from(4)
    sender.confirmed(4)
    sender.attach()
    assert parts.written(3) == b"456789", "whole pieces"
    assert parts.written() == b"next"
    assert parts.context.stats.replayed_bytes == 6
    assert sender.sent == 14


def test_nothing_is_sent_again_while_the_socket_takes_no_more() -> None:
    parts = Parts(limits=LITTLE, history=True)
    parts.sender.queue(b"0123456789")
    parts.written()
    parts.sender.replay_from(0)
    parts.sender.set_writable(False)
    assert not parts.sender.has_output
    assert parts.written() == b""
    parts.sender.set_writable(True)
    assert parts.sender.has_output
    assert parts.written() == b"0123456789"


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_left_when_the_session_is_over(keep: bool) -> None:
    parts = Parts(limits=LITTLE, history=True)
    sender, stream = parts.sender, parts.stream(credit=0)
    sender.send(stream, b"waits")
    sender.add_credit(stream, 10)
    sender.queue(b"finished")
    sender.control.append(b"goaway")
    sender.close(keep_frames=keep)
    sender.queue(b"too late")
    sender.queue_control(b"too late")
    assert parts.written() == b"goaway" + (b"finished" if keep else b"")
    assert not sender.has_output
    assert parts.failures == []


def test_small_parts_of_a_flush_aregathered_and_large_ones_are_not_copied() -> None:
    large = memoryview(bytes(range(256)) * 128)
    parts: list[bytes | memoryview] = [b"head", large, b"a", memoryview(b"b"), b"c", bytes(large), b"end"]
    found = gathered(parts, sum(map(len, parts)))
    assert b"".join(found) == b"".join(parts)
    assert [len(part) for part in found] == [4, len(large), 3, len(large), 3]
    assert found[1] is large
    assert found[3] is parts[5]
    assert gathered([], 0) == []


def test_a_small_flush_is_one_part_and_that_part_is_what_is_kept() -> None:
    parts = Parts(history=True)
    sender, history = parts.sender, parts.sender.history
    assert history is not None
    for _ in range(3):
        sender.queue(b"x" * 12)
    written = sender.data_to_send(1 << 20, 1.0)
    assert [len(part) for part in written] == [36]
    assert history.since(history.start)[0] is written[0]


def test_m9_a_stream_is_stalled_until_what_waits_moves_by_more_than_a_drip() -> None:
    parts = Parts()
    sender, stream, context = parts.sender, parts.stream(2, credit=0), parts.context
    sender.credit = MAX_CREDIT
    context.now = 10.0
    sender.send(stream, bytes(100_000))
    context.now = 20.0
    sender.send(stream, bytes(100_000))
    assert stream.stalled_since == 10.0
    for second in range(30, 40):  # a byte a second is no progress
        sender.add_credit(stream, 1)
        sender.data_to_send(MAX_DATA, float(second))
    assert (stream.stalled_since, stream.bytes_sent) == (10.0, 10)
    sender.add_credit(stream, PROGRESS)
    sender.data_to_send(MAX_DATA, 50.0)
    assert stream.stalled_since == 50.0
    sender.add_credit(stream, MAX_CREDIT // 2)
    while stream.queued:
        sender.data_to_send(MAX_DATA, 60.0)
    stream.credit = 0
    context.now = 70.0
    sender.send(stream, b"x")
    assert stream.stalled_since == 70.0
    assert context.backlog.held == stream.held == 1


def test_m9_a_users_backlog_pauses_a_history_above_its_floor() -> None:
    parts = Parts(history=True)
    sender, stream = parts.sender, parts.stream(2, credit=MAX_CREDIT)
    sender.credit = MAX_CREDIT
    user = Backlog(2 * Replay.FLOOR)
    parts.context.backlog.move(user)
    user.add(2 * Replay.FLOOR)
    sent = 0
    while sender.blocked_by is Blocked(0):
        sender.send(stream, bytes(MAX_DATA))
        sent += sum(map(len, sender.data_to_send(1 << 20)))
    assert sender.blocked_by is Blocked.HISTORY
    assert Replay.FLOOR <= sent < Replay.FLOOR + MAX_DATA + 2 * HEADER_SIZE
    sender.confirmed(sent // 2)
    assert sender.blocked_by is Blocked.HISTORY
    user.remove(Replay.FLOOR)
    sender.confirmed(sent // 2 + 1)
    assert sender.blocked_by is Blocked(0)

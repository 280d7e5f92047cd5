"""The table of streams alone: ids, limits, and how streams are settled."""

from __future__ import annotations

import pytest

from arcbridge.errors import LocalProtocolError, SessionEnded
from arcbridge.wire import events as ev
from arcbridge.wire.frames import FIRST_CREDIT, U32, FrameType, GoawayCode, ResetCode, frame
from arcbridge.wire.lifecycle import Change, Violation
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Open
from arcbridge.wire.state import Side
from arcbridge.wire.stream import ReceiveState, SendState
from arcbridge.wire.stream_table import LAST_ID
from tests.wire.parts import Parts


def test_ids_rise_by_two_and_opens_leave_in_order() -> None:
    for side, first in ((Side.INITIATOR, 1), (Side.ACCEPTOR, 2)):
        parts = Parts(side)
        ids = [parts.table.open(name, None).id for name in ("a", "b")]
        assert ids == [first, first + 2]
        opens = [frame(FrameType.OPEN, id_, Open(name).encode()) for id_, name in zip(ids, "ab", strict=True)]
        assert parts.written() == b"".join(opens)


def test_limits_of_opening() -> None:
    parts = Parts(Side.INITIATOR)
    parts.table.open("a", 1)
    with pytest.raises(SessionEnded) as caught:
        parts.table.open("b", 1)
    assert caught.value.code == GoawayCode.LIMIT
    with pytest.raises(LocalProtocolError, match="more than 1024"):
        parts.table.open("t" * 2000, None)
    assert len(parts.table.streams) == 1, "a mistake changes nothing"
    parts.table.next_id = LAST_ID + 2
    with pytest.raises(SessionEnded) as caught:
        parts.table.open("c", None)
    assert caught.value.code == GoawayCode.DRAINING


def test_the_peers_ids_are_of_its_parity_and_rise() -> None:
    table = Parts(Side.ACCEPTOR).table
    with pytest.raises(Violation, match="other side's"):
        table.peer_opens(2, "kubernetes")
    table.peer_opens(5, "kubernetes")
    with pytest.raises(Violation, match="does not rise"):
        table.peer_opens(5, "kubernetes")


@pytest.mark.parametrize("why", ["limit", "goaway"])
def test_a_stream_that_may_not_be_is_refused(why: str) -> None:
    parts = Parts(limits=Limits(max_streams=1))
    if why == "limit":
        parts.table.peer_opens(1, "kubernetes")
    else:
        parts.lifecycle.goaway_sent = True
    parts.table.peer_opens(3, "kubernetes")
    assert 3 not in parts.table.streams
    assert DEFAULT.churn_burst - parts.table.churn.left == 1, "it is churn"
    assert parts.written() == frame(FrameType.RESET, 3, U32.pack(ResetCode.REFUSED))


def test_early_streams_are_few_and_unseen_until_the_peer_is_known() -> None:
    parts = Parts(limits=Limits(early_streams=2), established=False)
    for stream_id in (1, 3, 5):
        parts.table.peer_opens(stream_id, "kubernetes")
    first, second = parts.table.streams[1], parts.table.streams[3]
    parts.table.peer_finished(first)
    parts.table.reset(second, ResetCode.CANCELLED)
    parts.table.tell_reset(second, ResetCode.CANCELLED)
    assert parts.context.events == []
    parts.lifecycle.change(Change.GREET)
    parts.lifecycle.establish(101.0)
    parts.table.tell_early()
    assert parts.context.events == [ev.StreamOpened(first, "kubernetes"), ev.StreamFinished(first)]


def test_the_first_credit_that_hello_names_counts_for_streams_that_are_open() -> None:
    parts = Parts(Side.INITIATOR)
    stream = parts.table.open("a", None)
    stream.credit -= 1000
    parts.table.set_first_credit(FIRST_CREDIT + 5000)
    assert stream.credit == FIRST_CREDIT + 4000
    assert parts.table.open("b", None).credit == FIRST_CREDIT + 5000


def test_a_stream_is_found_over_or_was_never_there() -> None:
    parts = Parts(Side.ACCEPTOR)
    parts.table.peer_opens(3, "kubernetes")
    assert parts.table.find(3, "FIN") is parts.table.streams[3]
    assert parts.table.find(1, "FIN") is None, "skipped: it may not come any more"
    for stream_id in (0, 2, 5):
        with pytest.raises(Violation, match="FIN for a stream that was never opened"):
            parts.table.find(stream_id, "FIN")


def test_it_is_forgotten_when_both_directions_have_ended() -> None:
    parts = Parts()
    parts.table.peer_opens(1, "kubernetes")
    stream = parts.table.streams[1]
    parts.table.finish(stream)
    parts.table.finish(stream)
    assert parts.written() == frame(FrameType.FIN, 1), "a second call changes nothing"
    assert parts.table.streams == {1: stream}
    parts.lifecycle.draining = True
    parts.table.peer_finished(stream)
    assert parts.table.streams == {}
    assert parts.table.peer_streams == 0
    assert parts.owner.finish_drain_if_idle.call_count == 1


def test_the_end_waits_for_bytes_that_wait() -> None:
    parts = Parts()
    finished, cut = parts.stream(1, credit=0), parts.stream(3, credit=0)
    parts.sender.send(finished, b"waits")
    parts.sender.send(cut, b"waits")
    parts.table.finish(finished)
    parts.table.cut(cut)
    assert (finished.sending, cut.sending) == (SendState.FINISHING, SendState.CUTTING)
    assert parts.written() == b""


def test_a_reset_returns_what_the_stream_held() -> None:
    parts = Parts()
    stream = parts.stream(1)
    assert parts.window.account.receive(60_000)
    assert stream.window.receive(60_000)
    parts.sender.send(stream, b"dropped, unless it has left")
    stream.queued, stream.credit = 0, 0
    parts.table.reset(stream, ResetCode.INTERNAL)
    assert parts.window.account.unconsumed == 0
    assert parts.table.streams == {}
    assert frame(FrameType.RESET, 1, U32.pack(ResetCode.INTERNAL)) in parts.written()
    parts.table.reset(stream, ResetCode.INTERNAL)
    parts.table.cut(stream)
    assert parts.written() == b"", "a stream that is over stays so"


def test_a_cut_keeps_what_came_before_it() -> None:
    parts = Parts()
    stream = parts.stream(2)
    stream.deliver(memoryview(b"prefix"))
    parts.table.peer_reset(stream, ResetCode.TRUNCATED, in_order=False)
    assert stream.receiving is ReceiveState.FINISHED
    assert list(stream.inbox) == [b"prefix"]
    assert parts.context.events == [ev.StreamWasReset(stream, ResetCode.TRUNCATED)]
    other = parts.stream(4)
    other.deliver(memoryview(b"prefix"))
    parts.table.peer_reset(other, ResetCode.CANCELLED, in_order=False)
    assert not other.inbox


@pytest.mark.parametrize("end", ["its last bytes leave", "reset by the peer"])
def test_nothing_is_kept_for_who_has_cut_a_stream(end: str) -> None:
    """It has given back what came before and reads no more; what came later counted until the session ended."""
    parts = Parts()
    stream = parts.stream(2, credit=0)
    parts.sender.send(stream, b"waits")
    parts.table.cut(stream)
    assert parts.window.account.receive(60_000)
    assert stream.window.receive(60_000)
    stream.deliver(memoryview(b"late"))
    parts.table.peer_finished(stream)
    if end == "its last bytes leave":
        parts.table.was_cut(stream)
    else:
        parts.table.peer_reset(stream, ResetCode.NO_ERROR, in_order=True)
    assert not parts.table.unread
    assert not stream.inbox
    assert parts.window.account.unconsumed == 0


ENDS = {
    "FIN both ways": lambda table, stream: (table.peer_finished(stream), table.finish(stream)),
    "reset by the application": lambda table, stream: table.reset(stream, ResetCode.UNKNOWN_TARGET),
    "reset behind our FIN": lambda table, stream: (table.finish(stream), table.reset(stream, ResetCode.NO_ERROR)),
    "cut": lambda table, stream: table.cut(stream),
    "reset by the peer": lambda table, stream: table.peer_reset(stream, ResetCode.CANCELLED, in_order=False),
    "the peer's reset in order": lambda table, stream: table.peer_reset(stream, ResetCode.NO_ERROR, in_order=True),
    "refused for the peer's fault": lambda table, stream: table.refuse(stream, ResetCode.PROTOCOL),
}
IN_ORDER = ("FIN both ways", "reset behind our FIN", "the peer's reset in order")


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("answered", [True, False])
def test_m7_a_stream_that_ends_before_its_answer_counts_once_whichever_end_ended_it(how: str, answered: bool) -> None:
    parts = Parts(limits=Limits(churn_burst=10, churn_rate=0.0))
    parts.table.peer_opens(1, "kubernetes")
    stream = parts.table.streams[1]
    assert stream.owed
    stream.owed = not answered
    ENDS[how](parts.table, stream)
    assert parts.table.streams == {}
    counted = 10 - parts.table.churn.left
    assert counted == (0 if answered and how in IN_ORDER else 1)


@pytest.mark.parametrize("how", ENDS)
def test_m7_of_its_own_streams_an_end_counts_those_that_the_peer_resets(how: str) -> None:
    parts = Parts(Side.INITIATOR, limits=Limits(churn_burst=10, churn_rate=0.0))
    stream = parts.table.open("kubernetes", None)
    ENDS[how](parts.table, stream)
    assert 10 - parts.table.churn.left == (how in ("reset by the peer", "refused for the peer's fault"))

"""Half-close and GOAWAY: how streams and sessions end in order (docs/threats.md#M11, docs/threats.md#M12)."""

from __future__ import annotations

import pytest

from arcbridge.errors import SessionEnded
from arcbridge.wire import events as ev
from arcbridge.wire.frames import FrameType, GoawayCode, ResetCode, frame
from arcbridge.wire.limits import Limits
from arcbridge.wire.session import Kind, Side, State
from tests.support.books import check_session, unconsumed
from tests.support.pair import Pair
from tests.wire.scripted import OK, Scripted, agent, data, goaway, hello, opening, reset
from tests.wire.session_states import PING


@pytest.mark.parametrize("late", [data(1, 5), frame(FrameType.FIN, 1)])
def test_m11_after_fin_nothing_may_come(late: bytes) -> None:
    one = agent().feed(opening(1), data(1, 5), frame(FrameType.FIN, 1), late)
    assert one.resets() == {1: ResetCode.PROTOCOL}
    assert one.machine.state is State.OPEN


def test_m11_reset_after_fin() -> None:
    one = agent().feed(opening(1), data(1, 5), frame(FrameType.FIN, 1), reset(1, ResetCode.NO_ERROR))
    stream = one.of(ev.StreamOpened)[0].stream
    assert b"".join(stream.inbox) == b"ddddd", "what came before FIN stays complete"
    one.machine.receiver.consumed(stream, 5)
    assert unconsumed(one.machine) == 0
    one = agent().feed(opening(1), data(1, 5), frame(FrameType.FIN, 1), reset(1, ResetCode.CANCELLED))
    stream = one.of(ev.StreamOpened)[0].stream
    assert not stream.inbox
    assert unconsumed(one.machine) == 0
    one.machine.receiver.consumed(stream, 5)  # a late consumer settles nothing twice
    assert unconsumed(one.machine) == 0
    check_session(one.machine)


# -- docs/threats.md#M12: GOAWAY -------------------------------------------------------------------------------------


def test_m12_opens_that_cross_a_goaway_are_refused_and_were_not_seen() -> None:
    pair = Pair().established()
    first = pair.client.open()
    pair.settle()
    pair.agent.machine.goaway(GoawayCode.DRAINING)
    second = pair.client.open()
    pair.client.write(second, b"never seen")
    pair.client.write(first, b"still runs")
    pair.settle()
    assert second.ends == [f"reset {ResetCode.REFUSED}"]
    assert list(pair.agent.seen) == [1]
    assert pair.agent.seen[1].read == b"still runs"
    for end, seen in ((pair.client, first), (pair.agent, pair.agent.seen[1])):
        end.finish(seen)
    pair.settle()
    assert first.ends == ["in order"]
    assert isinstance(pair.client.error, SessionEnded)
    assert isinstance(pair.agent.error, SessionEnded)
    assert pair.client.machine.streams == pair.agent.machine.streams == {}


def test_m12_the_drain_deadline_resets_what_still_runs() -> None:
    pair = Pair(limits=Limits(drain_timeout=5.0)).established()
    streams = [pair.client.open() for _ in range(3)]
    pair.settle()
    pair.agent.machine.goaway(GoawayCode.DRAINING, "restart", 2)
    start = pair.now
    pair.drive_bounded(lambda: pair.agent.error is not None and pair.client.error is not None)
    assert 5.0 <= pair.now - start < 6.0
    assert [seen.ends for seen in streams] == [[f"reset {ResetCode.CANCELLED}"]] * 3
    assert [seen.ends for seen in pair.agent.seen.values()] == [[f"reset {ResetCode.CANCELLED}"]] * 3


def test_goaway_while_the_token_is_verified() -> None:
    one = agent(accepted=False).feed(opening(1), data(1, 3), frame(FrameType.FIN, 1))
    one.machine.goaway(GoawayCode.DRAINING)
    assert one.machine.state is State.DRAINING
    one.feed(opening(3))
    one.machine.accept_auth(OK)
    one.collect()
    assert one.machine.state is State.DRAINING
    assert [e.stream.id for e in one.of(ev.StreamOpened)] == [1]
    assert one.resets() == {3: ResetCode.REFUSED}
    one.machine.stream_table.finish(one.machine.streams[1])
    one.collect()
    assert isinstance(one.machine.lifecycle.error, SessionEnded)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("side", Side)
def test_goaway_before_hello(side: Side, kind: Kind) -> None:
    one = Scripted(side, kind)
    one.machine.goaway(GoawayCode.DRAINING, "restart")
    one.collect()
    one.feed(hello())
    assert one.kinds().count(FrameType.HELLO) == 1
    assert one.kinds()[0] == FrameType.HELLO
    assert FrameType.GOAWAY in one.kinds()
    assert one.machine.state in (State.DRAINING, State.CLOSED)


def test_nothing_happens_after_the_end_within_the_same_input() -> None:
    one = agent().feed(opening(1))
    one.feed(goaway(GoawayCode.REVOKED), opening(3), data(1, 5), data(3, 5), frame(FrameType.FIN, 1), PING)
    assert isinstance(one.events[-1], ev.Ended)
    assert len(one.of(ev.StreamOpened)) == 1
    one = agent().feed(opening(1))
    stream = one.machine.streams[1]
    stream.sink = lambda view: one.machine.close(GoawayCode.DONE, "the application ended it")
    one.feed(data(1, 5), opening(3), frame(FrameType.FIN, 1), data(3, 1))
    assert isinstance(one.events[-1], ev.Ended)
    assert len(one.of(ev.StreamOpened)) == 1


@pytest.mark.parametrize("within", [True, False], ids=["by the sink", "between two reads"])
def test_a_sink_gets_nothing_of_its_frame_after_a_reset(within: bool) -> None:
    one = agent().feed(opening(1))
    stream = one.machine.streams[1]
    got: list[bytes] = []

    def take(view: memoryview) -> None:
        got.append(bytes(view))
        if within:
            one.machine.stream_table.reset(stream, ResetCode.CANCELLED)

    stream.sink = take
    whole = data(1, 100)
    one.feed(whole[:50])
    one.machine.stream_table.reset(stream, ResetCode.CANCELLED)
    one.feed(whole[50:])
    assert len(got) == 1
    assert unconsumed(one.machine) == 0, "the whole frame's credit was settled"
    check_session(one.machine)

"""Silence, deadlines and the keepalive (docs/threats.md#M14)."""

from __future__ import annotations

import pytest

from arcbridge.errors import ConnectionLost, LocalProtocolError, SessionEnded
from arcbridge.refusals import MAX_WANTED, Refusal, RefusalRule
from arcbridge.wire.frames import FrameType, GoawayCode, frame
from arcbridge.wire.limits import Limits
from arcbridge.wire.records import Auth, Dial, Goaway, Revoke, Status
from arcbridge.wire.session import Kind, Side, State
from tests.support.pair import Pair
from tests.wire.scripted import ack, agent, client
from tests.wire.session_states import control


@pytest.mark.parametrize("kind", Kind)
def test_m14_an_idle_connection_costs_little_and_no_ack(kind: Kind) -> None:
    pair = Pair(kind, limits=Limits(ack_every=1000))
    pair.drive_bounded(lambda: all(end.machine.state is State.OPEN for end in pair.ends))
    pair.settle()
    before = [end.machine.stats.bytes_sent for end in pair.ends]
    start = pair.now
    acks = []
    for end in pair.ends:
        handlers = end.machine.receiver.handlers
        handler = handlers.table[FrameType.ACK]
        note = lambda h, i, b, handler=handler: (acks.append(b), handler(h, i, b))[1]  # noqa: E731
        handlers.table = {**handlers.table, FrameType.ACK: note}
    pair.drive_bounded(lambda: pair.now - start > 600, 5000)
    for end, sent in zip(pair.ends, before, strict=True):
        assert end.machine.lifecycle.error is None
        assert (end.machine.stats.bytes_sent - sent) / 600 < 20, "bytes per second"
    assert not acks


def test_a_silent_peer_is_dead_after_25_seconds() -> None:
    pair = Pair(limits=Limits(replay=0)).established()
    seen = pair.client.open()
    pair.settle()
    pair.lost = True
    start = pair.now
    pair.drive_bounded(lambda: pair.client.error is not None and pair.agent.error is not None)
    assert 24 < pair.now - start < 36
    assert isinstance(pair.client.error, ConnectionLost)
    assert seen.ends == ["session over"]


def test_only_a_higher_count_of_the_peer_shows_that_bytes_of_ours_arrive() -> None:
    one = agent()
    sender = one.machine.sender
    for counts_rise in (True, False):
        for _ in range(40):
            one.now += 1.0
            one.feed(ack(sender.sent if counts_rise else sender.peer_received))
            one.machine.handle_timer(one.now)  # PINGs, none of which is answered
            one.collect()
        assert (one.machine.state is State.OPEN) is counts_rise


def test_control_connections_carry_dials_and_statuses() -> None:
    pair = Pair(Kind.CONTROL)
    pair.client.machine.send(Status(instance="i", ready=True))
    pair.agent.machine.send(Dial("early"))  # before HELLO: waits for it
    pair.drive_bounded(lambda: all(end.machine.state is State.OPEN for end in pair.ends))
    pair.agent.machine.send(Dial("token", "relay:443", "c", "join", "", 10, 1))
    pair.settle()
    dials = [e.token for e in pair.client.events if isinstance(e, Dial)]
    assert dials == ["early", "token"]
    assert [e.ready for e in pair.agent.events if isinstance(e, Status)] == [True]
    assert pair.client.machine.receiver.received == pair.agent.machine.sender.sent
    assert pair.agent.machine.receiver.received == pair.client.machine.sender.sent


def test_a_list_of_revocations_leaves_at_once_and_before_hello_waits() -> None:
    """10 000 users are 600 KB: more than control frames may wait, and less than an agent takes for a flood."""
    pair = Pair(Kind.CONTROL)
    told = [Revoke(f"user-{n}@example.com", 1_700_000_000 + n, n == 0, "left the company") for n in range(10_000)]
    for revoke in told:
        pair.agent.machine.send(revoke)
    pair.settle()
    assert [e for e in pair.client.events if isinstance(e, Revoke)] == told
    assert all(end.machine.state is State.OPEN for end in pair.ends)
    with pytest.raises(LocalProtocolError, match="is sent by the relay"):
        pair.client.machine.send(Revoke("jane", 1))
    with pytest.raises(LocalProtocolError, match="more than 4096"):
        pair.agent.machine.send(Revoke("j" * 4096, 1))


def test_control_frames_pass_while_all_windows_are_zero() -> None:
    pair = Pair(eager=False).established()
    streams = [pair.client.open() for _ in range(4)]
    for seen in streams:
        pair.client.write(seen, b"z" * 1_000_000)
    pair.settle()
    assert all(seen.stream.credit == 0 and seen.stream.queued for seen in streams)
    number = pair.client.machine.lifecycle.keepalive.number
    pair.drive_bounded(lambda: pair.client.machine.lifecycle.keepalive.number >= number + 5)
    pair.settle()
    pair.client.machine.authenticate(Auth("oidc", "renewed"))
    pair.client.reset(streams[3])
    pair.settle()
    assert len([e for e in pair.agent.events if isinstance(e, Auth)]) == 2
    assert pair.agent.seen[streams[3].stream.id].ends
    for seen in streams[:3]:
        other = pair.agent.seen[seen.stream.id]
        pair.agent.eager = True
        pair.agent.take(other, other.unread)
    pair.settle()
    assert all(len(pair.agent.seen[seen.stream.id].read) == 1_000_000 for seen in streams[:3])
    pair.check_books()


def test_the_goaway_of_a_long_message_fits() -> None:
    one = agent()
    longest = Refusal(max(RefusalRule, key=len), "x" * MAX_WANTED)
    one.machine.close(GoawayCode.INTERNAL, "\U0001f600" * 5000, 2**32, longest)
    one.collect()
    goaway = one.goaway()
    assert Refusal(RefusalRule(goaway.rule), goaway.wanted) == longest


@pytest.mark.parametrize("kind", Kind)
def test_the_end_of_the_connection_after_a_goaway_has_its_reason(kind: Kind) -> None:
    one = client() if kind is Kind.SESSION else control(Side.INITIATOR, State.OPEN)
    if kind is Kind.SESSION:
        one.machine.open_stream("kubernetes")
    one.feed(frame(FrameType.GOAWAY, 0, Goaway(9, GoawayCode.DRAINING, "restart", 7).encode()))
    assert one.machine.state is not State.CLOSED
    one.machine.connection_lost(one.now, ConnectionLost("closed"))
    assert isinstance(one.machine.lifecycle.error, SessionEnded)
    assert (one.machine.lifecycle.error.code, one.machine.lifecycle.error.message) == (GoawayCode.DRAINING, "restart")
    assert one.machine.lifecycle.error.retry_after == 7

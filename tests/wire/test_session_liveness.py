"""Silence, deadlines and the keepalive (docs/threats.md#M14)."""

from __future__ import annotations

import pytest

from arcbridge.errors import ConnectionLost, LocalProtocolError, SessionEnded
from arcbridge.refusals import MAX_WANTED, Refusal, RefusalRule
from arcbridge.wire import events as ev
from arcbridge.wire.frames import (
    MAX_DATA,
    FrameType,
    GoawayCode,
    ResetCode,
    frame,
    pack_header,
)
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk, Dial, Goaway, Open, Revoke, Status
from arcbridge.wire.session import Kind, Side, State
from tests.support.pair import End, Pair
from tests.wire.scripted import OK, Scripted, ack, agent, client, data, hello, opening, reset, window
from tests.wire.session_states import AUTH_OK, UNCAPPED, control


@pytest.mark.parametrize("kind", Kind)
def test_m14_an_idle_connection_costs_little_and_no_ack(kind: Kind) -> None:
    pair = Pair(kind, limits=Limits(ack_every=1000))
    pair.drive_bounded(lambda: all(end.machine.state is State.OPEN for end in pair.ends))
    pair.settle()
    before = [end.machine.stats.bytes_sent for end in pair.ends]
    start = pair.now
    acks = []
    for end in pair.ends:
        handler = end.machine.receiver.handlers[FrameType.ACK]
        end.machine.receiver.handlers[FrameType.ACK] = lambda i, b, handler=handler: (acks.append(b), handler(i, b))[1]
    pair.drive_bounded(lambda: pair.now - start > 600, 5000)
    for end, sent in zip(pair.ends, before, strict=True):
        assert end.machine.error is None
        assert (end.machine.stats.bytes_sent - sent) / 600 < 20, "bytes per second"
    assert not acks


def _pings(end: End) -> int:
    keepalive = end.machine.lifecycle.keepalive
    assert keepalive is not None
    return keepalive.number


@pytest.mark.parametrize("kind", Kind)
def test_an_idle_connection_is_pinged_by_who_made_it_alone(kind: Kind) -> None:
    pair = Pair(kind)
    pair.drive_bounded(lambda: all(end.machine.state is State.OPEN for end in pair.ends))
    pair.settle()
    client, agent = _pings(pair.client), _pings(pair.agent)
    start = pair.now
    pair.drive_bounded(lambda: pair.now - start > 600, 5000)
    assert _pings(pair.client) - client >= 59
    assert _pings(pair.agent) - agent <= 1
    assert all(end.machine.error is None for end in pair.ends)


def test_while_payload_comes_both_ends_measure_the_round_trip() -> None:
    pair = Pair().established()
    seen = pair.client.open()
    pair.settle()
    before, start, last = _pings(pair.agent), pair.now, 0

    def written() -> bool:
        nonlocal last
        if _pings(pair.client) > last:  # one byte between two PINGs is enough
            last = _pings(pair.client)
            pair.client.write(seen, b"x")
        return pair.now - start > 300

    pair.drive_bounded(written, 10**4)
    assert _pings(pair.agent) - before >= 14


def test_an_accepting_end_pings_when_the_other_falls_silent() -> None:
    pair = Pair().established()
    pair.settle()
    pair.client.machine.lifecycle.keepalive = None
    before, start = _pings(pair.agent), pair.now
    pair.drive_bounded(lambda: _pings(pair.agent) > before, 1000)
    assert pair.now - start <= 20.1


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


def test_a_way_out_that_is_cut_is_noticed_though_the_way_in_works() -> None:
    pair = Pair(limits=Limits(replay=0)).established()
    start = pair.now

    def deaf() -> bool:
        pair.agent.arrivals.clear()
        if not pair.client.arrivals:
            pair.client.arrivals.append((pair.now + 1.0, frame(129, 0)))
        return pair.client.error is not None

    pair.agent.machine.lifecycle.keepalive = None  # the agent does not notice; only the client's view counts here
    pair.drive_bounded(deaf, 10**5)
    assert 20 < pair.now - start < 46


def test_control_connections_carry_dials_and_statuses() -> None:
    pair = Pair(Kind.CONTROL)
    pair.client.machine.send(Status(instance="i", ready=True))
    pair.agent.machine.send(Dial("early"))  # before HELLO: waits for it
    pair.drive_bounded(lambda: all(end.machine.state is State.OPEN for end in pair.ends))
    pair.agent.machine.send(Dial("token", "relay:443", "c", "join", "", 10, 1))
    pair.settle()
    dials = [e.dial.token for e in pair.client.events if isinstance(e, ev.DialReceived)]
    assert dials == ["early", "token"]
    assert [e.status.ready for e in pair.agent.events if isinstance(e, ev.StatusReceived)] == [True]
    assert pair.client.machine.received == pair.agent.machine.sent
    assert pair.agent.machine.received == pair.client.machine.sent


def test_a_list_of_revocations_leaves_at_once_and_before_hello_waits() -> None:
    """10 000 users are 600 KB: more than control frames may wait, and less than an agent takes for a flood."""
    pair = Pair(Kind.CONTROL)
    told = [Revoke(f"user-{n}@example.com", 1_700_000_000 + n, n == 0, "left the company") for n in range(10_000)]
    for revoke in told:
        pair.agent.machine.send(revoke)
    pair.settle()
    assert [e.revoke for e in pair.client.events if isinstance(e, ev.RevokeReceived)] == told
    assert all(end.machine.state is State.OPEN for end in pair.ends)
    with pytest.raises(LocalProtocolError, match="only a relay"):
        pair.client.machine.send(Revoke("jane", 1))
    with pytest.raises(LocalProtocolError, match="more than 4096"):
        pair.agent.machine.send(Revoke("j" * 4096, 1))


def test_the_byte_counts_agree() -> None:
    pair = Pair().established()
    seen = pair.client.open()
    pair.client.write(seen, b"x" * 2_000_000)
    pair.settle()
    assert pair.client.machine.sent == pair.agent.machine.received
    assert pair.agent.machine.sent == pair.client.machine.received
    assert pair.client.machine.sender.peer_received > pair.client.machine.sent - 300_000, "ACKs came"


def test_control_frames_pass_while_all_windows_are_zero() -> None:
    pair = Pair(eager=False).established()
    streams = [pair.client.open() for _ in range(4)]
    for seen in streams:
        pair.client.write(seen, b"z" * 1_000_000)
    pair.settle()
    assert all(seen.stream.credit == 0 and seen.stream.queued for seen in streams)
    number = pair.client.machine.lifecycle.keepalive.number  # type: ignore[union-attr]
    pair.drive_bounded(lambda: pair.client.machine.lifecycle.keepalive.number >= number + 5)  # type: ignore[union-attr]
    pair.settle()
    pair.client.machine.authenticate(Auth("oidc", "renewed"))
    pair.client.reset(streams[3])
    pair.settle()
    assert len([e for e in pair.agent.events if isinstance(e, ev.AuthReceived)]) == 2
    assert pair.agent.seen[streams[3].stream.id].ends
    for seen in streams[:3]:
        other = pair.agent.seen[seen.stream.id]
        pair.agent.eager = True
        pair.agent.take(other, other.unread)
    pair.settle()
    assert all(len(pair.agent.seen[seen.stream.id].read) == 1_000_000 for seen in streams[:3])
    pair.check_books()


def test_payload_waits_in_its_stream_while_the_socket_takes_nothing() -> None:
    one = client(UNCAPPED)
    a, b = one.machine.open_stream("a"), one.machine.open_stream("b")
    one.feed(window(0, 10**6))
    one.machine.sender.set_writable(False)
    for _ in range(10):
        one.machine.sender.send(a, b"a" * 20_000)
        assert not one.machine.sender.has_output
        assert one.machine.sender.data_to_send(1 << 20) == []
    one.machine.sender.send(b, b"keystroke")
    one.machine.sender.set_writable(True)
    one.said.clear()
    one.collect()
    assert [stream for _, stream, _ in one.said] == [b.id, a.id], "a keystroke waits for nothing that was not written"


def test_a_stream_alone_sends_large_frames() -> None:
    one = client(UNCAPPED)
    stream = one.machine.open_stream("a")
    one.feed(window(0, 10**7), window(1, 10**7))
    one.said.clear()
    one.machine.sender.send(stream, b"x" * 2_000_000)
    one.collect()
    assert max(len(body) for _, _, body in one.said) == MAX_DATA


def test_streams_share_alike() -> None:
    one = client()
    streams = [one.machine.open_stream(str(n)) for n in range(4)]
    one.feed(window(0, 10**7))
    for stream in streams:
        one.machine.sender.send(stream, b"x" * 257_000)  # more than the first credit: queued
    one.said.clear()
    while parts := one.machine.sender.data_to_send(64 * 1024):
        one._decoder.feed(memoryview(b"".join(parts)), one)
        sent = [stream.bytes_sent for stream in streams]
        if min(stream.queued for stream in streams) > 20_000:
            assert max(sent) - min(sent) <= 2 * DEFAULT.frame_shared


def test_a_reset_in_the_middle_of_a_frame_leaks_no_credit() -> None:
    one = agent().feed(opening(1))
    raw = data(1, 100_000)
    one.feed(raw[:50_000])
    stream = one.machine.streams[1]
    one.machine.stream_table.reset(stream, ResetCode.CANCELLED)
    assert one.machine.unconsumed == 0
    one.feed(raw[50_000:], data(1, 77))
    assert one.machine.unconsumed == 0
    assert not stream.inbox
    one.feed(opening(3), data(3, 10))
    assert one.machine.error is None


def test_the_goaway_of_a_long_message_fits() -> None:
    one = agent()
    longest = Refusal(max(RefusalRule, key=len), "x" * MAX_WANTED)
    one.machine.close(GoawayCode.INTERNAL, "\U0001f600" * 5000, 2**32, longest)
    one.collect()
    goaway = one.goaway()
    assert goaway is not None
    assert (goaway.rule, goaway.wanted) == longest


def test_records_too_large_for_their_frame_are_the_callers_mistake() -> None:
    one = Scripted(Side.ACCEPTOR, Kind.CONTROL).feed(hello())
    with pytest.raises(LocalProtocolError):
        one.machine.send(Dial("t" * 5000))
    two = agent(accepted=False)
    with pytest.raises(LocalProtocolError):
        two.machine.accept_auth(AuthOk(b"", b"", "s" * 5000, 1))
    two.machine.accept_auth(OK)
    assert Open("x").encode()
    assert Goaway().encode() == b""


def test_the_peers_limit_of_streams() -> None:
    one = Scripted(Side.INITIATOR).feed(hello(max_streams=2), AUTH_OK)
    streams = [one.machine.open_stream("a") for _ in range(2)]
    with pytest.raises(SessionEnded) as caught:
        one.machine.open_stream("a")
    assert caught.value.code == GoawayCode.LIMIT
    one.machine.stream_table.reset(streams[0], ResetCode.CANCELLED)
    one.machine.open_stream("a")


def test_stream_limit_of_ours_refuses_for_another_try() -> None:
    one = agent(Limits(max_streams=1)).feed(opening(1), opening(3))
    assert one.resets() == {3: ResetCode.REFUSED}
    one.feed(reset(1, ResetCode.CANCELLED), opening(5))
    assert 5 in one.machine.streams


@pytest.mark.parametrize("kind", Kind)
def test_the_end_of_the_connection_after_a_goaway_has_its_reason(kind: Kind) -> None:
    one = client() if kind is Kind.SESSION else control(Side.INITIATOR, State.OPEN)
    if kind is Kind.SESSION:
        one.machine.open_stream("kubernetes")
    one.feed(frame(FrameType.GOAWAY, 0, Goaway(9, GoawayCode.DRAINING, "restart", 7).encode()))
    assert one.machine.state is not State.CLOSED
    one.machine.receive_eof(one.now)
    assert isinstance(one.machine.error, SessionEnded)
    assert (one.machine.error.code, one.machine.error.message) == (GoawayCode.DRAINING, "restart")
    assert one.machine.error.retry_after == 7


def test_the_path_is_told_whether_a_sparse_stream_sends_beside_bulk() -> None:
    one = client()
    machine = one.machine
    one.feed(window(0, 10**7))
    bulk, keys = machine.open_stream("kubernetes"), machine.open_stream("kubernetes")
    one.feed(window(bulk.id, 10**7))
    flight = machine.sender.congestion
    assert flight is not None

    def confirm(now: float) -> bool:
        machine.sender.data_to_send(MAX_DATA, now)
        machine.receive_data(memoryview(ack(machine.sent)), now)
        return flight.interactive

    machine.sender.send(bulk, bytes(100_000))
    assert not confirm(510.0)
    machine.sender.send(bulk, bytes(100_000))
    assert not confirm(510.1), "nothing waits behind it"
    machine.sender.send(keys, b"k")
    machine.sender.send(bulk, bytes(100_000))
    assert confirm(510.2)
    machine.sender.send(bulk, bytes(100_000))
    assert confirm(510.4), "a moment ago there was another one"
    machine.sender.send(bulk, bytes(100_000))
    assert not confirm(511.0)


def test_payload_that_waited_is_not_copied_again() -> None:
    one = client(UNCAPPED)
    machine = one.machine
    stream = machine.open_stream("kubernetes")
    machine.sender.data_to_send(MAX_DATA)
    machine.sender.set_writable(False)
    chunk = bytes(range(256)) * 200
    machine.sender.send(stream, chunk)
    (waiting,) = stream.outbox
    machine.sender.set_writable(True)
    header, payload = machine.sender.data_to_send(MAX_DATA)
    assert header == pack_header(len(chunk) << 8 | FrameType.DATA, stream.id)
    assert payload is waiting

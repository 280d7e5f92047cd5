"""Peers that break the rules: ids, credit, sizes, unknown types, floods (docs/threats.md#M1 to #M8)."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest

from arcbridge.errors import ConnectionLost, RemoteProtocolError, SessionEnded
from arcbridge.limiters import TokenBucket
from arcbridge.wire import events as ev
from arcbridge.wire.frames import FIRST_CREDIT, FRAMES, MAY_SEND, PING_BODY, FrameType, GoawayCode, ResetCode, frame
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth
from arcbridge.wire.session import Kind, Side, State
from arcbridge.wire.window import MAX_CREDIT
from tests.support.books import take_events, unconsumed
from tests.support.pair import Pair
from tests.wire.scripted import OK, Scripted, ack, agent, client, data, goaway, hello, opening, reset, window
from tests.wire.session_states import AUTH, PING, UNKNOWN, acceptor_hello, acceptor_open, control, initiator_hello


@pytest.mark.parametrize("wrong", [1, 0, 2, 4])
def test_m1_ids_rise_and_have_the_right_parity(wrong: int) -> None:
    one = agent().feed(opening(1), opening(wrong))
    assert isinstance(one.machine.lifecycle.error, RemoteProtocolError)


def test_m1_ids_end_without_a_wrap() -> None:
    one = agent().feed(opening(2**32 - 5), opening(2**32 - 3), opening(2**32 - 1))
    assert len(one.of(ev.StreamOpened)) == 3
    one = client()
    one.machine.stream_table.next_id = 0x7FFFFFFF
    assert one.machine.open_stream("kubernetes").id == 0x7FFFFFFF
    with pytest.raises(SessionEnded):
        one.machine.open_stream("kubernetes")
    one.collect()
    assert (one.machine.state, one.code()) == (State.DRAINING, GoawayCode.DONE), "another session can take its place"
    one.feed(reset(0x7FFFFFFF, ResetCode.CANCELLED))
    assert one.machine.state is State.CLOSED


# -- docs/threats.md#M2, #M3: credit ---------------------------------------------------------------------------------


def test_m2_grants() -> None:
    one = agent().feed(opening(1), window(1, MAX_CREDIT - 256 * 1024), window(1, 1))
    assert one.resets() == {1: ResetCode.FLOW_CONTROL}
    assert one.machine.state is State.OPEN
    one = agent().feed(opening(1), opening(3), window(1, 0))
    assert one.resets() == {1: ResetCode.FLOW_CONTROL}
    one.feed(window(1, 5))
    assert one.machine.lifecycle.error is None, "a grant on a closed stream is a race"
    one = agent().feed(window(0, MAX_CREDIT))
    assert one.goaway() is not None
    assert one.machine.state is State.CLOSED
    one = agent().feed(window(0, 0))
    assert isinstance(one.machine.lifecycle.error, RemoteProtocolError)


def test_m3_more_than_the_streams_window_is_an_error_of_the_stream() -> None:
    limits = Limits(stream_window=FIRST_CREDIT, max_stream_window=FIRST_CREDIT)
    one = agent(limits).feed(opening(1), opening(3), data(3, 100))
    neighbour = one.of(ev.StreamOpened)[1].stream
    one.feed(data(1, FIRST_CREDIT), data(1, 1), data(3, 50))
    assert one.resets() == {1: ResetCode.FLOW_CONTROL}
    assert b"".join(neighbour.inbox) == b"d" * 150
    assert [e.code for e in one.of(ev.StreamWasReset)] == [ResetCode.FLOW_CONTROL]
    assert unconsumed(one.machine) == 150


def test_m3_more_than_the_first_credit_is_refused_before_auth() -> None:
    one = agent(accepted=False).feed(opening(1), data(1, FIRST_CREDIT))
    assert one.machine.lifecycle.error is None
    one.feed(data(1, 1))
    assert one.machine.state is State.CLOSED
    one.collect()
    assert one.code() == GoawayCode.FLOW_CONTROL


# -- docs/threats.md#M4, #M5, #M6 ------------------------------------------------------------------------------------


def recorded_session() -> bytes:
    """Return the bytes that a client sends in a whole small session."""
    return b"".join(
        (
            hello(),
            AUTH,
            window(0, 100_000),
            opening(1),
            data(1, 300),
            PING,
            opening(3, "tcp:db"),
            frame(FrameType.FIN, 1),
            data(3, 5),
            reset(3, ResetCode.CANCELLED),
            ack(0),
            frame(UNKNOWN[0], 0, b"later"),
            goaway(GoawayCode.DONE),
        )
    )


def test_m5_truncation_is_never_a_clean_end() -> None:
    whole = recorded_session()
    for cut in range(len(whole)):
        one = Scripted(Side.ACCEPTOR)
        one.feed(whole[: min(cut, len(hello() + AUTH))])
        if one.of(Auth):
            one.machine.accept_auth(OK)
        one.feed(whole[min(cut, len(hello() + AUTH)) : cut])
        one.machine.connection_lost(one.now, ConnectionLost("closed"))
        one.collect()
        assert isinstance(one.machine.lifecycle.error, ConnectionLost)
        assert len(one.of(ev.Ended)) == 1
        if one.machine.streams.get(1):
            assert not one.of(ev.StreamFinished) or cut >= whole.index(frame(FrameType.FIN, 1)) + 8


@pytest.mark.parametrize(("version", "least"), [(0, 0), (2, 2), (2**16 - 1, 2), (0, 1)])
@pytest.mark.parametrize("make", [initiator_hello, acceptor_hello])
def test_m6_another_version_is_refused_and_both_are_named(
    make: Callable[[], Scripted], version: int, least: int
) -> None:
    one = make().feed(hello(version=version, least=least))
    said = one.goaway()
    assert said.code == GoawayCode.VERSION
    assert f"{least} to {version}" in said.message
    assert "only 1" in said.message
    assert one.kinds()[0] == FrameType.HELLO, "the refusal is readable: HELLO comes first"


def test_m6_a_later_peer_that_still_speaks_ours_is_fine() -> None:
    one = acceptor_hello().feed(hello(version=9, least=1, features="compression gzip later"))
    assert one.machine.state is State.AUTH
    one.feed(AUTH)
    one.machine.accept_auth(OK)
    one.collect()
    assert b"compression" not in one.said[0][2], "no feature is taken up"


def test_m6_ignorable_frames_are_skipped() -> None:
    one = acceptor_open()
    for kind in UNKNOWN:
        one.feed(frame(kind, kind, b"x" * kind))
    assert one.machine.lifecycle.error is None


# -- docs/threats.md#M7, #M8: floods ---------------------------------------------------------------------------------


def test_m7_rapid_reset_ends_the_session() -> None:
    one = agent()
    opened = 0
    for n in range(2000):
        one.feed(opening(2 * n + 1), reset(2 * n + 1, ResetCode.CANCELLED))
        opened = n
        if one.machine.state is State.CLOSED:
            break
    assert DEFAULT.churn_burst <= opened <= DEFAULT.churn_burst + 1
    assert one.code() == GoawayCode.LIMIT


@pytest.mark.parametrize("how", ["overrun", "zero grant", "late data", "second FIN", "over the limit"])
def test_m7_resets_that_the_peer_provokes_count_too(how: str) -> None:
    one = agent(Limits(max_streams=1) if how == "over the limit" else DEFAULT)
    for n in range(2000):
        stream = 2 * n + 1
        fin = frame(FrameType.FIN, stream)
        flight = {
            "overrun": data(stream, FIRST_CREDIT) + data(stream, DEFAULT.stream_window),
            "zero grant": window(stream, 0),
            "late data": fin + data(stream, 1),
            "second FIN": fin + fin,
            "over the limit": b"",
        }[how]
        one.feed(opening(stream), flight)
        if one.machine.state is State.CLOSED:
            break
    assert DEFAULT.churn_burst <= n <= DEFAULT.churn_burst + 1
    assert one.code() == GoawayCode.LIMIT


def test_m7_sessions_that_share_an_allowance_have_one_burst() -> None:
    """A peer that begins a new session for each burst gets no more than with one."""
    allowance, ended = TokenBucket(DEFAULT.churn_burst, 0.0), 0
    for _ in range(3):
        one = agent()
        one.machine.stream_table.churn = allowance
        for n in range(DEFAULT.churn_burst // 2 + 1):
            if one.machine.state is not State.CLOSED:
                one.feed(opening(2 * n + 1), reset(2 * n + 1, ResetCode.CANCELLED))
                ended += 1
        assert (one.machine.state is State.CLOSED) == (ended > DEFAULT.churn_burst)
    assert ended == DEFAULT.churn_burst + 2, "the third session ended with its first such stream"


def test_m7_an_honest_rate_of_cancellations_is_fine() -> None:
    one = agent()
    for n in range(5000):
        one.now += 1 / 30
        one.feed(opening(2 * n + 1), reset(2 * n + 1, ResetCode.CANCELLED))
    assert one.machine.lifecycle.error is None
    assert not one.machine.streams


def test_m7_ordinary_closes_do_not_count() -> None:
    one = agent()
    for n in range(3000):
        one.now += 1 / 1500
        stream = 2 * n + 1
        one.feed(opening(stream))
        one.machine.streams[stream].owed = False  # the application has answered
        one.feed(frame(FrameType.FIN, stream), reset(stream, ResetCode.NO_ERROR))
        one.feed(reset(stream, ResetCode.NO_ERROR))  # as if our close had crossed theirs
    assert one.machine.lifecycle.error is None


FLOODS = {
    "PING": PING,
    "empty DATA": frame(FrameType.DATA, 1),
    "WINDOW of 1": window(1, 1),
    "WINDOW of 1, session": window(0, 1),
    "ACK": ack(0),
    "AUTH": AUTH,
    "PONG": frame(FrameType.PONG, 0, PING_BODY.pack(1, 0)),
    "QUIET": frame(FrameType.QUIET, 0),
    "ignorable": frame(UNKNOWN[0], 0),
    "GOAWAY": goaway(GoawayCode.DRAINING, 9),
}


@pytest.mark.parametrize("name", FLOODS)
def test_m8_control_floods_from_a_peer_that_does_not_read(name: str) -> None:
    one = acceptor_open()
    one.collect()
    one.machine.sender.set_writable(False)
    many = memoryview(FLOODS[name] * 500)
    frames = 0
    tracemalloc.start()
    try:
        while one.machine.state is not State.CLOSED:
            one.machine.receive_data(many, one.now)
            take_events(one.machine)
            frames += 500
            assert frames <= 50_000, "the flood goes on"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1024 * 1024
    assert frames >= 15_000, "an honest burst fits"
    assert isinstance(one.machine.lifecycle.error, RemoteProtocolError)


@pytest.mark.parametrize(
    "kind", sorted(set(FrameType) - {FrameType.HELLO, FrameType.OPEN, FrameType.DATA, FrameType.FIN, FrameType.RESET})
)
def test_m8_every_type_without_a_bound_of_its_own_counts_as_part_of_a_flood(kind: FrameType) -> None:
    """HELLO comes once, payload has credit, and what opens and ends streams has the streams' own bounds."""
    for connection, peer in MAY_SEND[FRAMES[kind].sender]:
        if connection is Kind.CONTROL:
            one = control(Side.ACCEPTOR if peer is Side.INITIATOR else Side.INITIATOR, State.OPEN)
        else:
            one = agent() if peer is Side.INITIATOR else client()
        one.machine.receiver.control_budget.take(one.now, 1e9)
        one.feed(frame(kind, 0, bytes(FRAMES[kind].smallest)))
        assert one.code() == GoawayCode.LIMIT


def test_m8_ends_of_streams_that_are_over_count_as_part_of_a_flood() -> None:
    one = agent().feed(opening(1), reset(1, ResetCode.CANCELLED), frame(FrameType.FIN, 1))
    assert one.machine.state is State.OPEN, "a race"
    one.feed(frame(FrameType.FIN, 1) * (DEFAULT.small_frame_burst + 1))
    assert one.code() == GoawayCode.LIMIT


def test_m8_an_honest_download_is_no_flood() -> None:
    pair = Pair(latency=0.0001).established()
    seen = pair.client.open()
    for _ in range(200):
        pair.agent.write(pair.agent.seen[1], b"x" * 1_000_000) if 1 in pair.agent.seen else None
        pair.settle()
    assert pair.client.machine.lifecycle.error is None
    assert len(seen.read) > 100_000_000

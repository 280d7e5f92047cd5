"""The session machine: every state and input, every malformed class (docs/threats.md#M1 to #M14), drains, early
streams, deadlines. `test_session_properties.py` has what must hold for any sequence.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest

from arcbridge.errors import ConnectionLost, LocalProtocolError, RemoteProtocolError, SessionEnded
from arcbridge.limiters import TokenBucket
from arcbridge.wire import events as ev
from arcbridge.wire.frames import (
    FIRST_CREDIT,
    FRAMES,
    IGNORABLE_FROM,
    MAX_DATA,
    MAY_SEND,
    PING_BODY,
    FrameType,
    GoawayCode,
    ResetCode,
    frame,
    pack_header,
)
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk, Dial, Goaway, Move, Open, Revoke, Status
from arcbridge.wire.session import Kind, Session, Side, State
from arcbridge.wire.window import MAX_CREDIT
from tests.support.pair import End, Pair
from tests.wire.scripted import OK, Scripted, ack, agent, client, data, goaway, hello, opening, reset, window

AUTH = frame(FrameType.AUTH, 0, Auth("oidc", "canary-token").encode())
AUTH_OK = frame(FrameType.AUTH_OK, 0, OK.encode())
PING = frame(FrameType.PING, 0, PING_BODY.pack(7, 0))
UNCAPPED = Limits(under_way=0)
"""For a peer that confirms nothing."""
UNKNOWN = sorted(set(range(IGNORABLE_FROM, 256)) - set(FrameType))
"""Types of the ignorable range that this version does not know."""


# -- the table ----------------------------------------------------------------------------------------------------


def initiator_hello() -> Scripted:
    return Scripted(Side.INITIATOR)


def initiator_auth() -> Scripted:
    one = Scripted(Side.INITIATOR).feed(hello())
    one.machine.open_stream("kubernetes")
    return one


def initiator_open() -> Scripted:
    one = client()
    one.machine.open_stream("kubernetes")
    return one.feed(opening(2))


def initiator_draining() -> Scripted:
    one = initiator_open()
    one.machine.goaway(GoawayCode.DRAINING)
    return one


def acceptor_hello() -> Scripted:
    return Scripted(Side.ACCEPTOR)


def acceptor_auth() -> Scripted:
    return Scripted(Side.ACCEPTOR).feed(hello())


def acceptor_verifying() -> Scripted:
    return agent(accepted=False).feed(opening(1))


def acceptor_open() -> Scripted:
    one = agent().feed(opening(1))
    one.machine.open_stream("kubernetes")
    return one


def acceptor_draining() -> Scripted:
    one = acceptor_open()
    one.machine.goaway(GoawayCode.DRAINING)
    return one


def closed() -> Scripted:
    one = acceptor_open()
    one.machine.close(GoawayCode.DONE, "over")
    one.collect()
    return one


def control(side: Side, state: State) -> Scripted:
    one = Scripted(side, Kind.CONTROL)
    if state is not State.HELLO:
        one.feed(hello())
    if state is State.DRAINING:
        one.machine.goaway(GoawayCode.DRAINING, "bye", 3)
    return one


HANDSHAKING = {"GOAWAY", "GOAWAY fatal", "eof"}
STREAMS = {
    *("OPEN", "DATA", "FIN", "RESET", "WINDOW", "WINDOW 0", "ACK", "PING", "PONG", "QUIET", "ignorable"),
    *HANDSHAKING,
}
BASIC = {"ACK", "PING", "PONG", "ignorable"} | HANDSHAKING

STATES: dict[str, tuple[Callable[[], Scripted], State, set[str]]] = {
    "initiator HELLO": (initiator_hello, State.HELLO, {"HELLO"} | HANDSHAKING),
    "initiator AUTH": (initiator_auth, State.AUTH, {"AUTH_OK", "ignorable"} | HANDSHAKING),
    "initiator OPEN": (initiator_open, State.OPEN, {"AUTH_OK", "MOVE"} | STREAMS),
    "initiator DRAINING": (initiator_draining, State.DRAINING, {"AUTH_OK", "MOVE"} | STREAMS),
    "acceptor HELLO": (acceptor_hello, State.HELLO, {"HELLO"} | HANDSHAKING),
    "acceptor AUTH": (acceptor_auth, State.AUTH, {"AUTH", "ignorable"} | HANDSHAKING),
    "acceptor AUTH, verifying": (acceptor_verifying, State.AUTH, STREAMS),
    "acceptor OPEN": (acceptor_open, State.OPEN, {"AUTH"} | STREAMS),
    "acceptor DRAINING": (acceptor_draining, State.DRAINING, {"AUTH"} | STREAMS),
    "agent control HELLO": (lambda: control(Side.INITIATOR, State.HELLO), State.HELLO, {"HELLO"} | HANDSHAKING),
    "agent control OPEN": (lambda: control(Side.INITIATOR, State.OPEN), State.OPEN, {"DIAL", "REVOKE"} | BASIC),
    "agent control DRAINING": (
        lambda: control(Side.INITIATOR, State.DRAINING),
        State.DRAINING,
        {"DIAL", "REVOKE"} | BASIC,
    ),
    "relay control HELLO": (lambda: control(Side.ACCEPTOR, State.HELLO), State.HELLO, {"HELLO"} | HANDSHAKING),
    "relay control OPEN": (lambda: control(Side.ACCEPTOR, State.OPEN), State.OPEN, {"STATUS"} | BASIC),
    "relay control DRAINING": (lambda: control(Side.ACCEPTOR, State.DRAINING), State.DRAINING, {"STATUS"} | BASIC),
    "closed": (closed, State.CLOSED, set()),
}

INPUTS: dict[str, Callable[[int], bytes]] = {
    "HELLO": lambda _: hello(),
    "AUTH": lambda _: AUTH,
    "AUTH_OK": lambda _: AUTH_OK,
    "OPEN": lambda parity: opening(100 + parity),
    "DATA": lambda _: data(1, 10),
    "FIN": lambda _: frame(FrameType.FIN, 1),
    "RESET": lambda _: reset(1, ResetCode.CANCELLED),
    "WINDOW": lambda _: window(1, 5),
    "WINDOW 0": lambda _: window(0, 5),
    "ACK": lambda _: ack(0),
    "PING": lambda _: PING,
    "PONG": lambda _: frame(FrameType.PONG, 0, PING_BODY.pack(1, 0)),
    "GOAWAY": lambda _: goaway(GoawayCode.DRAINING, 1000),
    "GOAWAY fatal": lambda _: goaway(GoawayCode.REVOKED),
    "DIAL": lambda _: frame(FrameType.DIAL, 0, Dial("canary").encode()),
    "STATUS": lambda _: frame(FrameType.STATUS, 0, Status("canary").encode()),
    "MOVE": lambda _: frame(FrameType.MOVE, 0, Move("join").encode()),
    "QUIET": lambda _: frame(FrameType.QUIET, 0),
    "REVOKE": lambda _: frame(FrameType.REVOKE, 0, Revoke("jane", 1_700_000_000).encode()),
    "ignorable": lambda _: frame(UNKNOWN[0], 9, b"later"),
    # Never lawful.
    "unknown type": lambda _: frame(99, 0),
    "OPEN of the other parity": lambda parity: opening(101 - parity),
    "OPEN on id 0": lambda _: opening(0),
    "DATA on id 0": lambda _: data(0, 1),
    "DATA on no stream": lambda _: data(5001, 1),
    "FIN on no stream": lambda _: frame(FrameType.FIN, 5001),
    "RESET on no stream": lambda _: reset(5002, 0),
    "WINDOW on no stream": lambda _: window(5002, 1),
    "PING on a stream": lambda _: frame(FrameType.PING, 1, PING_BODY.pack(7, 0)),
    "HELLO on a stream": lambda _: frame(FrameType.HELLO, 1, b""),
    "ACK of bytes never sent": lambda _: ack(2**63),
    "broken record": lambda _: frame(FrameType.GOAWAY, 0, b"\x01"),
}


def test_every_type_is_an_input() -> None:
    assert {kind.name for kind in FrameType} - set(INPUTS) == set()


@pytest.mark.parametrize("what", [*INPUTS, "eof", "loss"])
@pytest.mark.parametrize("state", STATES)
def test_every_input_in_every_state(state: str, what: str) -> None:
    make, before, legal = STATES[state]
    one = make()
    one.collect()
    machine = one.machine
    assert machine.state is before
    events = len(one.events)
    if what == "eof":
        machine.receive_eof(one.now)
        one.collect()
    elif what == "loss":
        machine.connection_lost(one.now, ConnectionLost("cut"))
        one.collect()
    else:
        parity = 0 if machine.side is Side.INITIATOR else 1
        one.feed(INPUTS[what](parity))
    news = one.events[events:]
    ends = [event for event in news if isinstance(event, ev.Ended)]
    if before is State.CLOSED:
        assert news == []
        assert machine.state is State.CLOSED
    elif what in ("eof", "loss"):
        assert isinstance(machine.error, ConnectionLost)
        assert len(ends) == 1
    elif what == "GOAWAY fatal" and what in legal:
        assert isinstance(machine.error, SessionEnded)
        assert machine.error.code == GoawayCode.REVOKED
    elif what == "GOAWAY" and what in legal:
        if machine.kind is Kind.SESSION:
            assert machine.state is (State.DRAINING if machine.streams else State.CLOSED)
        else:
            assert machine.state is before
    elif what in legal:
        assert machine.error is None, machine.error
        assert not ends
        assert one.goaway() is None or before is State.DRAINING
        follows = {"HELLO": State.OPEN if machine.kind is Kind.CONTROL else State.AUTH}
        if before is State.AUTH and what == "AUTH_OK":
            follows["AUTH_OK"] = State.OPEN
        assert machine.state is follows.get(what, before)
    else:
        assert isinstance(machine.error, RemoteProtocolError), "the peer's mistake ends the machine"
        assert machine.state is State.CLOSED
        assert len(ends) == 1
        assert news[-1] is ends[0]
        said = one.goaway()
        assert said is not None, "the peer is told"
        assert said.code in (GoawayCode.PROTOCOL, GoawayCode.FLOW_CONTROL)
    assert "canary" not in repr(one.events) + repr(machine) + str(machine.error)
    # A closed session sends nothing more and wants no timer.
    if machine.state is State.CLOSED:
        assert machine.next_deadline() is None
        assert not machine.sender.has_output
        machine.handle_timer(one.now + 1e6)
        one.feed(PING, opening(999))
        assert one.events[-1:] == [ev.Ended(machine.error)]  # type: ignore[arg-type]


COMMANDS: dict[str, Callable[[Session], object]] = {
    "authenticate": lambda m: m.authenticate(Auth("oidc", "canary-token")),
    "accept_auth": lambda m: m.accept_auth(OK),
    "refuse_auth": lambda m: m.refuse_auth(GoawayCode.UNAUTHENTICATED, "no"),
    "open_stream": lambda m: m.open_stream("kubernetes"),
    "send_dial": lambda m: m.send_dial(Dial("canary")),
    "send_status": lambda m: m.send_status(Status("canary")),
    "send_revoke": lambda m: m.send_revoke(Revoke("jane", 1)),
    "goaway": lambda m: m.goaway(GoawayCode.DRAINING),
    "close": lambda m: m.close(GoawayCode.DONE, ""),
    "timer": lambda m: m.handle_timer(m.now + 1.0),
    "late timer": lambda m: m.handle_timer(m.now + 1000.0),
}


@pytest.mark.parametrize("what", COMMANDS)
@pytest.mark.parametrize("state", STATES)
def test_every_command_in_every_state(state: str, what: str) -> None:
    one = STATES[state][0]()
    before = one.machine.state
    try:
        COMMANDS[what](one.machine)
    except LocalProtocolError as error:
        assert one.machine.state is before
        assert "canary" not in str(error)  # noqa: PT017
    except SessionEnded:
        assert before in (State.DRAINING, State.CLOSED)
        assert what == "open_stream"
    one.collect()
    assert len(one.of(ev.Ended)) == (one.machine.state is State.CLOSED)


def test_the_callers_mistakes_change_nothing() -> None:
    one = client()
    stream = one.machine.open_stream("kubernetes")
    one.machine.stream_table.finish(stream)
    one.machine.stream_table.finish(stream)
    with pytest.raises(LocalProtocolError):
        one.machine.sender.send(stream, b"late")
    with pytest.raises(LocalProtocolError):
        one.machine.open_stream("t" * 2000)
    with pytest.raises(LocalProtocolError):
        one.machine.authenticate(Auth("oidc", "t" * 70_000))
    assert one.machine.open_stream("kubernetes").id == 3
    one.collect()
    assert one.kinds().count(FrameType.FIN) == 1
    fresh = Session(Side.INITIATOR, Kind.SESSION, 0.0)
    with pytest.raises(LocalProtocolError, match="before authentication"):
        fresh.open_stream("kubernetes")


# -- docs/threats.md#M1: stream ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [1, 0, 2, 4])
def test_m1_ids_rise_and_have_the_right_parity(wrong: int) -> None:
    one = agent().feed(opening(1), opening(wrong))
    assert isinstance(one.machine.error, RemoteProtocolError)


def test_m1_ids_are_never_used_twice() -> None:
    one = agent().feed(opening(5), reset(5, ResetCode.CANCELLED), opening(5))
    assert isinstance(one.machine.error, RemoteProtocolError)


def test_m1_ids_end_without_a_wrap() -> None:
    one = agent().feed(opening(2**32 - 5), opening(2**32 - 3), opening(2**32 - 1))
    assert len(one.of(ev.StreamOpened)) == 3
    one = client()
    one.machine.stream_table.next_id = 0x7FFFFFFF
    assert one.machine.open_stream("kubernetes").id == 0x7FFFFFFF
    with pytest.raises(SessionEnded):
        one.machine.open_stream("kubernetes")


# -- docs/threats.md#M2, #M3: credit ---------------------------------------------------------------------------------


def test_m2_grants() -> None:
    one = agent().feed(opening(1), window(1, MAX_CREDIT - 256 * 1024), window(1, 1))
    assert one.resets() == {1: ResetCode.FLOW_CONTROL}
    assert one.machine.state is State.OPEN
    one = agent().feed(opening(1), opening(3), window(1, 0))
    assert one.resets() == {1: ResetCode.FLOW_CONTROL}
    one.feed(window(1, 5))
    assert one.machine.error is None, "a grant on a closed stream is a race"
    one = agent().feed(window(0, MAX_CREDIT))
    assert one.goaway() is not None
    assert one.machine.state is State.CLOSED
    one = agent().feed(window(0, 0))
    assert isinstance(one.machine.error, RemoteProtocolError)


def test_m3_more_than_the_streams_window_is_an_error_of_the_stream() -> None:
    limits = Limits(stream_window=FIRST_CREDIT, max_stream_window=FIRST_CREDIT)
    one = agent(limits).feed(opening(1), opening(3), data(3, 100))
    neighbour = one.of(ev.StreamOpened)[1].stream  # type: ignore[attr-defined]
    one.feed(data(1, FIRST_CREDIT), data(1, 1), data(3, 50))
    assert one.resets() == {1: ResetCode.FLOW_CONTROL}
    assert b"".join(neighbour.inbox) == b"d" * 150
    assert [e.code for e in one.of(ev.StreamWasReset)] == [ResetCode.FLOW_CONTROL]  # type: ignore[attr-defined]
    assert one.machine.unconsumed == 150


def test_m3_more_than_the_first_credit_is_refused_before_auth() -> None:
    one = agent(accepted=False).feed(opening(1), data(1, FIRST_CREDIT))
    assert one.machine.error is None
    one.feed(data(1, 1))
    assert one.machine.state is State.CLOSED
    one.collect()
    said = one.goaway()
    assert said is not None
    assert said.code == GoawayCode.FLOW_CONTROL


def test_m3_more_than_the_sessions_window() -> None:
    limits = Limits(session_window=512 * 1024)
    one = agent(limits).feed(opening(1), opening(3), opening(5))
    one.machine.session_window.extension.most = 0  # the process has nothing left to promise
    one.feed(data(1, 256 * 1024), data(3, 256 * 1024))
    assert one.machine.error is None
    one.feed(data(5, 1))
    assert isinstance(one.machine.error, RemoteProtocolError)


# -- docs/threats.md#M4, #M5, #M6 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(FrameType))
@pytest.mark.parametrize("how", ["cap + 1", "2^24 - 1"])
def test_m4_a_length_over_the_cap_ends_the_session_and_allocates_nothing(kind: FrameType, how: str) -> None:
    one = acceptor_open()
    length = FRAMES[kind].largest + 1 if how == "cap + 1" else 2**24 - 1
    header = memoryview(pack_header(length << 8 | kind, 1))
    tracemalloc.start()
    try:
        one.machine.receive_data(header, one.now)
        assert tracemalloc.get_traced_memory()[1] < 64 * 1024
    finally:
        tracemalloc.stop()
    one.collect()
    assert isinstance(one.machine.error, RemoteProtocolError)
    said = one.goaway()
    assert said is not None
    assert said.code == GoawayCode.PROTOCOL


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
        if one.of(ev.AuthReceived):
            one.machine.accept_auth(OK)
        one.feed(whole[min(cut, len(hello() + AUTH)) : cut])
        one.machine.receive_eof(one.now)
        one.collect()
        assert isinstance(one.machine.error, ConnectionLost)
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
    assert said is not None
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


@pytest.mark.parametrize("credit", [0, 1, FIRST_CREDIT - 1, MAX_CREDIT + 1, 2**63])
def test_m6_impossible_first_windows(credit: int) -> None:
    assert isinstance(acceptor_hello().feed(hello(stream_window=credit)).machine.error, RemoteProtocolError)


def test_m6_ignorable_frames_are_skipped() -> None:
    one = acceptor_open()
    for kind in UNKNOWN:
        one.feed(frame(kind, kind, b"x" * kind))
    assert one.machine.error is None


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
    said = one.goaway()
    assert said is not None
    assert said.code == GoawayCode.LIMIT


@pytest.mark.parametrize("how", ["overrun", "zero grant", "late data", "second FIN", "over the limit"])
def test_m7_resets_that_the_peer_provokes_count_too(how: str) -> None:
    limits = Limits(max_streams=1) if how == "over the limit" else DEFAULT
    one = agent(limits)
    fin = frame(FrameType.FIN, 0)[:4]
    for n in range(3000):
        stream = 2 * n + 1
        number = stream.to_bytes(4, "big")
        flight = {
            "overrun": data(stream, 256 * 1024) + data(stream, 1),
            "zero grant": window(stream, 0),
            "late data": fin + number + data(stream, 1),
            "second FIN": (fin + number) * 2,
            "over the limit": b"",
        }[how]
        one.feed(opening(stream), flight)
        if one.machine.state is State.CLOSED:
            break
    assert n <= DEFAULT.churn_burst + 1


def test_m7_sessions_that_share_an_allowance_have_one_burst() -> None:
    """A peer that begins a new session for each burst gets no more than with one."""
    allowance, ended = TokenBucket(DEFAULT.churn_burst, 0.0), 0
    for _ in range(3):
        one = agent()
        one.machine.share_churn(allowance)
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
    assert one.machine.error is None
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
    assert one.machine.error is None


@pytest.mark.parametrize("how", ["reset in order", "FIN both ways", "refused target", "cut"])
def test_m7_streams_that_end_in_order_before_their_answer_count_too(how: str) -> None:
    """OPEN, a request and FIN: work is begun that no peer waits for (the class of MadeYouReset, CVE-2025-8671)."""
    one = agent()
    for n in range(2000):
        number = 2 * n + 1
        one.feed(opening(number), data(number, 100))
        stream, table = one.machine.streams[number], one.machine.stream_table
        if how == "reset in order":
            one.feed(frame(FrameType.FIN, number), reset(number, ResetCode.NO_ERROR))
        elif how == "FIN both ways":
            one.feed(frame(FrameType.FIN, number))
            table.finish(stream)
        elif how == "refused target":
            table.reset(stream, ResetCode.UNKNOWN_TARGET)
        else:
            one.machine.sender.send(stream, b"HTTP/1.1 200")
            table.cut(stream)
        one.collect()
        if one.machine.state is State.CLOSED:
            break
    assert DEFAULT.churn_burst <= n <= DEFAULT.churn_burst + 1
    said = one.goaway()
    assert said is not None
    assert said.code == GoawayCode.LIMIT


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
            one.machine.events_received()
            frames += 500
            assert frames <= 50_000, "the flood goes on"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1024 * 1024
    assert frames >= 15_000, "an honest burst fits"
    assert isinstance(one.machine.error, RemoteProtocolError)


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
        said = one.goaway()
        assert said is not None
        assert said.code == GoawayCode.LIMIT


def test_m8_only_the_last_ping_is_answered() -> None:
    one = acceptor_open()
    one.said.clear()
    one.feed(*(frame(FrameType.PING, 0, PING_BODY.pack(n, 0)) for n in range(100)))
    assert [PING_BODY.unpack(body)[0] for kind, _, body in one.said if kind == FrameType.PONG] == [99]


def test_m8_the_control_queue_has_a_cap() -> None:
    limits = Limits(max_queued_control=2000)
    one = Scripted(Side.ACCEPTOR, Kind.CONTROL, limits).feed(hello())
    for _ in range(1000):
        one.machine.send_dial(Dial("t" * 30))
        if one.machine.state is State.CLOSED:
            break
    assert isinstance(one.machine.error, RemoteProtocolError)
    assert one.machine.sender._control_bytes < 3000


def test_m8_an_honest_download_is_no_flood() -> None:
    pair = Pair(latency=0.0001).established()
    seen = pair.client.open()
    for _ in range(200):
        pair.agent.write(pair.agent.seen[1], b"x" * 1_000_000) if 1 in pair.agent.seen else None
        pair.settle()
    assert pair.client.machine.error is None
    assert len(seen.read) > 100_000_000


# -- docs/threats.md#M11: half-close ---------------------------------------------------------------------------------


def test_m11_fin_then_a_megabyte_the_other_way() -> None:
    pair = Pair().established()
    up = pair.client.open()
    pair.client.write(up, b"stdin")
    pair.client.finish(up)
    pair.settle()
    down = pair.agent.seen[1]
    assert down.read == b"stdin"
    assert down.finished
    pair.agent.write(down, b"o" * 1_000_000)
    pair.agent.finish(down)
    pair.settle()
    assert up.read == b"o" * 1_000_000
    assert up.ends == down.ends == ["in order"]
    pair.check_books()


@pytest.mark.parametrize("late", [data(1, 5), frame(FrameType.FIN, 1)])
def test_m11_after_fin_nothing_may_come(late: bytes) -> None:
    one = agent().feed(opening(1), data(1, 5), frame(FrameType.FIN, 1), late)
    assert one.resets() == {1: ResetCode.PROTOCOL}
    assert one.machine.state is State.OPEN


def test_m11_reset_after_fin() -> None:
    one = agent().feed(opening(1), data(1, 5), frame(FrameType.FIN, 1), reset(1, ResetCode.NO_ERROR))
    stream = one.of(ev.StreamOpened)[0].stream  # type: ignore[attr-defined]
    assert b"".join(stream.inbox) == b"ddddd", "what came before FIN stays complete"
    one.machine.receiver.consumed(stream, 5)
    assert one.machine.unconsumed == 0
    one = agent().feed(opening(1), data(1, 5), frame(FrameType.FIN, 1), reset(1, ResetCode.CANCELLED))
    stream = one.of(ev.StreamOpened)[0].stream  # type: ignore[attr-defined]
    assert not stream.inbox
    assert one.machine.unconsumed == 0
    one.machine.receiver.consumed(stream, 5)  # a late consumer settles nothing twice
    assert one.machine.unconsumed == 0
    one.machine.assert_invariants()


def test_fin_waits_for_queued_bytes_and_their_credit() -> None:
    one = client(UNCAPPED)
    stream = one.machine.open_stream("kubernetes")
    one.collect()
    one.machine.sender.send(stream, b"a" * 600_000)
    one.machine.stream_table.finish(stream)
    one.collect()
    assert FrameType.FIN not in one.kinds()
    one.feed(window(0, 10**6), window(1, 10**6))
    assert one.kinds()[-1] == FrameType.FIN
    assert sum(len(body) for kind, _, body in one.said if kind == FrameType.DATA) == 600_000


def test_who_waits_for_the_end_of_the_queue_is_told() -> None:
    one = client(UNCAPPED)
    stream = one.machine.open_stream("kubernetes")
    one.machine.sender.send(stream, b"a" * 300_000)
    one.machine.stream_table.finish(stream)
    one.collect()
    one.machine.receive_data(memoryview(window(0, 10**6) + window(1, 10**6)), one.now)
    one.machine.sender.data_to_send(1 << 20)
    assert one.machine.sender.take_unblocked() == [stream]


def test_a_blocked_writer_is_told_at_its_low_water() -> None:
    one = client(UNCAPPED)
    stream = one.machine.open_stream("kubernetes")
    one.machine.sender.send(stream, b"a" * 400_000)
    stream.low_water, stream.blocked = 10_000, True
    one.machine.sender.data_to_send(1 << 20)
    assert one.machine.sender.take_unblocked() == []
    one.machine.receive_data(memoryview(window(0, 10**6) + window(1, 100_000)), one.now)
    one.machine.sender.data_to_send(1 << 20)
    assert one.machine.sender.take_unblocked() == []
    one.machine.receive_data(memoryview(window(1, 50_000)), one.now)
    one.machine.sender.data_to_send(1 << 20)
    assert one.machine.sender.take_unblocked() == [stream]


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


def test_m12_a_stream_opened_just_before_our_own_goaway_runs() -> None:
    pair = Pair().established()
    mine = pair.client.open()
    pair.client.write(mine, b"one last")
    pair.client.machine.goaway(GoawayCode.DONE)
    pair.client.finish(mine)
    pair.settle()
    theirs = pair.agent.seen[1]
    assert theirs.read == b"one last"
    pair.agent.write(theirs, b"answer")
    pair.agent.finish(theirs)
    pair.settle()
    assert mine.read == b"answer"
    assert mine.ends == ["in order"]


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


def test_m12_many_streams_at_the_drain_deadline() -> None:
    pair = Pair(limits=Limits(drain_timeout=1.0)).established()
    for _ in range(1500):
        pair.client.open()
    pair.settle()
    assert len(pair.agent.seen) == 1500
    pair.agent.machine.goaway(GoawayCode.DRAINING)
    pair.drive_bounded(lambda: pair.agent.error is not None)
    pair.settle()
    assert all(len(seen.ends) == 1 for end in pair.ends for seen in end.seen.values())


def test_goaway_while_the_token_is_verified() -> None:
    one = agent(accepted=False).feed(opening(1), data(1, 3), frame(FrameType.FIN, 1))
    one.machine.goaway(GoawayCode.DRAINING)
    assert one.machine.state is State.DRAINING
    one.feed(opening(3))
    one.machine.accept_auth(OK)
    one.collect()
    assert one.machine.state is State.DRAINING
    assert [e.stream.id for e in one.of(ev.StreamOpened)] == [1]  # type: ignore[attr-defined]
    assert one.resets() == {3: ResetCode.REFUSED}
    one.machine.stream_table.finish(one.machine.streams[1])
    one.collect()
    assert isinstance(one.machine.error, SessionEnded)


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
    assert one.machine.unconsumed == 0, "the whole frame's credit was settled"
    one.machine.assert_invariants()


# -- docs/threats.md#M13: before AUTH --------------------------------------------------------------------------------


def test_m13_early_streams_wait_whole_and_in_order() -> None:
    one = agent(accepted=False)
    one.feed(opening(1), data(1, 10), frame(FrameType.FIN, 1), opening(3), opening(5), reset(3, ResetCode.CANCELLED))
    assert one.of(ev.StreamOpened) == one.of(ev.StreamFinished) == one.of(ev.StreamWasReset) == []
    assert FrameType.HELLO not in one.kinds()[1:]
    assert one.kinds() == [FrameType.HELLO], "nothing but HELLO is said to a stranger"
    one.machine.accept_auth(OK)
    one.collect()
    told = [(type(e).__name__, e.stream.id) for e in one.events if hasattr(e, "stream")]
    assert told == [("StreamOpened", 1), ("StreamFinished", 1), ("StreamOpened", 5)]
    assert one.kinds()[:2] == [FrameType.HELLO, FrameType.AUTH_OK]


def test_m13_refused_auth_shows_nothing() -> None:
    one = agent(accepted=False).feed(opening(1), data(1, 10))
    one.machine.refuse_auth(GoawayCode.UNAUTHENTICATED, "the token has expired")
    one.collect()
    assert not one.of(ev.StreamOpened)
    assert one.kinds() == [FrameType.HELLO, FrameType.GOAWAY]
    said = one.goaway()
    assert said is not None
    assert (said.code, said.message) == (GoawayCode.UNAUTHENTICATED, "the token has expired")


def test_m13_early_streams_beyond_the_limit_are_refused_for_another_try() -> None:
    limits = Limits(early_streams=4)
    one = agent(limits, accepted=False).feed(*(opening(2 * n + 1) for n in range(7)))
    one.machine.accept_auth(OK)
    one.collect()
    assert len(one.of(ev.StreamOpened)) == 4
    assert one.resets() == {9: ResetCode.REFUSED, 11: ResetCode.REFUSED, 13: ResetCode.REFUSED}


def test_m13_a_stranger_keeps_little_and_not_for_long() -> None:
    flights = [hello(), AUTH, *(opening(2 * n + 1) for n in range(900)), data(1, FIRST_CREDIT)]
    before = Scripted(Side.ACCEPTOR)
    for flight in flights:  # what the interpreter keeps after a first time (specialised code) is not ours
        before.machine.receive_data(memoryview(flight), before.now)
    one = Scripted(Side.ACCEPTOR)
    tracemalloc.start()
    try:
        for flight in flights:
            one.machine.receive_data(memoryview(flight), one.now)
        assert tracemalloc.get_traced_memory()[0] < 256 * 1024
    finally:
        tracemalloc.stop()
    one.machine.handle_timer(one.now + 9.9)
    assert one.machine.state is State.AUTH
    one.machine.handle_timer(one.now + 10.0)
    one.collect()
    said = one.goaway()
    assert said is not None
    assert said.code == GoawayCode.TIMEOUT


def test_m13_a_byte_per_second_does_not_extend_the_deadline() -> None:
    one = Scripted(Side.ACCEPTOR)
    for byte in hello() + AUTH:
        one.now += 1.0
        one.feed(bytes((byte,)))
        one.machine.handle_timer(one.now)
    assert isinstance(one.machine.error, SessionEnded)
    assert one.machine.error.code == GoawayCode.TIMEOUT


@pytest.mark.parametrize("what", ["FIN", "RESET", "WINDOW 0", "PING", "ACK", "OPEN", "DATA"])
def test_m13_only_the_handshake_comes_before_auth(what: str) -> None:
    one = acceptor_auth().feed(INPUTS[what](1))
    assert isinstance(one.machine.error, RemoteProtocolError)


def test_accepting_without_a_request() -> None:
    for one in (acceptor_hello(), acceptor_auth(), client()):
        with pytest.raises(LocalProtocolError):
            one.machine.accept_auth(OK)


def test_renewal() -> None:
    pair = Pair().established()
    pair.client.machine.authenticate(Auth("oidc", "renewed"))
    pair.settle()
    tokens = [e.auth.token for e in pair.agent.events if isinstance(e, ev.AuthReceived)]
    assert tokens[1:] == ["renewed"]
    assert len([e for e in pair.client.events if isinstance(e, ev.AuthAccepted)]) == 2
    pair.check_books()


# -- docs/threats.md#M14 and liveness --------------------------------------------------------------------------------


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
    pair.client.machine.send_status(Status(instance="i", ready=True))
    pair.agent.machine.send_dial(Dial("early"))  # before HELLO: waits for it
    pair.drive_bounded(lambda: all(end.machine.state is State.OPEN for end in pair.ends))
    pair.agent.machine.send_dial(Dial("token", "relay:443", "c", "join", "", 10, 1))
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
        pair.agent.machine.send_revoke(revoke)
    pair.settle()
    assert [e.revoke for e in pair.client.events if isinstance(e, ev.RevokeReceived)] == told
    assert all(end.machine.state is State.OPEN for end in pair.ends)
    with pytest.raises(LocalProtocolError, match="only a relay"):
        pair.client.machine.send_revoke(Revoke("jane", 1))
    with pytest.raises(LocalProtocolError, match="more than 4096"):
        pair.agent.machine.send_revoke(Revoke("j" * 4096, 1))


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
    one.machine.close(GoawayCode.INTERNAL, "\U0001f600" * 5000, 2**32)
    one.collect()
    assert one.goaway() is not None


def test_records_too_large_for_their_frame_are_the_callers_mistake() -> None:
    one = Scripted(Side.ACCEPTOR, Kind.CONTROL).feed(hello())
    with pytest.raises(LocalProtocolError):
        one.machine.send_dial(Dial("t" * 5000))
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

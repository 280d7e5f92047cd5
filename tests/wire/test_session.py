"""The session machine: every state and input, and what may be said before AUTH (docs/threats.md#M13).

`test_session_properties.py` has what must hold for any sequence.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

import arcbridge
from arcbridge.errors import ConnectionLost, LocalProtocolError, RemoteProtocolError, SessionEnded
from arcbridge.wire import events as ev
from arcbridge.wire.frames import FIRST_CREDIT, PING_BODY, FrameType, GoawayCode, ResetCode, frame
from arcbridge.wire.records import Auth, CaSuccession, Dial, Ledger, Move, Revoke, Status
from arcbridge.wire.session import Kind, Session, Side, State
from tests.wire.scripted import OK, Scripted, ack, agent, client, data, goaway, hello, opening, reset, window
from tests.wire.session_states import (
    AUTH,
    AUTH_OK,
    PING,
    UNKNOWN,
    acceptor_hello,
    acceptor_open,
    control,
    initiator_hello,
)

PACKAGE = Path(arcbridge.__file__).parent


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


def acceptor_auth() -> Scripted:
    return Scripted(Side.ACCEPTOR).feed(hello())


def acceptor_verifying() -> Scripted:
    return agent(accepted=False).feed(opening(1))


def acceptor_draining() -> Scripted:
    one = acceptor_open()
    one.machine.goaway(GoawayCode.DRAINING)
    return one


def closed() -> Scripted:
    one = acceptor_open()
    one.machine.close(GoawayCode.DONE, "over")
    one.collect()
    return one


HANDSHAKING = {"GOAWAY", "GOAWAY fatal"}


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
    "agent control OPEN": (
        lambda: control(Side.INITIATOR, State.OPEN),
        State.OPEN,
        {"DIAL", "REVOKE", "LEDGER", "SUCCESSION"} | BASIC,
    ),
    "agent control DRAINING": (
        lambda: control(Side.INITIATOR, State.DRAINING),
        State.DRAINING,
        {"DIAL", "REVOKE", "LEDGER", "SUCCESSION"} | BASIC,
    ),
    "relay control HELLO": (lambda: control(Side.ACCEPTOR, State.HELLO), State.HELLO, {"HELLO"} | HANDSHAKING),
    "relay control OPEN": (
        lambda: control(Side.ACCEPTOR, State.OPEN),
        State.OPEN,
        {"STATUS", "LEDGER", "SUCCESSION"} | BASIC,
    ),
    "relay control DRAINING": (
        lambda: control(Side.ACCEPTOR, State.DRAINING),
        State.DRAINING,
        {"STATUS", "LEDGER", "SUCCESSION"} | BASIC,
    ),
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
    "LEDGER": lambda _: frame(FrameType.LEDGER, 0, Ledger(b"\0\x14" + b"e" * 20).encode()),
    "SUCCESSION": lambda _: frame(FrameType.SUCCESSION, 0, CaSuccession("canary").encode()),
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


@pytest.mark.parametrize("state", STATES)
def test_every_input_in_every_state(state: str) -> None:
    for what in (*INPUTS, "loss"):
        check_input(state, what)


def check_input(state: str, what: str) -> None:
    make, before, legal = STATES[state]
    one = make()
    one.collect()
    machine = one.machine
    assert machine.state is before
    events = len(one.events)
    if what == "loss":
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
    elif what == "loss":
        assert isinstance(machine.lifecycle.error, ConnectionLost)
        assert len(ends) == 1
    elif what == "GOAWAY fatal" and what in legal:
        assert isinstance(machine.lifecycle.error, SessionEnded)
        assert machine.lifecycle.error.code == GoawayCode.REVOKED
    elif what == "GOAWAY" and what in legal:
        if machine.kind is Kind.SESSION:
            assert machine.state is (State.DRAINING if machine.streams else State.CLOSED)
        else:
            assert machine.state is before
    elif what in legal:
        assert machine.lifecycle.error is None, machine.lifecycle.error
        assert not ends
        assert one.goaway() is None or before is State.DRAINING
        follows = {"HELLO": State.OPEN if machine.kind is Kind.CONTROL else State.AUTH}
        if before is State.AUTH and what == "AUTH_OK":
            follows["AUTH_OK"] = State.OPEN
        assert machine.state is follows.get(what, before)
    else:
        assert isinstance(machine.lifecycle.error, RemoteProtocolError), "the peer's mistake ends the machine"
        assert machine.state is State.CLOSED
        assert len(ends) == 1
        assert news[-1] is ends[0]
        assert one.code() in (GoawayCode.PROTOCOL, GoawayCode.FLOW_CONTROL)
    assert "canary" not in repr(one.events) + repr(machine) + str(machine.lifecycle.error)
    # A closed session sends nothing more and wants no timer.
    if machine.state is State.CLOSED:
        assert machine.next_deadline() is None
        assert not machine.sender.has_output
        machine.handle_timer(one.now + 1e6)
        one.feed(PING, opening(999))
        assert one.events[-1:] == [ev.Ended(machine.lifecycle.error)]


COMMANDS: dict[str, Callable[[Session], object]] = {
    "authenticate": lambda m: m.authenticate(Auth("oidc", "canary-token")),
    "accept_auth": lambda m: m.accept_auth(OK),
    "open_stream": lambda m: m.open_stream("kubernetes"),
    "send_dial": lambda m: m.send(Dial("canary")),
    "send_status": lambda m: m.send(Status("canary")),
    "send_revoke": lambda m: m.send(Revoke("jane", 1)),
    "send_succession": lambda m: m.send(CaSuccession("canary")),
    "goaway": lambda m: m.goaway(GoawayCode.DRAINING),
    "close": lambda m: m.close(GoawayCode.DONE, ""),
    "timer": lambda m: m.handle_timer(m._context.now + 1.0),
    "late timer": lambda m: m.handle_timer(m._context.now + 1000.0),
}


@pytest.mark.parametrize("state", STATES)
def test_every_command_in_every_state(state: str) -> None:
    for what in COMMANDS:
        check_command(state, what)


def check_command(state: str, what: str) -> None:
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
    one.machine.close(GoawayCode.UNAUTHENTICATED, "the token has expired")
    one.collect()
    assert not one.of(ev.StreamOpened)
    assert one.kinds() == [FrameType.HELLO, FrameType.GOAWAY]
    said = one.goaway()
    assert (said.code, said.message) == (GoawayCode.UNAUTHENTICATED, "the token has expired")


def test_m13_bytes_of_an_early_stream_that_was_cut_are_given_back() -> None:
    """Nobody is told of it, so that nobody would read them; they counted in the process's memory for ever."""
    one = agent(accepted=False).feed(opening(1), data(1, 1000), reset(1, ResetCode.TRUNCATED))
    assert not one.machine.stream_table.unread
    one.machine.close(GoawayCode.UNAUTHENTICATED, "the token has expired")
    assert one.machine.ahead.held == 0


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
        # Threads of other tests allocate meanwhile: what reads a process's output takes 64 KiB at a time.
        ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, f"{PACKAGE}/*")])
    finally:
        tracemalloc.stop()
    assert 64 * 1024 < sum(trace.size for trace in ours.traces) < 256 * 1024
    one.machine.handle_timer(one.now + 9.9)
    assert one.machine.state is State.AUTH
    one.machine.handle_timer(one.now + 10.0)
    one.collect()
    assert one.code() == GoawayCode.TIMEOUT


def test_m13_a_byte_per_second_does_not_extend_the_deadline() -> None:
    one = Scripted(Side.ACCEPTOR)
    for byte in hello() + AUTH:
        one.now += 1.0
        one.feed(bytes((byte,)))
        one.machine.handle_timer(one.now)
    assert isinstance(one.machine.lifecycle.error, SessionEnded)
    assert one.machine.lifecycle.error.code == GoawayCode.TIMEOUT


def test_accepting_without_a_request() -> None:
    for one in (acceptor_hello(), acceptor_auth(), client()):
        with pytest.raises(LocalProtocolError):
            one.machine.accept_auth(OK)

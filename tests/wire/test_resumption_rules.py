"""The rules of a resumption: who may resume, with which counts and epochs, and what may be sent on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from arcbridge.errors import ConnectionLost, LocalProtocolError, RemoteProtocolError, SessionEnded, WrongAgent
from arcbridge.wire import events as ev
from arcbridge.wire.congestion import FIRST
from arcbridge.wire.frames import FrameType, GoawayCode, frame, pack_header
from arcbridge.wire.limits import Limits
from arcbridge.wire.records import Auth, AuthOk, Goaway, Hello, Move
from arcbridge.wire.session import Kind, Session, Side, State
from tests.support.pair import SECRET
from tests.support.resuming import ResumingPair
from tests.wire.resumed import UP, conclude, ready, script


def test_a_lost_connection_detaches_and_says_why() -> None:
    pair = ready()
    pair.client.open()
    pair.cut()
    for end in pair.ends:
        assert end.machine.state is State.DETACHED
        assert [type(e) for e in end.events][-1] is ev.Detached
        assert end.machine.stats.detached == 1
        assert end.error is None
        assert not end.machine.sender.data_to_send(1 << 20)


def test_nothing_new_is_opened_without_a_connection() -> None:
    pair = ready()
    pair.cut()
    with pytest.raises(SessionEnded):
        pair.client.machine.open_stream("kubernetes")


@pytest.mark.parametrize(("waited", "resumed"), [(119.0, True), (121.0, False)])
def test_just_before_and_just_after_the_two_minutes(waited: float, resumed: bool) -> None:
    pair = ready()
    seen = pair.client.open()
    pair.drive_bounded(lambda: pair.quiet)
    pair.cut()
    pair.now += waited
    pair.agent.machine.handle_timer(pair.now)
    pair.agent.collect()
    pair.resume()
    pair.drive_bounded(lambda: pair.quiet)
    assert (pair.client.machine.state is State.OPEN) is resumed
    assert seen.ends == ([] if resumed else ["session over"])
    assert resumed or (isinstance(pair.client.error, SessionEnded) and pair.client.error.code == GoawayCode.GONE)


def _cut_with_a_stream() -> ResumingPair:
    pair = ready()
    pair.client.open()
    pair.drive_bounded(lambda: pair.quiet)
    pair.cut()
    return pair


def _forged(pair: ResumingPair, **changes: int) -> Hello:
    agent = pair.agent.machine
    fields = {
        "received": agent.sender.sent,
        "sent": agent.receiver.received,
        "epoch": agent.resumption.epoch + 1,
    } | changes
    return Hello(1, 1, "resume", 262144, 8192, session_id=agent.resumption.session_id, resume_secret=SECRET, **fields)


FORGED: dict[str, Callable[[Session], dict[str, int]]] = {
    "more than was sent": lambda agent: {"received": agent.sender.sent + 1},
    "2^64-1": lambda agent: {"received": 2**64 - 1},
    "less than was confirmed": lambda agent: {"received": max(agent.sender.peer_received - 1, 0)},
    "less sent than has arrived": lambda agent: {"sent": agent.receiver.received - 1},
}


@pytest.mark.parametrize("what", FORGED)
def test_counts_that_cannot_be_true_end_the_session(what: str) -> None:
    pair = ready()
    for _ in range(3):  # three PINGs: something was confirmed
        pair.drive_bounded(lambda: not pair.quiet, 100)
        pair.settle()
    pair.cut()
    agent = pair.agent.machine
    assert agent.sender.peer_received > 0
    with pytest.raises(RemoteProtocolError):
        agent.resumption.take_over(
            _forged(pair, **FORGED[what](agent)), AuthOk(agent.resumption.session_id, SECRET, "jane", 60), pair.now
        )
    assert agent.state is State.CLOSED
    assert not agent.sender.data_to_send(1 << 20), "nothing is sent again"


@pytest.mark.parametrize("epoch", [0, 1])
def test_only_a_higher_epoch_attaches_and_the_attached_connection_is_undisturbed(epoch: int) -> None:
    pair = _cut_with_a_stream()
    pair.resume()
    pair.drive_bounded(lambda: pair.attached() and pair.quiet)
    agent = pair.agent.machine
    assert agent.resumption.epoch == 1
    with pytest.raises(LocalProtocolError):
        agent.resumption.take_over(
            _forged(pair, epoch=epoch), AuthOk(agent.resumption.session_id, SECRET, "jane", 60), pair.now
        )
    assert pair.attached()
    agent.resumption.take_over(
        _forged(pair, epoch=2**32 + 5), AuthOk(agent.resumption.session_id, SECRET, "jane", 60), pair.now
    )
    assert agent.resumption.epoch == 2**32 + 5


def test_a_connection_that_is_replaced_while_it_works_loses_nothing() -> None:
    """Make before break: what was under way on the old connection is sent again on the new one."""
    pair = ready()
    first, second = script(pair)
    pair.flush()
    pair.deliver(pair.agent, 77)
    pair.resume()
    pair.drive_resuming()
    conclude(pair, first, second)
    assert pair.client.machine.stats.detached == 0
    assert not [event for event in pair.client.events if isinstance(event, ev.Detached)]


def test_bytes_of_a_connection_that_was_given_up_are_not_read() -> None:
    pair = _cut_with_a_stream()
    before = pair.client.machine.receiver.received
    pair.client.machine.receive_data(memoryview(frame(FrameType.PING, 0, bytes(16))), pair.now)
    assert pair.client.machine.receiver.received == before
    assert pair.client.machine.state is State.DETACHED


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        (GoawayCode.GONE, True),
        (GoawayCode.UNAUTHENTICATED, True),
        (GoawayCode.FORBIDDEN, True),
        (GoawayCode.EXPIRED, True),
        (GoawayCode.REVOKED, True),
        (GoawayCode.PROTOCOL, True),
        (GoawayCode.UNAVAILABLE, False),
        (GoawayCode.REPLACED, False),
        (GoawayCode.LIMIT, False),
        (GoawayCode.DRAINING, False),
    ],
)
def test_a_refusal_is_for_good_or_for_now(code: GoawayCode, ends: bool) -> None:
    pair = _cut_with_a_stream()
    machine = pair.client.machine
    machine.resumption.begin(Auth("oidc", "t"), pair.now)
    hello = frame(FrameType.HELLO, 0, Hello(1, 1, "resume", 262144, 8192).encode())
    machine.receive_data(memoryview(hello + frame(FrameType.GOAWAY, 0, Goaway(0, code, "why").encode())), pair.now)
    pair.client.collect()
    assert (machine.state is State.CLOSED) is ends
    if ends:
        assert pair.client.error.message == "why"
    else:
        assert isinstance(pair.client.events[-1], ev.ResumeFailed)
        pair.resume()
        pair.drive_bounded(lambda: pair.attached() and pair.quiet)


@pytest.mark.parametrize("code", [GoawayCode.GONE, GoawayCode.UNAUTHENTICATED, GoawayCode.UNAVAILABLE])
def test_b2_what_another_agent_says_of_the_session_is_no_end(code: GoawayCode) -> None:
    pair = _cut_with_a_stream()
    machine = pair.client.machine
    assert machine.receiver.peer_hello.agent == "instance-1"
    machine.resumption.begin(Auth("oidc", "t"), pair.now)
    hello = frame(FrameType.HELLO, 0, Hello(1, 1, "resume", 262144, 8192, agent="instance-2").encode())
    machine.receive_data(memoryview(hello + frame(FrameType.GOAWAY, 0, Goaway(0, code, "why").encode())), pair.now)
    pair.client.collect()
    failed = pair.client.events[-1]
    assert isinstance(failed, ev.ResumeFailed)
    assert isinstance(failed.error, WrongAgent)
    pair.resume()
    pair.drive_bounded(lambda: pair.attached() and pair.quiet)


def test_no_answer_in_ten_seconds_is_a_failed_try() -> None:
    pair = _cut_with_a_stream()
    pair.client.machine.resumption.begin(Auth("oidc", "t"), pair.now)
    pair.now += 10.0
    pair.client.machine.handle_timer(pair.now)
    pair.client.collect()
    assert isinstance(pair.client.events[-1], ev.ResumeFailed)
    assert pair.client.machine.state is State.DETACHED
    assert pair.client.machine.next_deadline() is not None


def test_the_sequence_may_not_go_on_before_the_handshake_is_complete() -> None:
    pair = _cut_with_a_stream()
    newcomer = Session(Side.ACCEPTOR, Kind.SESSION, pair.now)
    pair.client.machine.resumption.begin(Auth("oidc", "t"), pair.now)
    flight = b"".join(pair.client.machine.sender.data_to_send(1 << 20))
    newcomer.receive_data(memoryview(flight + b"\0"), pair.now)
    assert newcomer.state is State.CLOSED


@pytest.mark.parametrize(
    "answer",
    [
        pack_header(16 << 8 | FrameType.PING, 0),
        pack_header(0 << 8 | FrameType.DATA, 0),
        pack_header(5 << 8 | FrameType.HELLO, 1),
        pack_header(4097 << 8 | FrameType.HELLO, 0),
        pack_header(5 << 8 | 200, 0),
        frame(FrameType.AUTH_OK, 0, AuthOk().encode()),
    ],
)
def test_anything_else_before_the_session_is_resumed_is_refused_at_its_header(answer: bytes) -> None:
    pair = _cut_with_a_stream()
    pair.client.machine.resumption.begin(Auth("oidc", "t"), pair.now)
    pair.client.machine.receive_data(memoryview(answer), pair.now)
    assert pair.client.machine.state is State.CLOSED


def test_a_stranger_is_told_nothing_before_it_is_judged() -> None:
    newcomer = Session(Side.ACCEPTOR, Kind.SESSION, 0.0)
    hello = Hello(1, 1, "resume", 262144, 8192, session_id=b"x" * 16, resume_secret=b"y" * 16, epoch=1)
    newcomer.receive_data(
        memoryview(frame(FrameType.HELLO, 0, hello.encode()) + frame(FrameType.AUTH, 0, Auth("oidc", "t").encode())),
        0.0,
    )
    assert newcomer.resumption.resuming == hello
    assert not newcomer.sender.data_to_send(1 << 20)
    with pytest.raises(LocalProtocolError):
        newcomer.accept_auth(AuthOk(b"a", b"b", "jane", 60))
    newcomer.close(GoawayCode.GONE, "no")
    said = b"".join(newcomer.sender.data_to_send(1 << 20))
    assert said.count(b"yyyy") == 0


def test_a_session_of_which_one_end_keeps_nothing_ends_with_its_connection() -> None:
    for client, agent in ((0, 16 << 20), (16 << 20, 0)):
        pair = ResumingPair()
        pair.client.machine = Session(Side.INITIATOR, Kind.SESSION, pair.now, limits=Limits(replay=client))
        pair.agent.machine = Session(Side.ACCEPTOR, Kind.SESSION, pair.now, limits=Limits(replay=agent))
        pair.client.machine.authenticate(Auth("oidc", "t"))
        pair.established()
        assert not pair.client.machine.resumption.possible
        assert not pair.agent.machine.resumption.possible
        pair.cut()
        assert isinstance(pair.client.error, ConnectionLost)
        assert isinstance(pair.agent.error, ConnectionLost)


def test_what_leaves_after_the_end_is_not_kept() -> None:
    """The last word of each session would stay in the budget of all for as long as the process runs."""
    pair = ready()
    seen = pair.client.open()
    pair.drive_resuming()
    machine = pair.agent.machine
    budget = machine.sender.history._budget
    machine.sender.send(machine.streams[seen.stream.id], b"x" * 1000)
    machine.fail(GoawayCode.LIMIT, "too much")
    assert machine.sender.data_to_send(1 << 20), "the last word"
    assert budget.held == 0
    assert machine.backlog.held == 0


@pytest.mark.parametrize("drained", [False, True])
def test_an_end_while_a_connection_resumes_is_no_part_of_a_frame_that_was_cut(drained: bool) -> None:
    """The agent has resumed, and would take the client's last word for the rest of a DATA frame."""
    pair = ready()
    seen = pair.client.open()
    pair.drive_resuming()
    pair.client.write(seen, UP)
    pair.cut_after["agent"] = 100
    pair.drive_bounded(lambda: pair.lost)
    pair.resume()
    pair.drive_bounded(lambda: pair.newcomer is None)
    assert pair.agent.machine.state is State.OPEN
    if drained:
        pair.client.machine.goaway(GoawayCode.DRAINING)
        pair.client.reset(seen)
    else:
        pair.client.machine.close(GoawayCode.DONE, "the user has ended it")
    assert pair.client.machine.state is State.CLOSED
    assert not pair.client.machine.sender.data_to_send(1 << 20)
    assert UP.startswith(bytes(pair.agent.seen[seen.stream.id].read))


def test_draining_goes_on_over_a_resumption() -> None:
    pair = ready()
    seen = pair.client.open()
    pair.drive_resuming()
    pair.agent.machine.goaway(GoawayCode.DRAINING, "restart")
    pair.drive_resuming()
    assert pair.client.machine.state is State.DRAINING
    pair.cut()
    pair.resume()
    pair.drive_bounded(lambda: pair.attached() and pair.quiet)
    far = pair.agent.seen[seen.stream.id]
    pair.agent.write(far, b"last words")
    pair.agent.finish(far)
    pair.client.finish(seen)
    pair.drive_resuming()
    assert bytes(seen.read) == b"last words"
    assert seen.ends == far.ends == ["in order"]
    pair.drive_bounded(lambda: pair.client.error is not None and pair.agent.error is not None)


def test_a_detached_session_without_streams_drains_at_once() -> None:
    pair = ready()
    pair.cut()
    pair.agent.machine.goaway(GoawayCode.DRAINING)
    pair.agent.collect()
    assert pair.agent.machine.state is State.CLOSED


def test_the_last_word_ends_a_session_whatever_its_code() -> None:
    pair = ready()
    seen = pair.client.open()
    pair.drive_resuming()
    pair.agent.machine.close(GoawayCode.DRAINING, "the agent has stopped")
    pair.drive_bounded(lambda: pair.client.error is not None)
    assert isinstance(pair.client.error, SessionEnded)
    assert pair.client.error.code == GoawayCode.DRAINING
    assert seen.ends == ["session over"]


def test_a_move_is_asked_for_once_and_by_its_join_id() -> None:
    pair = ready()
    pair.agent.machine.resumption.ask_to_move("join-7")
    pair.settle()
    assert [e for e in pair.client.events if isinstance(e, Move)] == [Move("join-7")]
    with pytest.raises(LocalProtocolError):
        pair.client.machine.resumption.ask_to_move("join-7")


def test_an_old_answer_is_no_sample_and_what_is_sent_again_is_no_silence() -> None:
    """Slow path: what the peer sends again takes longer than a dead connection would be given."""
    pair = _cut_with_a_stream()
    pair.resume()
    pair.drive_bounded(pair.attached)
    machine = pair.client.machine
    machine.receiver.answers_from = machine.receiver.received + 10**6  # the agent has a megabyte to send first
    start = pair.now
    pair.agent.arrivals.clear()
    while pair.now - start < 60:
        pair.now += 1
        machine.receive_data(memoryview(frame(129, 0)), pair.now)
        machine.handle_timer(pair.now)
        pair.agent.arrivals.clear()
        machine.sender.data_to_send(1 << 20)
    assert machine.state is State.OPEN


def test_another_connection_may_be_another_path() -> None:
    """From 5 ms to 200 ms: what was known of the old path does not count, and the new one is filled all the same."""
    pair = ResumingPair(latency=0.0025)
    pair.established()
    seen = pair.client.open()

    def carry(size: int) -> float:
        pair.client.write(seen, bytes(size))
        began = pair.now
        pair.drive_bounded(lambda: len(pair.agent.seen[seen.stream.id].read) == len(seen.written), 100_000)
        return pair.now - began

    pair.settle()
    assert carry(4_000_000) < 0.2
    pair.cut()
    pair.latency = 0.1
    pair.resume()
    pair.drive_resuming()
    flight = pair.client.machine.sender.congestion
    assert flight.round_trip >= 0.2
    assert flight.cap == FIRST
    assert carry(16_000_000) < 16 * 0.2, "it doubles each round trip"
    assert carry(16_000_000) < 6 * 0.2

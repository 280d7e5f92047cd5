"""Connections die at every byte; what was written is read, once, in order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcbridge.errors import LocalProtocolError
from arcbridge.wire.frames import HEADER_SIZE, FrameType, ResetCode, record_frame
from arcbridge.wire.records import Auth, AuthOk, Hello
from arcbridge.wire.resume_handshake import ResumeHandshake
from arcbridge.wire.session import Side, State
from tests.support.pair import SECRET
from tests.support.resuming import ResumingPair
from tests.wire.parts import Parts
from tests.wire.resumed import UP, answer, check, conclude, ready, script


def play(pair: ResumingPair) -> None:
    """Run the exchange to its end, resuming whenever the connection is gone."""
    first, second = script(pair)
    done = False
    for _ in range(200):
        pair.drive_resuming()
        answer(pair)
        pair.drive_resuming()
        if second.finished and not done:
            pair.client.write(second, UP[100:])
            pair.client.finish(second)
            pair.drive_resuming()
            done = True
        if done and pair.attached() and pair.quiet and not pair.client.machine.streams:
            break
    for end in pair.ends:
        end.note_ends()
    check(pair, first, second)


def test_an_exchange_without_a_cut() -> None:
    pair = ready()
    play(pair)
    assert pair.cuts == 0


def _bytes_of_an_exchange(end: str) -> int:
    pair = ready()
    before = getattr(pair, end).machine.stats.bytes_received
    play(pair)
    return int(getattr(pair, end).machine.stats.bytes_received - before)


@pytest.mark.parametrize("end", ["client", "agent"])
def test_a_cut_at_every_byte(end: str) -> None:
    total = _bytes_of_an_exchange(end)
    assert total > 600
    for at in range(total + 1):
        pair = ready()
        pair.cut_after[end] = at
        play(pair)
        assert pair.cuts == 1 or at == total


@pytest.mark.parametrize("end", ["client", "agent"])
def test_a_second_cut_at_every_byte_of_the_resumption(end: str) -> None:
    """HELLO, AUTH, the answers and what is sent again: the second connection dies there, then the third one works."""
    for at in range(700):
        pair = ready()
        first, second = script(pair)
        pair.flush()
        pair.deliver(pair.agent, 150)
        pair.cut()
        pair.resume()
        pair.cut_after[end] = at
        pair.drive_resuming()
        pair.cut_after.clear()
        conclude(pair, first, second)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("up"), st.integers(1, 5000)),
            st.tuples(st.just("down"), st.integers(1, 5000)),
            st.tuples(st.just("cut client"), st.integers(0, 6000)),
            st.tuples(st.just("cut agent"), st.integers(0, 6000)),
            st.tuples(st.just("part"), st.integers(1, 3000)),
            st.tuples(st.just("reset"), st.just(0)),
            st.tuples(st.just("wait"), st.integers(1, 30)),
        ),
        max_size=40,
    ),
    st.booleans(),
)
def test_whatever_is_cut_wherever(actions: list[tuple[str, int]], eager: bool) -> None:
    pair = ResumingPair(eager=eager)
    pair.established()
    mine = pair.client.open("kubernetes")
    other = pair.client.open("tcp:db")
    pair.drive_resuming()
    for counter, (what, size) in enumerate(actions):
        far = pair.agent.seen.get(mine.stream.id)
        data = bytes([counter & 255]) * size
        if what == "up":
            pair.client.write(mine, data)
        elif what == "down" and far is not None:
            pair.agent.write(far, data)
        elif what.startswith("cut"):
            pair.cut_after[what.split()[1]] = size
        elif what == "part":
            pair.flush()
            for end in pair.ends:
                pair.deliver(end, size)
        elif what == "reset":
            pair.client.reset(other, ResetCode.CANCELLED)
        else:
            for _ in range(size):
                if pair.lost:
                    pair.resume()
                pair.step()
    pair.cut_after.clear()
    pair.drive_resuming()
    far = pair.agent.seen[mine.stream.id]
    pair.client.finish(mine)
    pair.agent.finish(far)
    for _ in range(50):
        pair.drive_resuming()
        for end in pair.ends:
            for seen in end.seen.values():
                end.take(seen, seen.unread)
    assert far.read == mine.written
    assert mine.read == far.written
    pair.check_prefixes()


# -- the part alone ---------------------------------------------------------------------------------------------------


def resumable(side: Side) -> Parts:
    """The parts of a session that both ends can resume, 10 bytes sent and 6 of them confirmed."""
    parts = Parts(side, history=True)
    parts.resumption.learn_secret(AuthOk(b"i" * 16, SECRET, "jane", 60), Hello(features="resume"))
    parts.sender.queue(b"0123456789")
    parts.written()
    parts.sender.confirmed(6)
    return parts


def test_the_initiator_says_which_session_and_goes_on_where_it_was() -> None:
    parts = resumable(Side.INITIATOR)
    parts.resumption.begin(Auth("oidc", "token"), 101.0)
    assert parts.lifecycle.state is State.DETACHED
    said: list[tuple[int, bytes]] = []
    reader, flight, at = ResumeHandshake(), memoryview(parts.sender.prelude[0]), 0
    while at < len(flight):
        at, whole = reader.next(flight, at)
        if whole is not None:
            said.append(whole)
    hello = Hello.decode(said[0][1])
    assert (hello.session_id, hello.resume_secret, hello.sent, hello.epoch) == (b"i" * 16, SECRET, 10, 1)
    parts.written()
    answer = Hello(1, 1, "resume", 262144, 100, session_id=b"i" * 16, received=8, sent=0, epoch=1)
    frames = record_frame(FrameType.HELLO, answer) + record_frame(FrameType.AUTH_OK, AuthOk(b"i" * 16))
    rest = parts.resumption.greet(memoryview(frames + b"sequence"))
    assert bytes(rest) == b"sequence"
    assert parts.lifecycle.state is State.OPEN
    assert parts.notes.counts == [8]
    assert parts.notes.pings == 1
    assert parts.written() == b"89"


def test_the_acceptor_answers_with_its_own_counts() -> None:
    parts = resumable(Side.ACCEPTOR)
    hello = Hello(1, 1, "resume", 262144, 100, session_id=b"i" * 16, received=6, sent=0, epoch=3)
    parts.resumption.take_over(hello, AuthOk(b"i" * 16), 101.0)
    answer = Hello.decode(parts.sender.prelude[0][HEADER_SIZE:])
    assert (answer.sent, answer.received, answer.epoch, answer.resume_secret) == (10, 0, 3, b"")
    assert parts.written().endswith(b"6789")
    with pytest.raises(LocalProtocolError, match="older epoch"):
        parts.resumption.take_over(hello, AuthOk(b"i" * 16), 102.0)

"""What must hold for any sequence of operations, any cutting of the input, and any bytes (docs/protocol.md, §3)."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from arcbridge.errors import RemoteProtocolError, SessionEnded
from arcbridge.wire import events as ev
from arcbridge.wire.frames import PING_BODY, FrameType, GoawayCode, ResetCode, frame
from arcbridge.wire.records import Auth
from arcbridge.wire.session import Kind, Side, State
from tests.support.books import take_events, unconsumed
from tests.support.pair import Pair
from tests.wire.lossy_link import SMALL
from tests.wire.scripted import Scripted, ack, agent, client, data, goaway, hello, opening, reset, window

# -- (1) however the input is cut, the outcome is the same ----------------------------------------------------------

FLIGHT: list[bytes] = [
    opening(1),
    data(1, 3000),
    frame(128, 0, b"later"),
    opening(3, "tcp:db"),
    data(3, 10),
    frame(FrameType.PING, 0, PING_BODY.pack(1, 0)),
    frame(FrameType.FIN, 1),
    data(3, 70_000),
    window(3, 100),
    opening(5),
    reset(5, ResetCode.CANCELLED),
    frame(FrameType.FIN, 1),
    data(1, 5),
    reset(3, ResetCode.NO_ERROR),
    opening(7),
    data(7, 1),
    frame(FrameType.AUTH, 0, Auth("oidc", "again").encode()),
    ack(0),
    goaway(GoawayCode.DRAINING, 100),
    data(7, 100),
]


def outcome(pieces: list[bytes]) -> tuple[Any, ...]:
    """Everything a shell and a peer can see after these reads."""
    one = agent()
    contents: dict[int, bytearray] = {}
    for piece in pieces:
        scratch = bytearray(piece)
        one.machine.receive_data(memoryview(scratch), one.now)
        scratch[:] = b"\xdb" * len(scratch)
        for event in take_events(one.machine):
            one.events.append(event)
            if isinstance(event, ev.StreamOpened):
                into = contents[event.stream.id] = bytearray(b"".join(event.stream.inbox))
                event.stream.inbox.clear()
                event.stream.sink = into.extend
    one.collect()
    told = [repr(event) for event in one.events]
    frames = [one_frame for one_frame in one.said if one_frame[0] not in (FrameType.PONG, FrameType.ACK)]
    # Credit for what was never taken by an application depends on when that application came: contents of streams
    # that were reset before it are not compared.
    return told, frames, {k: bytes(v) for k, v in contents.items() if k in (1, 7)}, one.machine.receiver.received


@given(
    st.lists(st.integers(1, 5000), max_size=60),
    st.permutations(range(len(FLIGHT))).filter(lambda p: True) | st.just(None),
)
def test_any_cut_gives_the_same_outcome(cuts: list[int], order: list[int] | None) -> None:
    frames = [FLIGHT[i] for i in order] if order is not None else FLIGHT
    raw = b"".join(frames)
    pieces, at = [], 0
    for size in cuts:
        pieces.append(raw[at : at + size])
        at += size
    pieces.append(raw[at:])
    got, whole = outcome([piece for piece in pieces if piece]), outcome([raw])
    assert [text.split("(")[0] for text in got[0]] == [text.split("(")[0] for text in whole[0]]
    assert [f for f in got[1] if f[0] != FrameType.WINDOW] == [f for f in whole[1] if f[0] != FrameType.WINDOW]
    assert got[3] == whole[3] or got[0][-1].startswith("Ended")


# -- random bytes -----------------------------------------------------------------------------------------------------


def machines() -> list[Scripted]:
    return [
        Scripted(Side.ACCEPTOR),
        Scripted(Side.INITIATOR),
        agent(accepted=False),
        agent().feed(opening(1)),
        client(),
        Scripted(Side.ACCEPTOR, Kind.CONTROL).feed(hello()),
        Scripted(Side.INITIATOR, Kind.CONTROL).feed(hello()),
    ]


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """Frames with any type, id and body, now and then bytes that are no frame."""
    out = b""
    for _ in range(draw(st.integers(0, 12))):
        if draw(st.integers(0, 9)) == 0:
            out += draw(st.binary(max_size=20))
        else:
            kind = draw(st.sampled_from([*FrameType, 128, 255, 0, 77]))
            stream = draw(st.sampled_from([0, 1, 2, 3, 4, 5, 2**31, 2**32 - 1]))
            sizes = {FrameType.RESET: 4, FrameType.WINDOW: 4, FrameType.ACK: 8, FrameType.PING: 16, FrameType.PONG: 16}
            size = sizes.get(kind, draw(st.sampled_from([0, 0, 1, 5, 40])))
            out += frame(kind, stream, draw(st.binary(min_size=size, max_size=size)))
    return out


@given(st.integers(0, 6), hostile() | st.binary(max_size=200), st.lists(st.integers(1, 50), max_size=10))
@settings(max_examples=300)
def test_any_bytes_lead_to_a_remote_error_or_to_nothing(which: int, raw: bytes, cuts: list[int]) -> None:
    one = machines()[which]
    at = 0
    for size in [*cuts, len(raw)]:
        one.machine.receive_data(memoryview(raw[at : at + size]), one.now)
        at += size
        one.collect()
    error = one.machine.lifecycle.error
    assert error is None or isinstance(error, RemoteProtocolError | SessionEnded)
    if error is not None:
        assert one.machine.state is State.CLOSED
        assert sum(isinstance(event, ev.Ended) for event in one.events) == 1
        assert isinstance(one.events[-1], ev.Ended)
    assert "canary" not in repr(one.machine) + str(error)


# -- (5) everything arrives -------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 400_000)), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.005, 0.2]),
    st.integers(1000, 500_000),
)
def test_if_both_ends_read_everything_arrives_in_bounded_time(
    writes: list[tuple[bool, int]], latency: float, portion: int
) -> None:
    pair = Pair(limits=SMALL, latency=latency, portion=portion).established()
    start = pair.now
    streams = []
    for up, size in writes:
        seen = pair.client.open()
        pair.settle()
        end, mine = (pair.client, seen) if up else (pair.agent, pair.agent.seen[seen.stream.id])
        end.write(mine, bytes(size % 251 for _ in range(1)) * size)
        end.finish(mine)
        streams.append((seen, pair.agent.seen[seen.stream.id]))
    pair.settle(20_000)
    total = sum(size for _, size in writes)
    assert pair.now - start <= (len(writes) + 4 + total / 16_000) * 2 * (latency + 0.001), "bounded virtual time"
    for (up, size), (near, far) in zip(writes, streams, strict=True):
        reader = far if up else near
        assert reader.finished
        assert len(reader.read) == size
    pair.check_prefixes()
    pair.check_books()
    assert unconsumed(pair.client.machine) == unconsumed(pair.agent.machine) == 0


def test_a_session_is_ready_after_one_round_trip() -> None:
    pair = Pair(latency=0.05)
    seen = pair.client.open()
    pair.client.write(seen, b"GET /")
    pair.client.finish(seen)
    pair.drive_bounded(lambda: bool(pair.agent.seen) and pair.agent.seen[1].finished)
    assert pair.now - 1000.0 < 0.051, "OPEN, DATA and FIN travel in the first flight"
    assert pair.agent.seen[1].read == b"GET /"

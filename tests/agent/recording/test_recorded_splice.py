"""A recorded session is held on both sides, and goes on only where the other side takes what comes."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from arcbridge.agent.audit import AuditRecord
from arcbridge.agent.audit.record import AuditSubject
from arcbridge.agent.recording.recorded_splice import RecordedSplice
from arcbridge.agent.recording.session_recording import SessionRecording
from arcbridge.mux import buffer
from arcbridge.mux.stream import StreamTransport
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.frames import ResetCode


class Side:
    """A transport of asyncio, or a stream, as far as a splice uses it."""

    payer = None
    backlog = Backlog(2)
    writing_paused = False

    def __init__(self) -> None:
        self.reads = True
        self.written = b""
        self.aborted: list[ResetCode] = []

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def write(self, data: bytes | memoryview) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return False

    def set_protocol(self, protocol: object) -> None:
        pass

    def get_extra_info(self, name: str) -> Any:
        return None

    def abort(self, code: ResetCode) -> None:
        self.aborted.append(code)


class Seen:
    """A recording that notes what passes."""

    def __init__(self) -> None:
        self.to_caller = b""
        self.to_cluster = b""

    def from_cluster(self, view: memoryview) -> None:
        self.to_caller += bytes(view)

    def from_caller(self, view: memoryview) -> None:
        self.to_cluster += bytes(view)


class Joined:
    """A splice between two sides."""

    def __init__(self) -> None:
        self.outer, self.stream, self.seen = Side(), Side(), Seen()
        self.record = AuditRecord("r-1", AuditSubject("s"))
        self.splice = RecordedSplice(
            cast(asyncio.Transport, self.outer),
            lambda _: None,
            cast(SessionRecording, self.seen),
            cast(StreamTransport, self.stream),
            self.record,
        )
        self.splice.stream_side.connection_made(cast(asyncio.BaseTransport, self.stream))

    @property
    def reads(self) -> tuple[bool, bool]:
        return self.outer.reads, self.stream.reads


@pytest.fixture
def joined() -> Joined:
    return Joined()


def test_the_recording_sees_both_directions_in_order(joined: Joined) -> None:
    joined.splice.start(b"first")
    view = joined.splice.get_buffer(-1)
    view[:6] = b"second"
    joined.splice.buffer_updated(6)
    assert bytes(buffer.VIEW[:6]) == b"second"
    joined.splice.from_stream(memoryview(b"typed"))
    assert joined.stream.written == joined.seen.to_caller == b"firstsecond"
    assert joined.outer.written == joined.seen.to_cluster == b"typed"


def test_both_sides_are_held_and_go_on(joined: Joined) -> None:
    joined.splice.hold()
    assert joined.reads == (False, False)
    joined.splice.let_go()
    assert joined.reads == (True, True)
    joined.stream.reads = False
    joined.splice.let_go()  # once more: nothing is held
    assert joined.reads == (True, False)


def test_what_a_full_side_takes_again_does_not_end_the_hold(joined: Joined) -> None:
    joined.splice.stream_side.pause_writing()  # the stream is full
    joined.splice.pause_writing()  # and so is the API server
    joined.splice.hold()
    joined.splice.stream_side.resume_writing()
    joined.splice.resume_writing()
    assert joined.reads == (False, False)
    joined.splice.let_go()
    assert joined.reads == (True, True)


def test_the_end_of_a_hold_does_not_read_for_a_full_side(joined: Joined) -> None:
    joined.splice.hold()
    joined.splice.stream_side.pause_writing()
    joined.splice.let_go()
    assert joined.reads == (False, True)
    joined.splice.stream_side.resume_writing()
    assert joined.reads == (True, True)


async def test_a_session_that_must_be_recorded_ends_with_a_reason(joined: Joined) -> None:
    joined.record.switch()
    joined.splice.end("the recording failed: x")
    await asyncio.sleep(0)
    assert joined.stream.aborted == [ResetCode.FORBIDDEN]
    assert (joined.record.outcome, joined.record.reason) == ("cut", "the recording failed: x")


def test_it_starts_to_read_what_neither_the_stream_nor_the_recording_holds_back(joined: Joined) -> None:
    joined.outer.reads, joined.stream.writing_paused = False, True  # its former protocol was told so
    joined.splice.start(b"first")
    assert not joined.outer.reads
    joined.splice.hold()
    joined.splice.stream_side.resume_writing()
    assert not joined.outer.reads
    joined.splice.let_go()
    assert joined.outer.reads


def test_it_starts_held(joined: Joined) -> None:
    """The first bytes may be more than the recording's thread takes."""
    joined.splice.hold()
    joined.splice.start(b"first")
    assert joined.reads == (False, False)

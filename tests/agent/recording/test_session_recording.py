"""A recording takes both directions as they pass, holds the session while its thread is behind, and fails once."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from arcbridge.agent.recording import session_recording
from arcbridge.agent.recording.cast import BROKEN_OFF, CastWriter
from arcbridge.agent.recording.rules import Demand
from arcbridge.agent.recording.sealed_file import ENDING, PART
from arcbridge.agent.recording.session_recording import MAX_STATUS, SEGMENT, WAITING, SessionRecording
from arcbridge.agent.recording.spool import Spool
from tests.support.eventually import until

from .keys import RECIPIENTS, events_of, frame, output_of

MASK = b"abcd"


class FakeSession:
    """Notes what a recording does to its session."""

    def __init__(self) -> None:
        self.held = 0
        self.let_go_count = 0
        self.ended: list[str] = []

    def hold(self) -> None:
        self.held += 1

    def let_go(self) -> None:
        self.let_go_count += 1

    def end(self, reason: str) -> None:
        self.ended.append(reason)


class Recorded:
    """A recording and its thread, which waits while `gate` is shut."""

    def __init__(self, directory: Path) -> None:
        self.spool = Spool(directory, 1 << 30, RECIPIENTS)
        self.session = FakeSession()
        self.thread = ThreadPoolExecutor(1)
        self.gate = threading.Event()
        self.gate.set()
        self.failures: list[str] = []
        self.waiting = 0
        self.progress = 0.0

    def begin(self, *, required: bool = True, typed: bool = False, most: int = 1 << 30) -> SessionRecording:
        file = self.spool.create("session")
        text = CastWriter(time.monotonic())
        file.append(text.header(0, "t", ""))
        recording = SessionRecording(Demand(required, typed), file, self.spool, text, self, most, "anna")
        recording.on_failure = self.failures.append
        recording.start(self.session, b"")
        return recording

    def submit(self, work: Callable[..., Any], *arguments: Any, user: str) -> asyncio.Future[Any]:
        def waited() -> Any:
            self.gate.wait()
            return work(*arguments)

        return asyncio.get_running_loop().run_in_executor(self.thread, waited)

    @property
    def path(self) -> Path:
        return self.spool.directory / ("session" + ENDING + PART)


@pytest.fixture
async def recorded(tmp_path: Path) -> AsyncIterator[Recorded]:
    made = Recorded(tmp_path)
    yield made
    made.gate.set()
    made.thread.shutdown()


def shown(recording: SessionRecording, data: bytes, channel: int = 1) -> None:
    recording.from_cluster(memoryview(frame(bytes([channel]) + data)))


def typed(recording: SessionRecording, data: bytes, channel: int = 0) -> None:
    recording.from_caller(memoryview(frame(bytes([channel]) + data, mask=MASK)))


def status(**fields: object) -> bytes:
    return json.dumps({"metadata": {}, **fields}).encode()


async def test_output_resizes_and_the_exit(recorded: Recorded) -> None:
    recording = recorded.begin()
    typed(recording, b'{"Width":100,"Height":', 4)
    typed(recording, b"30}\n", 4)
    shown(recording, b"$ ")
    typed(recording, b"ls\r")
    shown(recording, b"a\r\n")
    shown(recording, b"oops", 2)
    causes = {"causes": [{"reason": "ExitCode", "message": "7"}]}
    shown(recording, status(status="Failure", reason="NonZeroExitCode", details=causes), 3)
    found = await recording.finish()
    assert found.size == recorded.path.stat().st_size
    events = events_of(recorded.path)
    assert events[0] == ("r", b"100x30")
    assert output_of(recorded.path) == b"$ a\r\noops"
    assert events[-1] == ("x", b"7")
    assert "i" not in [code for code, _ in events]
    assert recording.output == 9


async def test_what_is_typed_where_it_is_switched_on(recorded: Recorded) -> None:
    recording = recorded.begin(typed=True)
    typed(recording, b"ls")
    typed(recording, b"\r")
    shown(recording, status(status="Success"), 3)
    await recording.finish()
    assert b"".join(data for code, data in events_of(recorded.path) if code == "i") == b"ls\r"
    assert recording.exit_code == 0


STATUSES = [
    (status(status="Failure", reason="InternalError"), None),
    (status(status="Failure", details={"causes": [{"reason": "ExitCode", "message": "-1"}]}), None),
    (status(status="Failure", details={"causes": [{"reason": "ExitCode", "message": "9" * 5000}]}), None),
    (status(status="Failure", details={"causes": "x"}), None),
    (b"[" * 5000, None),
    (b"", None),
]


@pytest.mark.parametrize(("data", "code"), STATUSES)
async def test_a_status_without_a_code(recorded: Recorded, data: bytes, code: int | None) -> None:
    recording = recorded.begin()
    shown(recording, data, 3)
    assert recording.exit_code is code
    await recording.finish()
    assert events_of(recorded.path)[-1] == ("m", b"the session was cut")


async def test_a_status_is_read_up_to_a_bound(recorded: Recorded) -> None:
    recording = recorded.begin()
    for _ in range(100):
        shown(recording, b" " * 60_000, 3)
    assert len(recording._status) <= MAX_STATUS + 60_000
    await recording.finish()


async def test_a_segment_is_written_after_the_interval(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_recording, "INTERVAL", 0.01)
    recording = recorded.begin()
    part = recorded.path
    before = part.stat().st_size
    shown(recording, b"x")
    await until(lambda: part.stat().st_size > before)
    assert output_of(part) == b"x"
    await recording.finish()


async def test_a_segment_is_written_at_its_size_and_memory_does_not_grow(recorded: Recorded) -> None:
    """Tiny messages count with what they take: ten times as many leave as much in memory."""
    for count in (10_000, 100_000):
        recording = recorded.begin()
        for number in range(count):
            recording._now = float(number)  # each is an event of its own
            recording._add("o", b"x")
            assert recording._gathered < SEGMENT
        await recording.finish()
        assert len(output_of(recorded.path)) == count
        recorded.path.unlink()


async def test_the_session_is_held_while_the_thread_is_behind(recorded: Recorded) -> None:
    recorded.gate.set()
    recording = recorded.begin()
    recorded.gate.clear()
    while not recorded.session.held:
        shown(recording, bytes(60_000))
        assert recording._waiting <= WAITING + 4 * SEGMENT
    recorded.gate.set()
    await until(lambda: recorded.session.let_go_count == 1)
    assert not recorded.session.ended
    await recording.finish()


async def test_sessions_are_held_at_a_bound_of_all_and_go_on_as_each_is_written(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 sessions of a user would wait with 1 MiB each else."""
    monkeypatch.setattr(session_recording, "WAITING_OF_ALL", 3 * SEGMENT)
    recording = recorded.begin()
    recorded.gate.clear()
    recorded.waiting = 3 * SEGMENT  # of others
    shown(recording, bytes(SEGMENT))
    assert recorded.session.held == 1
    assert recorded.waiting > 4 * SEGMENT
    recorded.gate.set()
    await until(lambda: recorded.session.let_go_count == 1)
    assert recorded.waiting == 3 * SEGMENT
    assert not recorded.failures
    await recording.finish()


async def test_a_session_that_waits_for_others_is_no_failure(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_recording, "STALL", 0.02)
    recording = recorded.begin()
    recorded.gate.clear()
    while not recorded.session.held:
        shown(recording, bytes(60_000))
    for _ in range(20):
        recorded.progress = time.monotonic()  # the thread writes for others
        await asyncio.sleep(0.005)
    assert not recorded.failures
    await until(lambda: bool(recorded.failures))
    recorded.gate.set()
    await recording.finish()


@pytest.mark.parametrize("required", [True, False])
async def test_a_directory_that_takes_nothing_is_a_failure(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, required: bool
) -> None:
    monkeypatch.setattr(session_recording, "STALL", 0.01)
    recording = recorded.begin(required=required)
    recorded.gate.clear()
    while not recorded.session.held:
        shown(recording, bytes(60_000))
    await until(lambda: bool(recorded.failures))
    assert recorded.failures == ["the directory of recordings takes no data"]
    assert recorded.session.let_go_count == 1
    assert len(recorded.session.ended) == required
    recorded.gate.set()
    await recording.finish()


@pytest.mark.parametrize("required", [True, False])
async def test_a_full_disk_ends_the_recording_once(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, required: bool
) -> None:
    recording = recorded.begin(required=required)
    shown(recording, b"kept")
    recording._flush()
    await until(lambda: recording._waiting == 0)

    def full(text: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(recording.file, "append", full)
        for _ in range(3):
            shown(recording, b"lost")
            recording._flush()
        await until(lambda: recording._waiting == 0)
    assert recorded.failures == ["No space left on device"]
    assert recorded.session.ended == ["the recording failed: No space left on device"] * required
    shown(recording, b"later")
    await recording.finish()
    assert output_of(recorded.path) == b"kept"
    assert events_of(recorded.path)[-1] == ("m", b"no more was recorded: No space left on device")


async def test_a_recording_without_its_last_line_is_not_taken_for_whole_by_the_next_agent(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Space for the end of the archive alone is left; the agent is killed before the record."""
    recording = recorded.begin()

    def full(text: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(recording.file, "append", full)
        await recording.finish()
    assert recording.failure == "No space left on device"
    os.close(recording.file._descriptor)
    found = recorded.spool.recover(recorded.path)
    assert found is not None
    assert not found[0].whole
    assert events_of(recorded.path)[-1] == ("m", BROKEN_OFF.encode())


async def test_nothing_stands_behind_a_segment_that_is_missing(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = recorded.begin(required=False)
    append, calls = recording.file.append, 0

    def second_fails(text: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.EIO, "Input/output error")
        return append(text)

    monkeypatch.setattr(recording.file, "append", second_fails)
    recorded.gate.clear()
    for data in (b"one", b"two", b"three"):
        shown(recording, data)
        recording._flush()
    recorded.gate.set()
    await until(lambda: recording._waiting == 0)
    await recording.finish()
    assert output_of(recorded.path) == b"one"


async def test_a_recording_has_a_bound(recorded: Recorded) -> None:
    recording = recorded.begin(most=100_000)
    for _ in range(3):
        shown(recording, bytes(SEGMENT))
    await until(lambda: bool(recorded.failures))
    assert recorded.failures == ["it has more than 100000 bytes (recording.session_bytes)"]
    assert (await recording.finish()).size < 110_000


async def test_output_that_cannot_be_read_is_a_failure(recorded: Recorded) -> None:
    recording = recorded.begin()
    recording.from_cluster(memoryview(b"\xc2\x01\x01"))
    assert recorded.failures == ["the output cannot be read: a WebSocket frame has an extension"]
    await recording.finish()


@pytest.mark.parametrize("with_input", [True, False])
async def test_input_that_cannot_be_read_fails_only_where_it_is_recorded(recorded: Recorded, with_input: bool) -> None:
    recording = recorded.begin(typed=with_input)
    recording.from_caller(memoryview(frame(b"\x00ls")))
    assert len(recorded.failures) == with_input
    typed(recording, b'{"Width":9,"Height":9}', 4)
    shown(recording, b"x")
    await recording.finish()
    assert [code for code, _ in events_of(recorded.path)] == (["m"] if with_input else ["o", "m"])


async def test_a_failure_takes_nothing_back_that_came_before_it(recorded: Recorded) -> None:
    """Else a last frame that cannot be read would erase the second before it."""
    recording = recorded.begin(typed=True)
    typed(recording, b"cat secret\n")
    shown(recording, b"secret")
    recording.from_caller(memoryview(frame(b"\x00ls")))
    shown(recording, b"after")
    await recording.finish()
    assert [one for one in events_of(recorded.path) if one[0] != "m"] == [("i", b"cat secret\n"), ("o", b"secret")]


async def test_a_size_in_many_frames_is_parsed_once(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was parsed anew for each frame, with half a kilobyte before it: 0.3 s for what one read brings."""
    parsed: list[str] = []
    parse = session_recording.read_json_object

    def read(text: str) -> dict[str, Any]:
        parsed.append(text)
        return parse(text)

    monkeypatch.setattr(session_recording, "read_json_object", read)
    recording = recorded.begin()
    for byte in b'{"Width":7,' + b" " * 400 + b'"Height":8}\n':
        typed(recording, bytes([byte]), 4)
    typed(recording, b'{"Width":1,"Height":1}\n' * 3 + b'{"Width":9,"Height":9}\n{', 4)
    assert len(parsed) == 2
    await recording.finish()
    assert [text for code, text in events_of(recorded.path) if code == "r"] == [b"7x8", b"9x9"]


@pytest.mark.parametrize("data", [b"{}", b'{"Width":-1,"Height":2}', b'{"Width":"1","Height":2}', b"x" * 70_000, b"[]"])
async def test_a_size_that_is_none(recorded: Recorded, data: bytes) -> None:
    recording = recorded.begin()
    typed(recording, data, 4)
    assert len(recording._resize) <= 512 + len(data)
    typed(recording, b'{"Width":9,"Height":8}', 4)
    await recording.finish()
    assert events_of(recorded.path)[0] == ("r", b"9x8")


async def test_a_session_that_did_not_begin_leaves_nothing(recorded: Recorded) -> None:
    recording = recorded.begin()
    await recording.discard()
    assert list(recorded.spool.directory.iterdir()) == []

"""The writer: order, waiters, rotation, and disks that are full, slow, or gone."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcbridge.audit import writer as module
from arcbridge.audit.rotation import FileRotation, RotationBounds
from arcbridge.audit.verify import verify
from arcbridge.audit.writer import AuditWriter
from arcbridge.observe import queued_writer
from tests.support.descriptors import held
from tests.support.reports import until


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(path: Path) -> list[int]:
    return [record["n"] for record in records(path) if "n" in record]


def put(writer: AuditWriter, *values: int) -> None:
    for value in values:
        writer.put(f'{{"n":{value}}}')


def written(writer: AuditWriter, value: int) -> str:
    """Put a line and wait until its waiter is told; answers what it was told."""
    told: list[str] = []
    assert writer.put(f'{{"n":{value}}}', told.append)
    until(lambda: told, "the waiter is told")
    return told[0]


class Log:
    """Keeps what the writer tells the log; writing it to a terminal would meet the limits that tests set."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.told.append({"event": event, **fields})

    warning = info

    def events(self) -> list[str]:
        return [one["event"] for one in self.told]


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    made = Log()
    monkeypatch.setattr(module, "log", made)
    return made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for rotations, and try again, without the usual wait."""
    for one in (module, queued_writer):
        monkeypatch.setattr(one, "RETRY", 0.0)


def test_lines_are_in_order_and_the_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    writer = AuditWriter(str(path), instance="agent-1")
    put(writer, *range(2000))
    writer.close()
    found = records(path)
    assert numbers(path) == list(range(2000))
    assert (found[0]["event"], found[0]["cause"], found[0]["instance"]) == ("chain", "started", "agent-1")
    assert (found[-1]["event"], found[-1]["cause"]) == ("chain-end", "stopped")
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert verify([path]).ok
    assert writer.dropped == 0
    assert writer.put("{}") is False, "a line behind the end would be lost unseen"


def test_a_waiter_is_told_once_its_line_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    writer = AuditWriter(str(path))
    seen: list[tuple[str, int]] = []
    done = threading.Event()

    def waiter(failure: str) -> None:
        seen.append((failure, path.read_text().count('"n":7')))
        done.set()

    writer.put('{"n":7}', waiter)
    assert done.wait(10)
    assert seen == [("", 1)]
    writer.close()


def test_with_fsync_the_line_is_on_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(descriptor))
    writer = AuditWriter(str(tmp_path / "audit.jsonl"), fsync=True)
    assert written(writer, 1) == ""
    assert synced
    writer.close()
    synced.clear()
    other = AuditWriter(str(tmp_path / "other.jsonl"))
    assert written(other, 1) == ""
    other.close()
    assert synced == []


def test_a_restart_continues_the_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for value in range(3):
        writer = AuditWriter(str(path))
        put(writer, value)
        writer.close()
    chains = [record for record in records(path) if record["event" if "event" in record else "n"] == "chain"]
    assert len({record["chain"] for record in chains}) == 3
    assert [record.get("after", "").partition("/")[0] for record in chains[1:]] == [
        record["chain"] for record in chains[:2]
    ]
    report = verify([path])
    assert report.ok
    assert report.notes == []


def test_a_line_without_an_end_is_closed_off(tmp_path: Path) -> None:
    """A process that was killed while it wrote leaves one."""
    path = tmp_path / "audit.jsonl"
    writer = AuditWriter(str(path))
    put(writer, 1)
    writer.close()
    with path.open("ab") as file:
        file.write(b'{"chain":"00')
    writer = AuditWriter(str(path))
    put(writer, 2)
    writer.close()
    report = verify([path])
    assert report.ok
    assert "12 bytes of an unfinished line" in report.notes[0]


def test_a_record_that_lacks_its_end_alone_is_the_last_one(tmp_path: Path) -> None:
    """It is whole once the next chain stands behind it, and must not look as if it was added."""
    path = tmp_path / "audit.jsonl"
    writer = AuditWriter(str(path))
    put(writer, 1)
    writer.close()
    os.truncate(path, path.stat().st_size - 1 - len(path.read_bytes().splitlines(keepends=True)[-1]))
    writer = AuditWriter(str(path))
    put(writer, 2)
    writer.close()
    assert verify([path]).ok
    _, last, start, *_ = records(path)
    assert (last["n"], start["after"]) == (1, f"{last['chain']}/{last['seq']}")


def test_rotation_by_rename(tmp_path: Path, quick: None) -> None:
    path, old, older = (tmp_path / name for name in ("audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"))
    writer = AuditWriter(str(path))
    assert written(writer, 1) == ""
    path.rename(older)
    assert written(writer, 2) == ""
    path.rename(old)
    path.touch(mode=0o640)  # as logrotate's `create` does
    assert written(writer, 3) == ""
    writer.close()
    assert [numbers(one) for one in (older, old, path)] == [[1], [2], [3]]
    assert records(older)[-1]["cause"] == records(path)[0]["cause"] == "rotated"
    report = verify([path, older, old])
    assert report.ok
    assert report.notes == []


def test_a_file_that_is_cut_under_the_writer(tmp_path: Path, quick: None) -> None:
    """`copytruncate` of logrotate, or a hand that cuts: the chain begins anew and says what should be before it."""
    path, copy = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    writer = AuditWriter(str(path))
    assert written(writer, 1) == ""
    copy.write_bytes(path.read_bytes())
    os.truncate(path, 0)
    assert written(writer, 2) == ""
    writer.close()
    assert verify([copy, path]).ok
    assert [record["cause"] for record in records(path) if "cause" in record] == ["cut", "stopped"]
    copy.unlink()
    assert any("which is in none of these files" in note for note in verify([path]).notes)


@pytest.mark.parametrize("cut", [False, True], ids=["renamed", "cut"])
def test_a_new_chain_begins_whole_or_is_tried_again(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    """Its beginning opens the file, and then fails as it reads the line that stands there."""
    path, old = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    writer = AuditWriter(str(path))
    assert written(writer, 1) == ""
    opened = held()
    real, failures = module._last_line, [3]

    def failing(file: str, size: int) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.EIO, "made to fail")
        return real(file, size)

    old.write_bytes(path.read_bytes())
    monkeypatch.setattr(module, "_last_line", failing)
    if cut:
        os.truncate(path, 0)
    else:
        path.rename(old)
    assert written(writer, 2) == "made to fail"
    until(lambda: not failures[0] and not writer.failure, "it is written again")
    assert written(writer, 3) == ""
    assert len(held() - opened) == len(opened - held()), "the old file was closed"
    writer.close()
    assert [numbers(one) for one in (old, path)] == [[1], [2, 3]]
    causes = [record["cause"] for record in (*records(old), *records(path)) if "cause" in record]
    assert causes == (["started", "cut", "stopped"] if cut else ["started", "rotated", "rotated", "stopped"])
    assert verify([old, path]).ok


def test_two_agents_may_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    writers = [AuditWriter(str(path)), AuditWriter(str(path))]
    for value in range(200):
        put(writers[value % 2], value)
    for writer in writers:
        writer.close()
    assert sorted(numbers(path)) == list(range(200))
    assert verify([path]).ok


# -- disks that take nothing ------------------------------------------------------------------------------------------


def test_a_full_disk(quick: None, log: Log) -> None:
    writer = AuditWriter("/dev/full")
    told: list[str] = []
    writer.put("{}", told.append)
    until(lambda: told and writer.failure, "the failure is seen")
    assert told == ["No space left on device"]
    assert writer.failures == 1
    writer.close()
    assert writer.dropped >= 1
    assert log.events() == ["audit log cannot be written", "audit records lost"]


def test_a_full_disk_does_not_keep_what_is_above_its_bound(tmp_path: Path, quick: None) -> None:
    """A lower `keep_bytes` and a restart make room, and the count follows once there is some."""
    path, old = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl-20261129T000000Z-0123456789abcdef"
    old.write_text("x" * 100)
    path.symlink_to("/dev/full")
    rotation = FileRotation(
        RotationBounds(rotate=1 << 20, keep=50), lambda removed: [f'{{"counted":{len([*removed])}}}']
    )
    writer = AuditWriter(str(path), rotation=rotation)
    until(lambda: writer.failure, "the disk is full")
    until(lambda: not old.exists(), "there is room")
    assert writer._held == ['{"counted":1}'], "it is written when the disk takes it"
    writer.close()


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """Sets how large a file of this process may become (RLIMIT_FSIZE): the kernel then takes a part of a write only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_what_the_disk_refused_is_written_later(tmp_path: Path, quick: None, limited: Callable[[int], None]) -> None:
    path = tmp_path / "audit.jsonl"
    writer = AuditWriter(str(path))
    assert written(writer, 0) == ""
    size = path.stat().st_size
    limited(size + 700)  # some lines, and a part of one
    put(writer, *range(1, 50))
    until(lambda: writer.failure, "the disk is full")
    assert writer.failure == "File too large"
    # Each further attempt leaves a part for a moment.
    whole = until(lambda: (now := path.read_bytes()).endswith(b"\n") and now, "no part of a line stays in the file")
    assert size < len(whole) <= size + 700
    put(writer, *range(50, 60))
    limited(resource.RLIM_INFINITY)
    until(lambda: not writer.failure, "it is written again")
    assert written(writer, 60) == ""
    writer.close()
    assert numbers(path) == list(range(61))
    assert writer.dropped == 0
    assert verify([path]).ok


def test_a_file_is_rotated_while_the_disk_is_full(tmp_path: Path, quick: None, limited: Callable[[int], None]) -> None:
    path, old = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    writer = AuditWriter(str(path))
    assert written(writer, 0) == ""
    limited(path.stat().st_size + 100)
    put(writer, 1, 2, 3)
    until(lambda: writer.failure, "the disk is full")
    path.rename(old)
    put(writer, 4)
    limited(resource.RLIM_INFINITY)
    until(lambda: not writer.failure, "it is written again")
    assert written(writer, 5) == ""
    writer.close()
    assert sorted(numbers(old) + numbers(path)) == [0, 1, 2, 3, 4, 5]
    assert verify([old, path]).ok


def test_what_does_not_fit_is_counted_and_the_log_says_so(
    tmp_path: Path, quick: None, limited: Callable[[int], None]
) -> None:
    path = tmp_path / "audit.jsonl"
    writer = AuditWriter(str(path), queue=1000)
    assert written(writer, 0) == ""
    limited(path.stat().st_size)
    until(lambda: [put(writer, 1), writer.failure][1], "the disk is full")
    before = writer.dropped
    put(writer, *[2] * 500)
    lost = writer.dropped
    assert lost - before > 300
    limited(resource.RLIM_INFINITY)
    until(lambda: not writer.failure, "it is written again")
    writer.close()
    assert sum(record["records"] for record in records(path) if record.get("event") == "audit-lost") == lost
    report = verify([path])
    assert [finding.kind for finding in report.findings] == ["lost"]
    assert f"could not write {lost} records" in report.findings[0].text


def test_a_stalled_reader_never_stalls_the_event_loop(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = AuditWriter(str(path))
    line = '{"u":"' + "u" * 200 + '"}'
    began = time.monotonic()
    for _ in range(40_000):
        writer.put(line)
    assert time.monotonic() - began < 10
    assert writer.dropped > 0
    until(lambda: writer.writing_since > 0, "its thread writes")
    os.close(reader)
    writer.close()
    assert not writer.writing_since


def test_a_directory_that_is_gone(tmp_path: Path, quick: None) -> None:
    """The file cannot be opened anew: nothing is written to the removed one as if all were well."""
    directory = tmp_path / "log"
    directory.mkdir()
    writer = AuditWriter(str(directory / "audit.jsonl"))
    assert written(writer, 1) == ""
    directory.rename(tmp_path / "away")
    put(writer, 2)
    until(lambda: [put(writer, 2), writer.failure][1], "the failure is seen")
    directory.mkdir()
    until(lambda: not writer.failure, "it is written again")
    assert written(writer, 3) == ""
    writer.close()
    assert 3 in numbers(directory / "audit.jsonl")
    assert verify([tmp_path / "away" / "audit.jsonl", directory / "audit.jsonl"]).ok


def test_standard_output(tmp_path: Path) -> None:
    program = """
        from arcbridge.audit.writer import AuditWriter
        writer = AuditWriter("-")
        for value in range(100):
            writer.put('{"n":%d}' % value)
        writer.close()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=True, timeout=30)
    lines = [line for line in done.stdout.splitlines(keepends=True) if b'{"chain"' in line]
    path = tmp_path / "collected"
    path.write_bytes(b"".join(b"2026-11-25T10:00:00Z stdout F " + line for line in lines))
    report = verify([path])
    assert report.ok
    assert report.records == 102


def test_heads_are_told_to_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    monkeypatch.setattr(module, "HEAD_INTERVAL", 0.05)
    writer = AuditWriter(str(tmp_path / "audit.jsonl"))
    assert written(writer, 1) == ""
    head = writer.head
    until(lambda: log.told and log.told[-1]["record"] == head.sequence, "an idle log tells its head, too")
    assert log.told[-1] == {"event": "audit head", "chain": head.chain, "record": head.sequence, "hash": head.hash}
    writer.close()
    assert log.told[-1]["hash"] == writer.head.hash


def test_a_defect_of_the_writer_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = AuditWriter(str(tmp_path / "audit.jsonl"))
    assert written(writer, 1) == ""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(writer, "_seal", lambda: 1 / 0)
    put(writer, 2)
    until(lambda: writer.failure, "the failure is seen")
    assert writer.failure == "the writer failed (ZeroDivisionError)"


# -- whatever happens -------------------------------------------------------------------------------------------------


class Disk:
    """Stands in for `os.write`: takes `room` bytes, a part of a write where it has less, and refuses the rest."""

    def __init__(self) -> None:
        self.room = sys.maxsize
        self._write = os.write

    def write(self, descriptor: int, data: bytes) -> int:
        room = self.room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self._write(descriptor, bytes(data[:room]))
        self.room = max(self.room - count, 0) if self.room != sys.maxsize else self.room
        return count


STEPS = st.one_of(
    st.tuples(st.just("put"), st.integers(1, 20)),
    st.tuples(st.just("wait for"), st.just(0)),
    st.tuples(st.just("room"), st.integers(0, 2000)),
    st.tuples(st.just("free"), st.just(0)),
    st.tuples(st.just("rotate"), st.just(0)),
    st.tuples(st.just("reopen"), st.just(0)),
)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(STEPS, max_size=20), room_of_queue=st.integers(100, 600))
def test_each_line_is_written_once_and_in_order_or_counted(steps: list[tuple[str, int]], room_of_queue: int) -> None:
    """The invariants of docs/audit.md, with a disk that is full at any byte and files that are renamed at any time."""
    disk, accepted, refused = Disk(), list[int](), 0
    told: dict[int, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for one in (module, queued_writer):
            patch.setattr(one, "RETRY", 0.0)
        patch.setattr(os, "write", disk.write)
        path, rotated = Path(folder, "audit.jsonl"), list[Path]()
        writer = AuditWriter(str(path), queue=room_of_queue)

        def put_one(value: int, waits: bool) -> bool:
            nonlocal refused
            answers = list[str]()
            if not writer.put(f'{{"n":{value}}}', answers.append if waits else None):
                refused += 1
                return False
            accepted.append(value)
            told.update({value: answers} if waits else {})
            return True

        value = 0
        for step, count in [*steps, ("free", 0)]:
            for _ in range(count if step == "put" else step == "wait for"):
                put_one(value, step == "wait for")
                value += 1
            if step in ("room", "free"):
                disk.room = count if step == "room" else sys.maxsize
            elif step == "rotate" and path.exists():
                rotated.append(Path(folder, f"audit.jsonl.{len(rotated)}"))
                path.rename(rotated[-1])
            elif step == "reopen":
                writer.reopen()
        until(lambda: writer.writing_since == 0.0 and not writer.failure, "the disk takes lines again")
        until(lambda: put_one(value, True), "there is room in the queue")
        until(lambda: told[value] == [""], "the last line is written")
        writer.close()
        files = [file for file in (*rotated, path) if file.exists()]
        found = [number for file in files for number in numbers(file)]
        lost = sum(
            record["records"] for file in files for record in records(file) if record.get("event") == "audit-lost"
        )
        report = verify(files)
    assert found == accepted
    assert lost == refused == writer.dropped
    assert {finding.kind for finding in report.findings} <= {"lost"}
    assert all(len(answers) == 1 for answers in told.values()), "a waiter is told once"

"""Reading on in a log: over rotations of every kind, from any position, and what is said of files that are gone."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcbridge.audit.rotation import FileRotation, RotationBounds
from arcbridge.audit.sinks import tail
from arcbridge.audit.sinks.tail import Batch, PackedFile, Position, lost_with, read_batch, read_position, write_position
from arcbridge.audit.writer import SealedFile
from arcbridge.errors import StateError


class Log:
    """A log that is written, and rotated in different ways."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "audit.jsonl"
        self.number = 0
        self.rotations = 0
        self.file = self.opened()

    def opened(self) -> SealedFile:
        rotation = FileRotation(RotationBounds())
        return SealedFile(str(self.path), "i", False, rotation, closing=lambda: True, on_end=lambda: None)

    def put(self, count: int = 1) -> None:
        lines = [f'{{"ts":"2026-11-29T00:00:00.000Z","n":{self.number + one}}}' for one in range(count)]
        self.number += count
        self.file.seal(lines)
        self.file.write()

    def rotate(self, *, pack: bool = False) -> Path:
        self.rotations += 1
        target = self.path.with_name(f"audit.jsonl.{self.rotations}")
        self.path.rename(target)
        time.sleep(0.002)  # chains are told apart by their times, of milliseconds
        self.file.follow_rotation(True)
        self.file.write()
        os.utime(target, (time.time() - 60, time.time() - 60))
        if pack:
            with gzip.open(f"{target}.gz", "wb") as packed:
                packed.write(target.read_bytes())
            target.unlink()
            target = Path(f"{target}.gz")
        return target

    def restart(self, torn: bytes = b"") -> None:
        """The process is killed, in the middle of a line perhaps, and started again."""
        self.file.close()
        with self.path.open("ab") as file:
            file.write(torn)
        self.file = self.opened()
        self.file.write()


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


def numbers(batch: Batch) -> list[int]:
    return [int(str(one.sealed.fields["n"])) for one in batch.records if "n" in one.sealed.fields]


def read_all(path: Path, position: Position, records: int = 7) -> tuple[list[int], list[Batch], Position]:
    """Read to the end."""
    found: list[int] = []
    batches, packed = [], PackedFile()
    for _ in range(1000):
        batch = read_batch(path, position, records, 1 << 20, packed)
        if batch == Batch([], position, position, batch.waiting):
            packed.close()
            return found, batches, position
        found += numbers(batch)
        batches.append(batch)
        position = batch.end
    raise AssertionError("it does not come to an end")


def test_what_was_written_comes_in_order_and_as_it_stands(log: Log) -> None:
    log.put(20)
    found, batches, position = read_all(log.path, Position())
    assert found == list(range(20))
    texts = b"\n".join([*(one.text for batch in batches for one in batch.records), b""])
    assert texts == log.path.read_bytes(), "the chain's own records are among them"
    assert read_batch(log.path, position, 7, 1 << 20).records == []
    log.put(2)
    assert read_all(log.path, position)[0] == [20, 21]


@pytest.mark.parametrize("pack", [False, True])
def test_a_rotation_loses_and_repeats_nothing(log: Log, pack: bool) -> None:
    log.put(5)
    _, _, position = read_all(log.path, Position())
    for _ in range(3):
        log.put(5)
        log.rotate(pack=pack)
    log.put(5)
    assert read_all(log.path, position)[0] == list(range(5, 25))
    assert read_all(log.path, Position())[0] == list(range(25))


def test_a_file_that_may_still_be_written_is_not_left(log: Log) -> None:
    log.put(3)
    old = log.rotate()
    os.utime(old)
    log.put(3)
    found, _, position = read_all(log.path, Position())
    assert found == [0, 1, 2], "its writer may not have noticed that the file was renamed"
    os.utime(old, (time.time() - 60, time.time() - 60))
    assert read_all(log.path, position)[0] == [3, 4, 5]


def test_a_compressed_file_is_read_through_once(log: Log) -> None:
    """Else each batch would begin at its beginning, and a day of records would take hours."""
    log.put(3000)
    _, _, behind = read_all(log.path, Position(), 3000)
    path = log.rotate(pack=True)
    begin = Position(behind.file, behind.began, 0)
    packed, position, moved = PackedFile(), begin, list[int]()
    for _ in range(20):
        before = packed.opened(path).tell()
        position = read_batch(log.path, position, 100, 1 << 20, packed).end
        moved.append(before - position.offset)
    packed.close()
    assert all(one < 0 for one in moved), "it is where the batch before has ended"
    assert position.sequence == 1999


def test_copytruncate(log: Log) -> None:
    log.put(4)
    position = read_batch(log.path, Position(), 3, 1 << 20).end
    copy = log.path.with_name("audit.jsonl.1")
    shutil.copy(log.path, copy)
    os.utime(copy, (time.time() - 60, time.time() - 60))
    os.truncate(log.path, 0)
    time.sleep(0.002)
    log.file.follow_rotation(True)
    log.put(4)
    assert read_all(log.path, position)[0] == [2, 3, 4, 5, 6, 7]


def test_a_line_without_an_end_waits_and_one_that_was_cut_is_passed_over(log: Log) -> None:
    log.put(2)
    with log.path.open("ab") as file:
        file.write(b'{"chain":"0123')
    found, _, position = read_all(log.path, Position())
    assert found == [0, 1]
    log.restart()
    log.put(2)
    found, batches, _ = read_all(log.path, position)
    assert found == [2, 3]
    assert batches[0].records[0].sealed.fields["torn"] == 14


def test_bounds_of_a_batch(log: Log) -> None:
    log.put(50)
    assert len(read_batch(log.path, Position(), 10, 1 << 20).records) == 10
    small = read_batch(log.path, Position(), 50, 1000)
    assert sum(len(one.text) + 1 for one in small.records) <= 1000
    assert len(read_batch(log.path, Position(), 50, 1).records) == 1, "one record comes in any case"


def test_a_long_line_that_is_no_record_costs_no_memory(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.put(1)
    position = read_all(log.path, Position())[2]

    peaks = []
    for size in (4 << 20, 32 << 20):
        with log.path.open("ab") as file:
            file.write(b"x" * size + b"\n")
        tracemalloc.start()
        assert read_batch(log.path, position, 10, 1 << 20).records == []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_files_that_are_gone_are_counted(log: Log) -> None:
    log.put(5)
    _, _, position = read_all(log.path, Position())
    log.put(3)
    log.rotate().unlink()
    log.put(2)
    batch = read_batch(log.path, position, 100, 1 << 20)
    assert numbers(batch) == [8, 9]
    assert batch.missing is not None
    assert batch.missing[0] == 4, "three records and the chain's end"
    assert not batch.missing[2]


def test_what_was_delivered_whole_is_not_missing(log: Log) -> None:
    log.put(5)
    old = log.rotate()
    batch = read_batch(log.path, Position(), 7, 1 << 20)
    assert numbers(batch) == [0, 1, 2, 3, 4]
    old.unlink()
    log.put(1)
    batch = read_batch(log.path, batch.end, 100, 1 << 20)
    assert numbers(batch) == [5]
    assert batch.missing is None


def test_several_files_that_are_gone_are_counted_at_least(log: Log) -> None:
    log.put(5)
    _, _, position = read_all(log.path, Position())
    for _ in range(2):
        log.put(3)
        log.rotate().unlink()
    log.put(1)
    batch = read_batch(log.path, position, 100, 1 << 20)
    assert numbers(batch) == [11]
    assert batch.missing is not None
    assert batch.missing[2], "how many it were is not known"


def test_a_clock_that_was_set_back_hides_no_record(log: Log) -> None:
    log.put(3)
    _, _, position = read_all(log.path, Position())
    log.rotate().unlink()
    log.put(2)
    later = Position(**{**vars_of(position), "began": "2099-01-01T00:00:00.000Z"})
    assert read_all(log.path, later)[0] == [3, 4]


def vars_of(position: Position) -> dict[str, object]:
    return {name: getattr(position, name) for name in Position.__slots__}


def test_lost_with_counts_what_a_sink_has_not_delivered(log: Log) -> None:
    log.put(5)
    position = read_batch(log.path, Position(), 3, 1 << 20).end  # the chain's record, 0 and 1
    write_position(log.path, "siem", position)
    first = log.rotate()
    log.put(4)
    second = log.rotate(pack=True)
    found = {one.sink: one for one in lost_with(log.path, [first, second], ["siem", "new"])}
    assert found["siem"].records == 4 + 6, "2, 3, 4 and the end of the first; all of the second with begin and end"
    assert found["new"].records == 7 + 6
    line = json.loads(found["siem"].line())
    assert line["event"] == "audit-undelivered"
    assert line["after"] == f"{position.chain}/2"
    assert (line["sink"], line["records"]) == ("siem", 10)
    write_position(log.path, "siem", read_all(log.path, Position())[2])
    assert [one.sink for one in lost_with(log.path, [first, second], ["siem"])] == []


def test_a_position_is_kept_and_damage_begins_anew(log: Log) -> None:
    assert read_position(log.path, "siem") == Position()
    position = Position("a" * 64, "2026-11-29T00:00:00.000Z", 17, "b" * 16, 3)
    write_position(log.path, "siem", position)
    assert read_position(log.path, "siem") == position
    kept = tail.position_file(log.path, "siem")
    assert kept.stat().st_mode & 0o777 == 0o600
    for damage in (b"", b"{", b"[]", b'{"offset": "17"}', b'{"offset": -1}', b'{"offset": true}', b"\xff"):
        kept.write_bytes(damage)
        assert read_position(log.path, "siem") == Position(), damage
    kept.write_bytes(b"x" * (2 << 20))
    with pytest.raises(StateError, match="larger than"):
        read_position(log.path, "siem")


def test_no_file_of_a_sink_is_taken_for_a_rotated_log(log: Log) -> None:
    log.put(1)
    write_position(log.path, "siem", Position())
    assert [path.name for path in tail.with_rotated(log.path)] == ["audit.jsonl"]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(1, 5)),
            st.tuples(st.just("read"), st.integers(1, 9)),
            st.tuples(st.sampled_from(["rotate", "pack", "kill"]), st.just(0)),
        ),
        max_size=25,
    )
)
def test_each_record_comes_once_and_in_order_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    log = Log(tmp_path_factory.mktemp("log"))
    log.put(1)
    position, found = Position(), list[int]()
    for what, count in steps:
        if what == "put":
            log.put(count)
        elif what == "read":
            batch = read_batch(log.path, position, count, 1 << 20)
            found += numbers(batch)
            position = batch.end
            assert batch.missing is None
        elif what == "kill":
            log.restart(b'{"chain":"01')
        else:
            log.rotate(pack=what == "pack")
    found += read_all(log.path, position)[0]
    assert found == list(range(log.number))
    log.file.close()

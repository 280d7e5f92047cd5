"""Reading on in a log: over rotations of every kind, from any position, and what is said of files that are gone."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcbridge.audit import chain
from arcbridge.audit.chain import Head
from arcbridge.audit.rotation import FileRotation, RotationBounds
from arcbridge.audit.sinks import tail
from arcbridge.audit.sinks.tail import Batch, LogFiles, Position, lost_with, read_position, write_position
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
        self.file.follow_rotation(True)
        self.file.write()
        if pack:
            with gzip.open(f"{target}.gz", "wb") as packed:
                packed.write(target.read_bytes())
            target.unlink()
            target = Path(f"{target}.gz")
        settle(target)
        return target

    def restart(self, torn: bytes = b"") -> None:
        """The process is killed, in the middle of a line perhaps, and started again."""
        self.file.close()
        with self.path.open("ab") as file:
            file.write(torn)
        self.file = self.opened()
        self.file.write()


def settle(path: Path) -> None:
    """No process writes to it any more; gzip leaves the time of the last write as it was, too."""
    os.utime(path, (time.time() - 60, time.time() - 60))


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


def numbers(batch: Batch) -> list[int]:
    return [int(str(one.sealed.fields["n"])) for one in batch.records if "n" in one.sealed.fields]


def read_all(path: Path, position: Position, records: int = 7) -> tuple[list[int], list[Batch], Position]:
    """Read to the end."""
    found: list[int] = []
    batches, files = [], LogFiles(path)
    for _ in range(1000):
        batch = files.read(position, records, 1 << 20)
        if batch == Batch([], position, position, batch.waiting):
            files.close()
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
    assert LogFiles(log.path).read(position, 7, 1 << 20).records == []
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
    settle(old)
    assert read_all(log.path, position)[0] == [3, 4, 5]


def test_a_compressed_file_is_read_through_once(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each batch would begin at its beginning, and a day of records would take hours."""
    log.put(3000)
    _, _, behind = read_all(log.path, Position(), 3000)
    path = log.rotate(pack=True)
    opened, files, position = list[Path](), LogFiles(log.path), Position(behind.file)
    is_open = tail.open_log
    monkeypatch.setattr(tail, "open_log", lambda path: opened.append(path) or is_open(path))
    for _ in range(20):
        position = files.read(position, 100, 1 << 20).end
    files.close()
    assert opened.count(path) <= 2, "for its first record, and for the rest"
    assert position.sequence == 1999


def test_copytruncate(log: Log) -> None:
    log.put(4)
    position = LogFiles(log.path).read(Position(), 3, 1 << 20).end
    copy = log.path.with_name("audit.jsonl.1")
    shutil.copy(log.path, copy)
    settle(copy)
    os.truncate(log.path, 0)
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
    assert len(LogFiles(log.path).read(Position(), 10, 1 << 20).records) == 10
    small = LogFiles(log.path).read(Position(), 50, 1000)
    assert sum(len(one.text) + 1 for one in small.records) <= 1000
    assert len(LogFiles(log.path).read(Position(), 50, 1).records) == 1, "one record comes in any case"


def test_a_long_line_that_is_no_record_costs_no_memory(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.put(1)
    position = read_all(log.path, Position())[2]

    peaks = []
    for size in (4 << 20, 32 << 20):
        with log.path.open("ab") as file:
            file.write(b"x" * size + b"\n")
        tracemalloc.start()
        assert LogFiles(log.path).read(position, 10, 1 << 20).records == []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_files_that_are_gone_are_counted(log: Log) -> None:
    log.put(5)
    _, _, position = read_all(log.path, Position())
    log.put(3)
    log.rotate().unlink()
    log.put(2)
    batch = LogFiles(log.path).read(position, 100, 1 << 20)
    assert numbers(batch) == [8, 9]
    assert batch.missing is not None
    assert batch.missing[0] == 4, "three records and the chain's end"
    assert not batch.missing[2]


def test_what_was_delivered_whole_is_not_missing(log: Log) -> None:
    log.put(5)
    old = log.rotate()
    batch = LogFiles(log.path).read(Position(), 7, 1 << 20)
    assert numbers(batch) == [0, 1, 2, 3, 4]
    old.unlink()
    log.put(1)
    batch = LogFiles(log.path).read(batch.end, 100, 1 << 20)
    assert numbers(batch) == [5]
    assert batch.missing is None


def test_several_files_that_are_gone_are_counted_at_least(log: Log) -> None:
    log.put(5)
    _, _, position = read_all(log.path, Position())
    for _ in range(2):
        log.put(3)
        log.rotate().unlink()
    log.put(1)
    batch = LogFiles(log.path).read(position, 100, 1 << 20)
    assert numbers(batch) == [11]
    assert batch.missing is not None
    assert batch.missing[2], "how many it were is not known"


def read_on(log: Log, records: int) -> Position:
    """Where a sink is that has delivered so many."""
    return LogFiles(log.path).read(Position(), records, 1 << 20).end


@pytest.mark.parametrize("delivered", [0, 2, 4])
def test_a_clock_that_was_set_back_hides_no_file(log: Log, monkeypatch: pytest.MonkeyPatch, delivered: int) -> None:
    log.put(3)
    position = read_on(log, delivered) if delivered else Position()
    for when in ("09", "07", "08"):
        monkeypatch.setattr(chain, "timestamp", lambda when=when: f"1970-01-01T{when}:00:00.000Z")
        log.rotate()
        log.put(3)
    found, batches, _ = read_all(log.path, position)
    assert found == list(range(max(0, delivered - 1), 12))
    assert [one.missing for one in batches if one.missing] == []


@pytest.mark.parametrize("kept", [0, 0.8])
def test_a_damaged_file_is_read_as_far_as_it_goes_and_the_rest_is_counted(log: Log, kept: float) -> None:
    log.put(3)
    log.rotate()
    log.put(2000)
    packed = log.rotate(pack=True)
    log.put(3)
    data = packed.read_bytes()
    packed.write_bytes(data[: int(len(data) * kept)] or b"no gzip")
    found, batches, position = read_all(log.path, Position(), 100)
    assert found[-1] < 2003, "it may still be written"
    if kept:
        assert read_all(log.path, position)[1] == []
    settle(packed)
    more, batches, position = read_all(log.path, position, 100)
    found += more
    assert found[-3:] == [2003, 2004, 2005]
    assert found == sorted(set(found))
    (missing,) = (one.missing for one in batches if one.missing)
    assert (missing[0], missing[2]) == ((2006 - len(found) + 1, False) if kept else (1, True))
    assert read_all(log.path, position)[1] == []


def test_a_file_that_loses_its_name_for_a_moment_is_not_passed_over(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    log.put(3)
    position = read_all(log.path, Position())[2]
    first = log.rotate()
    log.put(3)
    second = log.rotate()
    log.put(3)
    names, looks = tail.with_rotated, list[int]()

    def renaming(path: Path) -> list[Path]:
        found = names(path)
        if not looks:  # logrotate makes room for the next one while the directory is read
            second.rename(f"{second}.2")
            first.rename(second)
        looks.append(1)
        return found

    monkeypatch.setattr(tail, "with_rotated", renaming)
    found, batches, _ = read_all(log.path, position)
    assert found == [3, 4, 5, 6, 7, 8]
    assert [one.missing for one in batches if one.missing] == []


@pytest.mark.parametrize("name", ["audit.jsonl.save", "audit.jsonl-backup", "audit.jsonl-0", "audit.jsonl.0.gz"])
@pytest.mark.parametrize("pack", [False, True])
def test_a_shorter_copy_hides_nothing(log: Log, name: str, pack: bool) -> None:
    log.put(6)
    data = b"".join(log.path.read_bytes().splitlines(keepends=True)[:3])
    log.rotate(pack=pack)
    log.put(2)
    copy = log.path.with_name(name)
    copy.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    settle(copy)
    found, batches, _ = read_all(log.path, Position(), 2)
    assert found == list(range(8))
    assert [one.missing for one in batches if one.missing] == []


def test_what_a_role_left_behind_that_found_no_file_at_its_start_is_not_missing(log: Log) -> None:
    """logrotate has renamed the file while the role was stopped."""
    log.put(3)
    log.restart()
    position = read_on(log, 2)
    log.file.close()
    log.path.rename(f"{log.path}.1")
    settle(Path(f"{log.path}.1"))
    log.file = log.opened()
    log.put(3)
    found, batches, _ = read_all(log.path, position)
    assert found == [1, 2, 3, 4, 5]
    assert [one.missing for one in batches if one.missing] == []


def test_clocks_and_damage_together_bring_no_file_again(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files before the gap seem to be younger than the one that was read last."""
    for when in ("09", "08", "07", "06"):
        log.put(3)
        monkeypatch.setattr(chain, "timestamp", lambda when=when: f"1970-01-01T{when}:00:00.000Z")
        gone = log.rotate()
    position = read_on(log, 9)  # the first file alone
    gone.unlink()
    log.put(3)
    found, batches, _ = read_all(log.path, position)
    assert found == [3, 4, 5, 6, 7, 8, 12, 13, 14]
    assert [one.missing[0] for one in batches if one.missing] == [1], "at least"


def test_several_writers_of_one_file_are_no_gap(log: Log) -> None:
    other = log.opened()
    log.put(2)
    log.file, other = other, log.file
    log.put(2)
    log.rotate()
    log.put(2)
    found, batches, _ = read_all(log.path, Position())
    assert found == list(range(6))
    assert [one.missing for one in batches if one.missing] == []
    other.close()


def test_no_file_is_opened_again_for_each_batch(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(20):
        log.put(3)
        log.rotate(pack=True)
    opened, files, position = list[Path](), LogFiles(log.path), Position()
    is_open = tail.open_log
    monkeypatch.setattr(tail, "open_log", lambda path: opened.append(path) or is_open(path))
    for _ in range(30):
        position = files.read(position, 2, 1 << 20).end
    files.close()
    assert max(map(opened.count, opened)) <= 2


def test_a_file_that_grows_is_one_in_memory(log: Log) -> None:
    files, position = LogFiles(log.path), Position()
    for _ in range(50):
        log.put(1)
        position = files.read(position, 7, 1 << 20).end
    assert len(files._firsts) == 1


def test_lost_with_counts_what_a_sink_has_not_delivered(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    log.put(5)
    position = LogFiles(log.path).read(Position(), 3, 1 << 20).end  # the chain's record, 0 and 1
    write_position(log.path, "siem", position)
    first = log.rotate()
    log.put(4)
    second = log.rotate(pack=True)
    opened = list[Path]()
    is_open = tail.open_log
    monkeypatch.setattr(tail, "open_log", lambda path: opened.append(path) or is_open(path))
    found = {one.sink: one for one in lost_with(log.path, [first, second], ["siem", "new"])}
    assert max(map(opened.count, opened)) == 2, "for its first record, and once for all sinks"
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
    position = Position("a" * 64, 17, "b" * 16, 3, "c" * 64)
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


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(1, 5)),
            st.tuples(st.just("read"), st.integers(1, 9)),
            st.tuples(st.sampled_from(["rotate", "pack", "kill"]), st.just(0)),
            st.tuples(st.sampled_from(["clock", "copy", "damage", "remove"]), st.integers(0, 20)),
        ),
        max_size=30,
    )
)
def test_each_record_comes_once_and_in_order_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    directory = tmp_path_factory.mktemp("log")
    with pytest.MonkeyPatch.context() as patch:
        log = Log(directory)
        log.put(1)
        files, position, found, missing = LogFiles(log.path), Position(), list[int](), list[tuple[int, Head, bool]]()
        for what, count in [("read", 1), *steps, *[("read", 9)] * 200]:
            rotated = sorted(path for path in tail.with_rotated(log.path) if path != log.path)
            one = rotated[count % len(rotated)] if rotated else None
            if what == "put":
                log.put(count)
            elif what == "read":
                batch = files.read(position, count, 1 << 20)
                found += numbers(batch)
                position = batch.end
                missing += [batch.missing] if batch.missing else []
            elif what == "kill":
                log.restart(b'{"chain":"01')
            elif what == "clock":
                patch.setattr(chain, "timestamp", lambda count=count: f"2026-11-29T{count:02}:00:00.000Z")
            elif what == "copy" and one is not None:
                data = gzip.decompress(one.read_bytes()) if is_whole(one) else one.read_bytes()
                copy = log.path.with_name(f"audit.jsonl.save{len(rotated)}")
                copy.write_bytes(data[: len(data) * count // 20])
                settle(copy)
            elif what == "damage" and one is not None:
                one.write_bytes(one.read_bytes()[: one.stat().st_size * count // 21])
                settle(one)
            elif what == "remove" and one is not None:
                one.unlink()
            elif what in ("rotate", "pack"):
                log.rotate(pack=what == "pack")
        log.file.close()
        files.close()
    lost = set(range(log.number)).difference(found)
    if not {"damage", "remove"} & {what for what, _ in steps}:
        assert found == list(range(log.number))
        assert missing == []
    elif not any(at_least for _, _, at_least in missing):
        assert len(lost) <= sum(count for count, _, _ in missing), "what does not come is counted"
    assert read_all(log.path, position)[1] == [], "it is at the end"


def is_whole(path: Path) -> bool:
    """Whether it is a compressed file that can be read."""
    try:
        return path.suffix == ".gz" and bool(gzip.decompress(path.read_bytes()))
    except (EOFError, OSError, zlib.error):
        return False

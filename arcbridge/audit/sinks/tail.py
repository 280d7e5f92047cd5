"""Reads on in an audit log and its rotated files from a position, and says what is missing there.

Nothing is kept open between two reads: a file is known again by its first record, whatever logrotate has made of it,
gzip included. Invariants: a batch holds whole records in the order of the files; its end is behind the last of them.
"""

from __future__ import annotations

import gzip
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Final, NamedTuple, cast

from arcbridge.audit.chain import Head, SealedLine, read_line, timestamp
from arcbridge.audit.query import with_rotated
from arcbridge.audit.verify import MAX_LINE
from arcbridge.errors import StateError
from arcbridge.pki.private_files import read_file, replace_file
from arcbridge.untrusted_json import read_json

EVENT: Final = "audit-undelivered"
SETTLED: Final = 2.0
"""Seconds since the last write after which nothing more is written to a file that was renamed: a writer looks once a
second whether the name is still its file's."""
_MOST_FIRST: Final = 64 * 1024
"""Bytes at the beginning of a file in which its first record is looked for."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a sink has got."""

    file: str = ""
    """Hash of the first record in the file that is read; empty before the first one."""
    began: str = ""
    """The time of that record."""
    offset: int = 0
    """Bytes of that file that were delivered, as they are without compression."""
    chain: str = ""
    """Of the record that was delivered last."""
    sequence: int = -1


class LogRecord(NamedTuple):
    """A record, and its line without the end."""

    text: bytes
    sealed: SealedLine


@dataclass(frozen=True, slots=True)
class LostRecords:
    """Records that are not delivered to a sink and no longer can be."""

    sink: str
    records: int
    """With those that a record counts which is among them."""
    first: str
    """CHAIN/NUMBER of the last record before them that was delivered; empty where there is none."""
    last: str
    """CHAIN/NUMBER of the last of them."""
    reason: str
    at_least: bool = False
    """Whether there may be more."""
    counted: int = 0
    """How many of them another record has counted already, which is lost with them."""

    def line(self) -> str:
        """Return the record that counts them."""
        fields = {"ts": timestamp(), "event": EVENT, "sink": self.sink, "records": self.records}
        more = {"after": self.first, "to": self.last, "reason": self.reason, "at_least": self.at_least}
        return json.dumps(fields | {name: value for name, value in more.items() if value})


@dataclass(frozen=True, slots=True)
class Batch:
    """What one read gave."""

    records: list[LogRecord]
    begin: Position
    """Where it begins, in the file that was read."""
    end: Position
    waiting: int
    """Bytes that are behind the batch's beginning; of compressed files as they are."""
    missing: tuple[int, str, bool] | None = None
    """Records between the position and this batch whose files are gone (how many, the last one, at least)."""


class _LogFile(NamedTuple):
    began: str
    packed: bool
    path: Path
    first: SealedLine


class PackedFile:
    """Keeps one compressed file open: to find a place in it again, it would be read from its beginning."""

    def __init__(self) -> None:
        self._open: tuple[Path, int, IO[bytes]] | None = None

    def opened(self, path: Path) -> IO[bytes]:
        """Return the file, open anywhere. Raises OSError."""
        number = path.stat().st_ino
        if self._open is None or self._open[:2] != (path, number):
            self.close()
            self._open = path, number, _open(path)
        return self._open[2]

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open[2].close()
            self._open = None


def read_batch(log: Path, position: Position, records: int, size: int, packed: PackedFile | None = None) -> Batch:
    """Return at most so many records behind `position`, and as many bytes unless the first one alone has more.

    `packed`: for a caller that reads on. Raises OSError, EOFError or zlib.error.
    """
    missing = None
    while True:
        files = _files(log, position)
        if not files:
            return Batch([], position, position, 0, missing)
        file = files[0]
        if file.first.head.hash != position.file:
            missing = _missing(position, file.first) if position.file else None
            position = replace(position, file=file.first.head.hash, began=file.began, offset=0)
        if file.packed and packed is not None:
            found, end = _records(packed.opened(file.path), position.offset, records, size)
        else:
            found, end = _records_of(file.path, position.offset, records, size)
        waiting = max(0, _size(file.path) - position.offset) + sum(_size(one.path) for one in files[1:])
        if found or missing:
            last = found[-1].sealed.head if found else Head(position.chain, position.sequence, "")
            end_position = replace(position, offset=end, chain=last.chain, sequence=last.sequence)
            return Batch(found, position, end_position, waiting, missing)
        if len(files) == 1 or not (file.packed or _settled(file.path)):
            return Batch([], position, replace(position, offset=end), waiting if len(files) > 1 else 0)
        following = files[1].first
        position = replace(position, file=following.head.hash, began=files[1].began, offset=0)


def lost_with(log: Path, removed: Iterable[Path], sinks: Iterable[str]) -> list[LostRecords]:
    """Return, for each sink, what these files, the oldest ones, hold that it has not delivered."""
    files = sorted(filter(None, map(_log_file, removed)), key=lambda one: one.began)
    found = []
    for sink in sinks:
        try:
            position = read_position(log, sink)
        except StateError:
            position = Position()
        count, counted, last = 0, 0, ""
        for file in files:
            if file.began < position.began:
                continue
            offset = position.offset if file.first.head.hash == position.file else 0
            for record in _all_records(file.path, offset):
                count += 1
                last = _name(record.sealed.head)
                fields = record.sealed.fields
                if fields.get("event") == EVENT and fields.get("sink") == sink:
                    more = fields.get("records")
                    counted += more if isinstance(more, int) else 0
        if count:
            first = _name(Head(position.chain, position.sequence, "")) if position.chain else ""
            why = "the file was removed at its bound"
            found.append(LostRecords(sink, count + counted, first, last, why, counted=counted))
    return found


# -- the position ------------------------------------------------------------------------------------------------------


def position_file(log: Path, sink: str) -> Path:
    """Return where a sink keeps its position. The name does not begin as the log's does: no rotated file is meant."""
    return log.with_name(f".sink-{sink}.{log.name}.json")


def lock_file(log: Path, sink: str) -> Path:
    """Return the file whose lock the process holds that sends."""
    return position_file(log, sink).with_suffix(".lock")


def read_position(log: Path, sink: str) -> Position:
    """Return how far a sink has got; the beginning where nothing is known. Raises StateError."""
    data = read_file(position_file(log, sink))
    try:
        fields = read_json(data) if data else {}
        known = {name: fields[name] for name in asdict(Position()) if name in fields}
        position = Position(**known)
        whole = all(type(value) is type(getattr(Position(), name)) for name, value in known.items())
    except (ValueError, TypeError):
        whole = False
    if not whole or position.offset < 0:
        return Position()  # all records come again, which is better than none
    return position


def write_position(log: Path, sink: str, position: Position) -> None:
    """Keep how far a sink has got. Raises OSError."""
    replace_file(position_file(log, sink), json.dumps(asdict(position)).encode(), give=True)


# -- files -------------------------------------------------------------------------------------------------------------


def _files(log: Path, position: Position) -> list[_LogFile]:
    """Return the file of the position and those that were begun after it; without that file the latter alone."""
    current = _log_file(log)
    if current is not None and current.first.head.hash == position.file:
        return [current]
    named = {file.path: file for path in with_rotated(log) if (file := _log_file(path)) is not None}
    unique = {file.first.head.hash: file for file in sorted(named.values(), key=lambda one: not one.packed)}
    found = sorted(unique.values())
    behind = [file for file in found if file.first.head.hash == position.file or file.began > position.began]
    # A clock that was set back lets the present file seem older than the one that is gone.
    return behind or ([current] if current is not None else [])


def _log_file(path: Path) -> _LogFile | None:
    """Return a file by its first record; None where it has none, or is not there any more."""
    try:
        with _open(path) as file:
            for text in file.read(_MOST_FIRST).splitlines():
                if (sealed := read_line(text)) is not None:
                    return _LogFile(str(sealed.fields.get("ts", "")), path.suffix == ".gz", path, sealed)
    except (FileNotFoundError, EOFError, zlib.error, gzip.BadGzipFile):
        return None
    return None


def _records_of(path: Path, offset: int, records: int, size: int) -> tuple[list[LogRecord], int]:
    with _open(path) as file:
        if path.suffix != ".gz" and os.fstat(file.fileno()).st_size < offset:
            offset = 0  # it was cut: what stands there now comes again
        return _records(file, offset, records, size)


def _records(file: IO[bytes], offset: int, records: int, size: int) -> tuple[list[LogRecord], int]:
    """Return whole records from `offset` on, and the offset behind them."""
    found: list[LogRecord] = []
    taken = 0
    file.seek(offset)
    while len(found) < records and (text := file.readline(MAX_LINE)):
        whole = text.endswith(b"\n")
        if not whole and len(text) < MAX_LINE:
            break
        # What is no record (a line that a kill cut, or a part of one that is too long) is passed over.
        if whole and (sealed := read_line(text[:-1])) is not None:
            if found and taken + len(text) > size:
                break
            taken += len(text)
            found.append(LogRecord(text[:-1], sealed))
        offset += len(text)
    return found, offset


def _all_records(path: Path, offset: int) -> Iterator[LogRecord]:
    while True:
        found, offset = _records_of(path, offset, 1000, MAX_LINE)
        if not found:
            return
        yield from found


def _missing(position: Position, first: SealedLine) -> tuple[int, str, bool] | None:
    """Return how many records stood between a position whose file is gone and the first record of the next file."""
    after = str(first.fields.get("after", ""))
    chain, _, number = after.partition("/")
    if chain == position.chain and number.isdigit():
        count = int(number) - position.sequence
        return (count, after, False) if count > 0 else None
    return 1, after, True


def _name(head: Head) -> str:
    return f"{head.chain}/{head.sequence}"


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _settled(path: Path) -> bool:
    return not 0 <= time.time() - path.stat().st_mtime < SETTLED


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0

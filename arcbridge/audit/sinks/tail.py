"""Reads on in an audit log and its rotated files from a position, and says what is missing there.

A file is known again by its first record, whatever logrotate has made of it, gzip included, and the next one by the
record that it says is before it. Invariants: a batch holds whole records in the order of the files; its end is behind
the last of them; no file that stands behind the position is passed over, unless what it had is reported as missing.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Final, NamedTuple, cast

from arcbridge.audit.chain import NO_HEAD, SEALED, Head, SealedLine, read_line, timestamp
from arcbridge.audit.query import with_rotated
from arcbridge.audit.verify import MAX_LINE, open_log
from arcbridge.errors import StateError
from arcbridge.pki.private_files import read_file, replace_file
from arcbridge.untrusted_json import read_json

EVENT: Final = "audit-undelivered"
SETTLED: Final = 2.0
"""Seconds since the last write after which nothing more is written to a file that was renamed: a writer looks once a
second whether the name is still its file's."""
_MOST_FIRST: Final = 64 * 1024
"""Bytes at the beginning of a file in which its first record is looked for."""
_DAMAGED: Final = (EOFError, zlib.error, gzip.BadGzipFile)
"""What a compressed file raises that was cut or changed. What is behind that place counts as missing."""
_REMOVED: Final = "the file was removed at its bound"


@dataclass(frozen=True, slots=True)
class Position:
    """How far a sink has got."""

    file: str = ""
    """Hash of the first record in the file that is read; empty before the first one."""
    offset: int = 0
    """Bytes of that file that were delivered, as they are without compression."""
    chain: str = ""
    """Of the record that was delivered last."""
    sequence: int = -1
    before: str = ""
    """Hash of the first record in the file that was read before it."""


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
    last: Head
    """The last of them."""
    reason: str
    at_least: bool = False
    """Whether there may be more."""
    counted: int = 0
    """How many of them another record has counted already, which is lost with them."""

    def line(self) -> str:
        """Return the record that counts them."""
        fields = {"ts": timestamp(), "event": EVENT, "sink": self.sink, "records": self.records}
        more = {"after": self.first, "to": _name(self.last), "reason": self.reason, "at_least": self.at_least}
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
    missing: tuple[int, Head, bool] | None = None
    """Records between the position and this batch whose files are gone (how many, the last one, at least)."""


class _LogFile(NamedTuple):
    path: Path
    first: SealedLine
    size: int
    key: tuple[int, int, int]
    """Inode, time of the last write and size: with these the contents stay the same."""

    @property
    def hash(self) -> str:
        return self.first.head.hash

    @property
    def began(self) -> str:
        return str(self.first.fields.get("ts", ""))

    @property
    def after(self) -> tuple[str, int] | None:
        """The record before the first one, as that says itself; None where it names none."""
        if self.first.head.sequence:
            return self.first.head.chain, self.first.head.sequence - 1
        chain, _, number = str(self.first.fields.get("after", "")).partition("/")
        return (chain, int(number)) if number.isdecimal() else None


_Files = dict[str, list[_LogFile]]
"""By the hash of the first record; of several copies the one that is the most likely to be whole stands first."""


class LogFiles:
    """A log and its rotated files, in the order that the chain gives them; clocks decide only where it says nothing.

    It keeps one compressed file open: to find a place in it again, it would be read from its beginning.
    """

    def __init__(self, log: Path, *, deep: bool = True) -> None:
        """`deep`: read whole files, once each, where their first records alone do not give their order."""
        self._log = log
        self._deep = deep
        self._open: tuple[tuple[int, int, int], IO[bytes]] | None = None
        self._firsts: dict[int, tuple[tuple[int, int, int], SealedLine | None]] = {}
        """By inode: what the file was like when it was looked at, and its first record."""
        self._chains: dict[tuple[int, int, int], dict[str, int]] = {}

    def read(self, position: Position, records: int, size: int, counted: Head | None = None) -> Batch:
        """Return at most so many records behind `position`, and as many bytes unless the first one alone has more.

        `counted`: the last record of files that were removed once they were counted. Raises OSError.
        """
        missing, delivered = None, {position.chain: position.sequence}
        while True:
            files, certain = self.listed(position.file)
            copies = files.get(position.file)
            if copies is None:
                if position.file and not certain:
                    return Batch([], position, position, _sizes(files))
                following = self.behind(files, position.before)
                if not following:
                    return Batch([], position, position, 0)
                if position.file:
                    known = {counted.chain: counted.sequence} if counted is not None else {}
                    missing = _missing(following[0], delivered | known, gone=True)
                position = replace(position, file=following[0].hash, offset=0)
                copies = files[position.file]
            for file in copies:
                found, end = self._records(file, position.offset, records, size)
                if found:
                    break
            waiting = max(0, copies[0].size - position.offset) + _sizes(files, self._log, copies[0])
            if found or missing:
                last = found[-1].sealed.head if found else Head(position.chain, position.sequence, "")
                end_position = replace(position, offset=end, chain=last.chain, sequence=last.sequence)
                return Batch(found, position, end_position, waiting, missing)
            if file.path == self._log:
                return Batch([], position, replace(position, offset=end), 0)
            if not all(_settled(one.path) for one in copies):
                return Batch([], position, position, waiting)
            last_read = position.chain, position.sequence
            following = [one[0] for name, one in files.items() if name != position.file and one[0].after == last_read]
            if not following:
                # The next one is gone, or damaged, or a moment away from its name: only then the others are looked at.
                if not certain or not (following := self.behind(files, position.file)):
                    return Batch([], position, position, waiting)
                missing = _missing(following[0], self.chains(copies) | delivered, gone=False)
            position = replace(position, file=following[0].hash, offset=0, before=position.file)

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def listed(self, wanted: str = "") -> tuple[_Files, bool]:
        """Return the files, or the present one alone where it is the wanted one; and whether none of them may be on
        its way to another name, or not written whole yet. Raises OSError."""
        if wanted and (present := self._status([self._log])):
            file, _ = self._file(self._log, present[self._log])
            if file is not None and file.hash == wanted:
                return {wanted: [file]}, True
        while True:
            certain, firsts, found = True, self._firsts, list[_LogFile]()
            before = self._status(with_rotated(self._log))
            self._firsts = {one.st_ino: firsts[one.st_ino] for one in before.values() if one.st_ino in firsts}
            for path, status in before.items():
                file, whole = self._file(path, status)
                certain = certain and whole
                found += [file] if file is not None else []
            after = self._status(with_rotated(self._log))
            if {path: one.st_ino for path, one in before.items()} == {path: one.st_ino for path, one in after.items()}:
                break
        files: _Files = {}
        for file in sorted(
            found, key=lambda one: (one.path == self._log, not _packed(one.path), one.size), reverse=True
        ):
            files.setdefault(file.hash, []).append(file)
        self._chains = {one.key: self._chains[one.key] for one in found if one.key in self._chains}
        return files, certain and any(one.path == self._log for one in found)

    def behind(self, files: _Files, last: str) -> list[_LogFile]:
        """Return the files behind the one that begins with the record `last`, the oldest first; without it all."""
        found: dict[str, _LogFile] = {}
        for begin in sorted((one[0] for one in files.values()), key=lambda one: (one.path == self._log, one.began)):
            file, run = cast(_LogFile | None, begin), dict[str, _LogFile]()
            while file is not None and file.hash not in found and file.hash not in run:
                run[file.hash] = file
                file = self._before(files, file)
            found |= dict(reversed(run.items()))
        order = list(found)
        return [found[one] for one in (order[order.index(last) + 1 :] if last in found else order)]

    def chains(self, copies: Iterable[_LogFile]) -> dict[str, int]:
        """Return the last number of each chain in these files. Raises OSError."""
        found: dict[str, int] = {}
        for file in copies:
            if file.key not in self._chains:
                self._chains[file.key] = known = {file.first.head.chain: file.first.head.sequence}
                for _, head, _ in _sealed_lines(file.path) if self._deep else ():
                    chain, number = head[1].decode(), int(head[2])
                    known[chain] = max(number, known.get(chain, -1))
            for chain, number in self._chains[file.key].items():
                found[chain] = max(number, found.get(chain, -1))
        return found

    def _before(self, files: _Files, file: _LogFile) -> _LogFile | None:
        if file.after is None:
            return None
        chain, others = file.after[0], [one for one in files.values() if one[0] is not file]
        near = (one[0] for one in others if one[0].first.head.chain == chain)
        return next(near, None) or next((one[0] for one in others if chain in self.chains(one)), None)

    @staticmethod
    def _status(paths: Iterable[Path]) -> dict[Path, os.stat_result]:
        found = {}
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                found[path] = path.stat()
        return found

    def _file(self, path: Path, status: os.stat_result) -> tuple[_LogFile | None, bool]:
        """Return a file by its first record, None where it has none; and whether that will stay so."""
        key = _key(status)
        known, first = self._firsts.get(key[0], (None, None))
        if known != key:
            first = None
            with contextlib.suppress(FileNotFoundError, *_DAMAGED), open_log(path) as file:
                key = _key(os.fstat(file.fileno()))  # the name may be another file's by now
                self._firsts[key[0]] = key, None
                while first is None and (room := _MOST_FIRST - file.tell()) > 0 and (text := file.readline(room)):
                    first = read_line(text.rstrip(b"\n"))
                    self._firsts[key[0]] = key, first
        if first is None:
            return None, not _packed(path) or _settled(path)
        return _LogFile(path, first, key[2], key), True

    def _records(self, file: _LogFile, offset: int, records: int, size: int) -> tuple[list[LogRecord], int]:
        if not _packed(file.path):
            with file.path.open("rb") as opened:
                if os.fstat(opened.fileno()).st_size < offset and file.path == self._log:
                    offset = 0  # it was cut: what stands there now comes again
                return _records(opened, offset, records, size)
        if self._open is None or self._open[0] != file.key:
            self.close()
            self._open = file.key, open_log(file.path)
        return _records(self._open[1], offset, records, size)


def lost_with(log: Path, removed: Iterable[Path], sinks: Collection[str]) -> list[LostRecords]:
    """Return, for each sink, what these files, the oldest ones, hold that it has not delivered. The writer waits for
    it: each file is read once. Raises OSError."""
    files, doomed = LogFiles(log, deep=False), frozenset(removed)
    if not doomed or not sinks:
        return []
    listed, _ = files.listed()
    begins, positions, found = dict[str, dict[str, int]](), dict[str, Position](), dict[str, LostRecords]()
    for sink in sinks:
        try:
            positions[sink] = position = read_position(log, sink)
        except StateError:
            positions[sink] = position = Position()
        last = position.file if position.file in listed else position.before
        begins[sink] = {one.hash: 0 for one in files.behind(listed, last)} | {position.file: position.offset}
    for file in files.behind(listed, ""):
        if file.path not in doomed or not any(file.hash in one for one in begins.values()):
            continue
        for offset, head, text in _sealed_lines(file.path):
            own = read_line(text[:-1]) if EVENT.encode() in text else None
            for sink, begin in begins.items():
                if offset < begin.get(file.hash, offset + 1):
                    continue
                more = own.fields.get("records") if own and own.fields.get("event") == EVENT else 0
                counted = more if own and own.fields.get("sink") == sink and isinstance(more, int) else 0
                before = found.get(sink) or LostRecords(sink, 0, _name(positions[sink]), NO_HEAD, _REMOVED)
                found[sink] = replace(
                    before,
                    records=before.records + 1 + counted,
                    last=Head(head[1].decode(), int(head[2]), ""),
                    counted=before.counted + counted,
                )
    return list(found.values())


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


def _records(file: IO[bytes], offset: int, records: int, size: int) -> tuple[list[LogRecord], int]:
    """Return whole records from `offset` on, up to a damage, and the offset behind them."""
    found: list[LogRecord] = []
    taken = 0
    with contextlib.suppress(*_DAMAGED):
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


def _sealed_lines(path: Path) -> Iterator[tuple[int, re.Match[bytes], bytes]]:
    """Yield the lines that look like records, up to a damage: offset, what the chain put there, text."""
    offset = 0
    with contextlib.suppress(*_DAMAGED), open_log(path) as file:
        while text := file.readline(MAX_LINE):
            if text.endswith(b"\n") and (found := SEALED.match(text)) is not None:
                yield offset, found, text
            offset += len(text)


def _missing(first: _LogFile, held: Mapping[str, int], *, gone: bool) -> tuple[int, Head, bool] | None:
    """Return how many records stood before a file that are in none. `held`: up to where the file before it has each
    chain, or, where that is gone, what of it was delivered."""
    if first.after is None:
        return (1, NO_HEAD, True) if gone else None
    chain, number = first.after
    if chain not in held:
        return 1, Head(chain, number, ""), True
    return (number - held[chain], Head(chain, number, ""), False) if number > held[chain] else None


def _name(at: Position | Head) -> str:
    return f"{at.chain}/{at.sequence}" if at.chain else ""


def _sizes(files: _Files, log: Path | None = None, behind: _LogFile | None = None) -> int:
    """Return the bytes of all files, or of the present one and those that were begun later than `behind`."""
    firsts = (one[0] for one in files.values() if one[0] is not behind)
    return sum(one.size for one in firsts if behind is None or one.path == log or one.began > behind.began)


def _key(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _packed(path: Path) -> bool:
    return path.suffix == ".gz"


def _settled(path: Path) -> bool:
    try:
        return not 0 <= time.time() - path.stat().st_mtime < SETTLED
    except FileNotFoundError:
        return False

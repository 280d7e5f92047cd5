"""Checks the chains of audit logs: which records are missing, changed, moved, there twice, or cut off, and where.

It reads files line by line and keeps of each chain the newest record and the gaps. Files may be given in any order, as
gzip too, and may hold several chains, whole or in part: what a restart, a rotation and a collector make of them. It
writes nothing. Invariant: of records between two that it has seen, each is either found with the hash that the next one
names, or reported.

What no chain shows: that its newest records were cut off, or that all of it was made anew. Heads that were kept
elsewhere (`anchors`) show both, up to the newest of them.
"""

from __future__ import annotations

import gzip
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, NamedTuple, cast

from arcbridge.audit.chain import NO_HEAD, Head, SealedLine, find_sealed, read_line
from arcbridge.errors import ConfigError
from arcbridge.observe.untrusted_text import clean
from arcbridge.untrusted_json import read_json

MAX_LINE = 1 << 20
"""Bytes of a line that is looked at; those of a role have some kilobytes."""
MAX_USERS = 1000
"""Users whose records that were left out are counted one by one; those of all others are counted together."""
RECENT = 4096
"""Records of each chain whose place is remembered, to say of one that is there twice where it was first."""

MISSING, CHANGED, MOVED, DUPLICATE, TRUNCATED, FOREIGN = (
    "missing", "changed", "moved", "duplicate", "truncated", "foreign",
)  # fmt: skip
LOST = "lost"
"""A record of the role's own says that records could not be written."""


class LogPlace(NamedTuple):
    """A line of a file."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class ChainFinding:
    """One thing that is wrong. `file` and `line` are where it shows; `record` is the number in its chain."""

    kind: str
    file: str
    line: int
    chain: str
    record: int
    text: str


@dataclass(slots=True)
class Gap:
    """Records that were not seen yet, from `first` to `last`, between two that were."""

    first: int
    last: int
    before: str
    """Hash of the record before the first one."""
    after: str
    """What the record behind the last one says of its hash."""
    place: LogPlace
    """Of the record behind the gap."""


@dataclass(slots=True)
class _ChainState:
    """What is known of one chain while the lines are read."""

    id: str
    first: int
    newest: Head
    place: LogPlace
    """Of the newest record."""
    previous: str
    """The hash of the record that stood before this chain, by its own word."""
    start: LogPlace
    ended: str = ""
    """Why the agent left the file in order; empty where it did not."""
    after: tuple[str, int] | None = None
    """The chain and number of that record."""
    found: Head | None = None
    """The newest record of that chain which stands before this one's start."""
    cause: str = ""
    gaps: list[Gap] = field(default_factory=list)
    recent: OrderedDict[int, tuple[str, LogPlace]] = field(default_factory=OrderedDict)
    """Hash and place of the records seen last."""


@dataclass(slots=True)
class Report:
    """What a check found."""

    files: int = 0
    records: int = 0
    findings: list[ChainFinding] = field(default_factory=list)
    chains: list[dict[str, object]] = field(default_factory=list)
    """Of each chain: its first and newest record, that one's hash, and how it ended."""
    notes: list[str] = field(default_factory=list)
    """What is no fault of the log, and good to know."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def document(self) -> dict[str, object]:
        """Return the report as JSON has it."""
        return {"ok": self.ok, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Anchor:
    """A head that was kept elsewhere than the log, and when."""

    head: Head
    time: str
    """As RFC 3339, in UTC."""


def verify(files: Iterable[Path], anchors: Iterable[Anchor] = ()) -> Report:
    """Check the files together. Raises ConfigError for one that cannot be read."""
    ordered = in_order(files)
    check = _Check(anchors, min(filter(None, map(_first_time, ordered)), default=""))
    for path in ordered:
        check.read(path)
    check.finish()
    check.report.files = len(ordered)
    return check.report


def in_order(files: Iterable[Path]) -> list[Path]:
    """Return files in the order in which they were begun. Raises ConfigError for one that cannot be read."""
    times = {path: _first_time(path) for path in files}
    return sorted(times, key=lambda path: (times[path], str(path)))


def read_anchors(path: Path) -> list[Anchor]:
    """Read the heads in a role's own log (JSON lines): events `audit head`. Raises ConfigError where there is none."""
    found = []
    for text in lines_of(path):
        start = text.find(b"{")
        try:
            event = read_json(text[start:]) if start >= 0 and b"audit head" in text else {}
        except ValueError:
            continue
        chain, record, digest = event.get("chain"), event.get("record"), event.get("hash")
        if event.get("event") == "audit head" and isinstance(chain, str) and isinstance(record, int):
            found.append(Anchor(Head(chain, record, str(digest)), str(event.get("timestamp", ""))))
    if not found:
        raise ConfigError(f'--anchors: {path} has no event "audit head"; it must be the log of a role, as JSON lines')
    return found


class _Check:
    """One run over all files."""

    def __init__(self, anchors: Iterable[Anchor], began: str) -> None:
        self.report = Report()
        self._chains: dict[str, _ChainState] = {}
        self._anchors = {(one.head.chain, one.head.sequence): one for one in anchors}
        self._began = began
        """The time of the first record in all files."""
        self._last_file = ""
        self._left_out: dict[str, tuple[int, int]] = {}
        """Records that an agent left out on purpose, and their bytes, by user."""

    def read(self, path: Path) -> None:
        """Take in one file."""
        name = self._last_file = str(path)
        rest: tuple[LogPlace, bytes] | None = None
        for number, text in enumerate(lines_of(path), 1):
            place = LogPlace(name, number)
            whole = text.endswith(b"\n")
            text = text.rstrip(b"\r\n")
            start = find_sealed(text)
            sealed = read_line(text[start:]) if start >= 0 else None
            if rest is not None:
                self._broken(rest[0], rest[1], sealed)
                rest = None
            if sealed is None:
                if text.strip() and not _of_another_stream(text):
                    rest = (place, text)
                continue
            if not whole:
                self._add(TRUNCATED, place, sealed.head, "the line has no end: the file was cut there")
            self._record(sealed, place)
        if rest is not None:
            self._broken(rest[0], rest[1], None)

    def finish(self) -> None:
        """Say what is still open once all files were read."""
        for state in self._chains.values():
            for gap in state.gaps:
                self._missing(state.id, gap.first, gap.last, gap.place)
            self._check_start(state)
        self._check_anchors()
        self.report.notes += [
            f"{records} records ({size} bytes) of {user} are left out on purpose: that user was over "
            "limits.audit_bytes_per_second; nothing that changes something is among them"
            for user, (records, size) in self._left_out.items()
        ]
        self.report.findings.sort(key=lambda one: (one.file, one.line))
        self.report.chains = [
            {
                "chain": state.id,
                "from": state.first,
                "to": state.newest.sequence,
                "hash": state.newest.hash,
                "file": state.place.file,
                "line": state.place.line,
                "end": state.ended or "open",
            }
            for state in self._chains.values()
        ]

    # -- one record -----------------------------------------------------------------------------------------------

    def _record(self, sealed: SealedLine, place: LogPlace) -> None:
        self.report.records += 1
        head, fields = sealed.head, sealed.fields
        state = self._chains.get(head.chain)
        if fields.get("event") == "audit-lost":
            text = f"the role could not write {fields.get('records')} records before this one"
            self._add(LOST, place, head, text)
        elif fields.get("event") == "audit-left-out":
            self._count_left_out(fields)
        elif fields.get("event") == "audit-undelivered":
            count, sink, last = (clean(str(fields.get(name)), 100) for name in ("records", "sink", "to"))
            self.report.notes.append(f"{place}: {count} records up to {last} were not delivered to sink {sink}")
        if state is None:
            self._chains[head.chain] = state = _ChainState(
                head.chain, head.sequence, head, place, sealed.previous, place
            )
            if head.sequence == 0:
                self._begins(state, fields)
        elif head.sequence == state.newest.sequence + 1:
            self._follows(state, sealed, place)
        elif head.sequence > state.newest.sequence:
            state.gaps.append(
                Gap(state.newest.sequence + 1, head.sequence - 1, state.newest.hash, sealed.previous, place)
            )
            state.newest, state.place = head, place
        else:
            self._late(state, sealed, place)
        if fields.get("event") == "chain-end":
            state.ended = str(fields.get("cause"))
        anchor = self._anchors.get((head.chain, head.sequence))
        if anchor is not None and anchor.head.hash != head.hash:
            text = "the role's own log has another hash for this record: the chain was made anew from here or before"
            self._add(CHANGED, place, head, text)
        state.recent[head.sequence] = (head.hash, place)
        if len(state.recent) > RECENT:
            state.recent.popitem(last=False)

    def _count_left_out(self, fields: dict[str, object]) -> None:
        user = clean(str(fields.get("user")), 200)
        if user not in self._left_out and len(self._left_out) >= MAX_USERS:
            user = "other users"
        records, size = self._left_out.get(user, (0, 0))
        more = [value if isinstance(value, int) else 0 for value in (fields.get("records"), fields.get("bytes"))]
        self._left_out[user] = records + more[0], size + more[1]

    def _begins(self, state: _ChainState, fields: dict[str, object]) -> None:
        state.cause = str(fields.get("cause"))
        chain, slash, number = str(fields.get("after", "")).partition("/")
        if slash and number.isdigit():
            state.after = (chain, int(number))
            state.found = before.newest if (before := self._chains.get(chain)) is not None else None
        if fields.get("torn"):
            self.report.notes.append(
                f"{state.start}: the role found {fields['torn']} bytes of an unfinished line when it opened the file: "
                "it was killed, or the machine stopped, while it wrote"
            )

    def _follows(self, state: _ChainState, sealed: SealedLine, place: LogPlace) -> None:
        if sealed.previous != state.newest.hash:
            self._add(
                CHANGED, state.place, state.newest,
                f"the record is not as it was written: the next one ({place}) names another hash for it, "
                "unless that one was changed in this place itself",
            )  # fmt: skip
        if state.ended:
            self._add(CHANGED, place, sealed.head, f"a record stands behind the end of its chain ({state.place})")
        state.newest, state.place = sealed.head, place

    def _late(self, state: _ChainState, sealed: SealedLine, place: LogPlace) -> None:
        """A record that belongs before one that was seen already."""
        number = sealed.head.sequence
        gap = next((one for one in state.gaps if one.first <= number <= one.last), None)
        if gap is None:
            if number < state.first:
                self._add(MOVED, place, sealed.head, f"the record stands behind record {state.newest.sequence}")
                return
            first = state.recent.get(number)
            where = f" (first at {first[1]})" if first is not None else ""
            same = first is not None and first[0] == sealed.head.hash
            what = "is there twice" if first is None or same else "is there twice, with different contents"
            self._add(DUPLICATE, place, sealed.head, f"the record {what}{where}")
            return
        self._add(MOVED, place, sealed.head, f"the record stands behind record {state.newest.sequence}")
        state.gaps.remove(gap)
        if number == gap.first:
            if sealed.previous != gap.before:
                self._add(CHANGED, place, sealed.head, f"the record does not name the hash of record {number - 1}")
        else:
            state.gaps.append(Gap(gap.first, number - 1, gap.before, sealed.previous, place))
        if number == gap.last:
            if sealed.head.hash != gap.after:
                self._add(CHANGED, place, sealed.head, f"record {number + 1} ({gap.place}) names another hash for it")
        else:
            state.gaps.append(Gap(number + 1, gap.last, sealed.head.hash, gap.after, gap.place))

    # -- what is between chains -----------------------------------------------------------------------------------

    def _check_start(self, state: _ChainState) -> None:
        """Compare what a chain says of the records before it with what is there."""
        if state.first:
            self.report.notes.append(
                f"{state.start}: chain {state.id} begins with record {state.first}: what was before it is in none of "
                "these files"
            )
            return
        if state.cause == "cut":
            self.report.notes.append(f"{state.start}: the file was cut by another program while it was written")
        if state.after is None:
            return
        chain, number = state.after
        before = self._chains.get(chain)
        if before is None:
            self.report.notes.append(
                f"{state.start}: chain {state.id} follows record {number} of chain {chain}, which is in none of these "
                "files"
            )
        elif number > before.newest.sequence:
            self._missing(chain, before.newest.sequence + 1, number, state.start, TRUNCATED)
        elif number in before.recent and before.recent[number][0] != state.previous:
            digest, place = before.recent[number]
            self._add(
                CHANGED, place, Head(chain, number, digest),
                f"the record is not as it was written: the next chain ({state.start}) names another hash for it",
            )  # fmt: skip
        elif number < before.newest.sequence and state.found == before.newest and not before.ended:
            # A role that wrote behind this start, or ended in order while this one began, was still at work.
            text = (
                f"records {number + 1} to here were added later: the next chain ({state.start}) found {number} the last"
            )
            self._add(CHANGED, before.place, before.newest, text)

    def _check_anchors(self) -> None:
        """Compare the anchors with how far their chains go; their hashes were compared before."""
        newest: dict[str, Anchor] = {}
        for anchor in self._anchors.values():
            known = newest.get(anchor.head.chain)
            if known is None or known.head.sequence < anchor.head.sequence:
                newest[anchor.head.chain] = anchor
        for chain, anchor in newest.items():
            state = self._chains.get(chain)
            number = anchor.head.sequence
            if state is not None and number > state.newest.sequence:
                self._missing(chain, state.newest.sequence + 1, number, state.place, TRUNCATED)
            elif state is None and anchor.time > self._began:
                self._missing(chain, 0, number, LogPlace(self._last_file, 0), TRUNCATED)
            elif state is None:
                self.report.notes.append(f"chain {chain}, which an anchor names, is in none of these files")

    # -- findings -------------------------------------------------------------------------------------------------

    def _broken(self, place: LogPlace, text: bytes, following: SealedLine | None) -> None:
        """A line that is no whole record."""
        if following is not None and following.fields.get("torn") == len(text):
            return  # the role itself found it so, and says it in a note
        if find_sealed(text) >= 0 or text.startswith(b'{"chain":'):
            self._add(TRUNCATED, place, NO_HEAD, "the record is not whole: a part of its line was cut or changed")
        else:
            self._add(FOREIGN, place, NO_HEAD, "the line is no record of an audit log")

    def _missing(self, chain: str, first: int, last: int, place: LogPlace, kind: str = MISSING) -> None:
        what = f"record {first} is" if first == last else f"records {first} to {last} are"
        text = f"{what} missing" + (" before this one" if kind == MISSING else ": the chain was cut off")
        self.report.findings.append(ChainFinding(kind, *place, chain, first, text))

    def _add(self, kind: str, place: LogPlace, head: Head, text: str) -> None:
        self.report.findings.append(ChainFinding(kind, *place, head.chain, head.sequence, text))


def _of_another_stream(text: bytes) -> bool:
    """Return whether a container runtime says that a line came from standard error."""
    return b" stderr F " in text[:80] or b" stderr P " in text[:80]


def lines_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, with their ends; a longer one than MAX_LINE in pieces. Raises ConfigError."""
    try:
        with open_log(path) as file:
            while text := file.readline(MAX_LINE):
                yield text
    except (OSError, EOFError, zlib.error) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else "it is no whole gzip file"
        raise ConfigError(f"{path}: cannot be read: {words}") from error


def open_log(path: Path) -> IO[bytes]:
    """Open a file of a log, unpacked where it is compressed. Raises OSError."""
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _first_time(path: Path) -> str:
    """Return the time of the first record of a file, empty where it has none."""
    for text in lines_of(path):
        start = find_sealed(text)
        sealed = read_line(text[start:].rstrip(b"\r\n")) if start >= 0 else None
        if sealed is not None:
            return str(sealed.fields.get("ts", ""))
    return ""

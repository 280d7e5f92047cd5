"""Reads what was changed lately from the end of the relay's audit log, for the administrators' page.

It reads as much of the end as the time that is asked for needs, `TAIL` bytes at most, in a thread, and only where the
file has changed since; it checks no chain (`audit verify`), and what is older stays with `audit show`. Invariants: a
line that is no whole record is left out; what peers without a right were refused, of which each can cause any
number, takes no place from what was done; where records of that time were not read, `ChangeList` says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from arcbridge.audit.chain import SealedLine, find_sealed, read_line
from arcbridge.pki.names import is_cluster_name

TAILS: Final = (256 * 1024, 1024 * 1024, 4 * 1024 * 1024)
"""Bytes that are read, the next number where the former does not reach back far enough."""
TAIL: Final = TAILS[-1]
"""Above what refusals of one kind write in a day (`relay.audit.log.STRANGERS_RATE`)."""
MOST: Final = 200
"""Records that are kept, the newest."""
MOST_REFUSALS: Final = 20
"""Refusals of peers without a right that are kept besides."""
SHORTEST: Final = 100
"""Bytes of a record at least: those of its place in the chain."""
_TIME: Final = b'"ts":"'
_TRIED: Final = 50
"""Lines at the beginning of what was read among which one with a time is looked for."""
_LEFT_OUT: Final = frozenset({"admin question"})
_SHOWN: Final = ("cluster", "user", "session", "token_id", "uses", "until", "policy", "hash", "rules", "reason",
                 "present", "version", "command")  # fmt: skip
"""Arguments and parts of a result that are shown."""


class AuditedChange(NamedTuple):
    """One record."""

    at: str
    """RFC 3339."""
    act: str
    actor: str
    about: tuple[tuple[str, str], ...]
    """Names and values, as they were recorded."""
    clusters: tuple[str, ...]
    """All that it is about; none where the record has no cluster, or not all of them."""
    failure: str
    """Why it was not done; empty where it was."""


class ChangeList(NamedTuple):
    """What is known of some time."""

    records: tuple[AuditedChange, ...] = ()
    """The newest first."""
    refusals: tuple[AuditedChange, ...] = ()
    """What peers without a right were refused, the newest first."""
    more_refusals: int = 0
    """How many of these were read and are not here."""
    cut: str = ""
    """Since when the records are here (RFC 3339), where older ones of the time that was asked for are not; else
    empty."""


class Changes:
    """The newest records of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: tuple[object, ...] = ()
        """What the file was like when it was read."""
        self._found = ChangeList()

    def since(self, when: str) -> ChangeList:
        """Return the records from `when` (RFC 3339) on. `when` is no earlier than at the call before. Raises
        OSError."""
        with open(self._path, "rb") as file:
            state = os.fstat(file.fileno())
            seen = state.st_ino, state.st_size, state.st_mtime_ns
            if seen != self._read:
                for tail in TAILS:
                    file.seek(max(state.st_size - tail, 0))
                    self._found = _parsed(_lines(file.read(tail)), when, whole=state.st_size <= tail)
                    if self._found.cut < when or len(self._found.records) == MOST:
                        break
                self._read = seen
        found = self._found
        refusals = tuple(one for one in found.refusals if one.at >= when)
        return found._replace(
            records=tuple(one for one in found.records if one.at >= when),
            refusals=refusals,
            more_refusals=found.more_refusals if len(refusals) == len(found.refusals) else 0,
            cut=found.cut if found.cut > when else "",
        )


def _lines(data: bytes) -> list[bytes]:
    first, *others = data.splitlines() or [b""]
    return [first, *(line for line in others if len(line) >= SHORTEST)]


def _oldest(lines: list[bytes]) -> str:
    """Return the time of the first record; the last possible one where there is none."""
    times = (str(sealed.fields.get("ts", "")) for sealed in map(_sealed, lines[:_TRIED]) if sealed is not None)
    return next(filter(None, times), "9999")


def _parsed(lines: list[bytes], when: str, *, whole: bool) -> ChangeList:
    found, refusals, more = list[AuditedChange](), list[AuditedChange](), 0
    if not whole:
        del lines[0]
    # A file that was rotated begins after a record of another file, which has the older ones.
    first = _sealed(lines[0]) if whole and lines else None
    rotated = first is not None and (first.head.sequence > 0 or "after" in first.fields)
    cut = _oldest(lines) if rotated or not whole else ""
    for line in reversed(lines):
        if b'"stage":"begun"' in line:
            continue
        # No text in a record reads like these: within one, quotation marks are escaped.
        refused = b'"stage":"complete"' in line and b'"outcome":"refused"' in line and b'"by":"relay"' not in line
        if refused and len(refusals) == MOST_REFUSALS:
            more += line[line.find(_TIME) + len(_TIME) :] >= when.encode()
            continue
        sealed = _sealed(line)
        change = None if sealed is None else _change(sealed.fields)
        kept = refusals if refused else found
        # Each worker records what it takes over: one line is enough.
        if change is not None and not any(one.at[:16] == change.at[:16] and one[1:] == change[1:] for one in kept[-2:]):
            kept.append(change)
            if len(found) == MOST:
                cut = change.at
                break
    return ChangeList(tuple(found), tuple(refusals), more, cut)


def _sealed(line: bytes) -> SealedLine | None:
    start = find_sealed(line)
    return read_line(line[start:]) if start >= 0 else None


def _change(fields: Mapping[str, object]) -> AuditedChange | None:
    act = str(fields.get("act", ""))
    if not act or act in _LEFT_OUT or fields.get("stage") == "begun":
        return None
    parts = [one for one in (fields.get("arguments"), fields.get("result")) if isinstance(one, Mapping)]
    about = {name: _text(part[name]) for part in parts for name in _SHOWN if name in part}
    clusters = [part["cluster"] for part in parts if "cluster" in part]
    names = [str(name) for one in clusters for name in (one if isinstance(one, list) else [one])]
    if not all(map(is_cluster_name, names)):
        names = []  # a list that was cut ends in words
    outcome = str(fields.get("outcome", "done"))
    failure = "" if outcome == "done" else f"{outcome}: {fields.get('reason', '')}".removesuffix(": ")
    actor = fields.get("actor") or {"relay": "this relay", "fleet": "another relay"}.get(str(fields.get("by")), "")
    return AuditedChange(
        str(fields.get("ts", "")), act, str(actor or fields.get("by", "")), tuple(about.items()), tuple(names), failure
    )


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

"""Reads what was changed lately from the end of the relay's audit log, for the administrators' page.

It reads `TAIL` bytes at most, in a thread, and only where the file has changed since; it checks no chain (`audit
verify`), and what is older stays with `audit show`. Invariant: a line that is no whole record is left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from arcbridge.audit.chain import find_sealed, read_line
from arcbridge.pki.names import is_cluster_name

TAIL: Final = 256 * 1024
MOST: Final = 200
"""Records that are kept, the newest."""
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


class Changes:
    """The newest records of one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read: tuple[object, ...] = ()
        """What the file was like when it was read."""
        self._found: tuple[AuditedChange, ...] = ()

    def since(self, when: str) -> tuple[AuditedChange, ...]:
        """Return the records from `when` (RFC 3339) on, the newest first. Raises OSError."""
        with open(self._path, "rb") as file:
            state = os.fstat(file.fileno())
            seen = state.st_ino, state.st_size, state.st_mtime_ns
            if seen != self._read:
                file.seek(max(state.st_size - TAIL, 0))
                self._found = _parsed(file.read(TAIL), whole=state.st_size <= TAIL)
                self._read = seen
        return tuple(one for one in self._found if one.at >= when)


def _parsed(data: bytes, *, whole: bool) -> tuple[AuditedChange, ...]:
    lines = data.splitlines() if whole else data.splitlines()[1:]
    found: list[AuditedChange] = []
    for line in reversed(lines):
        start = find_sealed(line)
        sealed = read_line(line[start:]) if start >= 0 else None
        change = None if sealed is None else _change(sealed.fields)
        # Each worker records what it takes over: one line is enough.
        if change is not None and not any(
            one.at[:16] == change.at[:16] and one[1:] == change[1:] for one in found[-2:]
        ):
            found.append(change)
            if len(found) == MOST:
                break
    return tuple(found)


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

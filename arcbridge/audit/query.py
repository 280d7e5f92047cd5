"""Finds records in audit logs: of a user, of a cluster, since a time, in the order in which they were written.

It reads line by line, one file after the other, rotated ones first, and keeps nothing: a log may be as long as it
likes. It checks no chain; that is `audit.verify`. Invariant: what the log itself says of records that are missing is
never left out for a filter that it does not answer.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from arcbridge.audit.chain import find_sealed, read_line
from arcbridge.audit.verify import in_order, lines_of

OWN_EVENTS = frozenset({"chain", "chain-end"})
"""Records about the file itself."""
_USERS = ("user", "as", "actor", "login")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records are asked for; what is empty leaves none out."""

    user: str = ""
    """Who did it, in whose name it was done, or whom it was done to."""
    cluster: str = ""
    since: str = ""
    """RFC 3339 in UTC, as records have it."""

    def takes(self, fields: Mapping[str, object]) -> bool:
        """Return whether a record is one of them."""
        if self.since and str(fields.get("ts", "")) < self.since:
            return False
        if fields.get("event") in ("audit-lost", "audit-undelivered") or ("omitted" in fields and "act" in fields):
            # An agent's `omitted` has no act, and counts refusals of the same user alone.
            return True
        return (not self.user or self.user in _named(fields, *_USERS, "users")) and (
            not self.cluster or self.cluster in _named(fields, "cluster")
        )


def find_records(files: Iterable[Path], wanted: Wanted) -> Iterator[dict[str, object]]:
    """Yield the records of these files. Raises ConfigError for one that cannot be read."""
    for path in in_order(files):
        for text in lines_of(path):
            start = find_sealed(text)
            sealed = read_line(text[start:].rstrip(b"\r\n")) if start >= 0 else None
            if sealed is not None and sealed.fields.get("event") not in OWN_EVENTS and wanted.takes(sealed.fields):
                yield sealed.fields


def with_rotated(path: Path) -> list[Path]:
    """Return a log and what logrotate has made of it: `NAME-20261129`, `NAME.1`, `NAME.2.gz`."""
    found = [Path(one) for one in glob.glob(f"{glob.escape(str(path))}[-.]*")]
    return [*(one for one in found if one.is_file()), path]


def _named(fields: Mapping[str, object], *names: str) -> set[object]:
    """Return what a record has under these names: in itself, in its arguments, or in its result."""
    found: set[object] = set()
    for part in (fields, fields.get("arguments"), fields.get("result")):
        if isinstance(part, Mapping):
            for name in names:
                value = part.get(name)
                if value is None:
                    continue
                found.update(map(str, value) if isinstance(value, list) else [str(value)])
    return found

"""On which line a TOML file says something: `tomllib` gives values without their places.

It reads headers and keys line by line, which is enough for a message and for nothing else: values of several lines are
not followed, and a path that is not found has the line of the nearest one around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Path = tuple[str | int, ...]
"""Keys, and the numbers of the elements of arrays."""

_HEADER = re.compile(r"\s*(\[{1,2})([^\[\]]+)\]{1,2}\s*(?:#.*)?")
_KEY = re.compile(r"\s*((?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*'))*)\s*=")
_PART = re.compile(r"\"[^\"]*\"|'[^']*'|\[\d+\]|[^.\[\]\s]+")
_AT = re.compile(r" ?\(at (?:line (\d+), column (\d+)|end of document)\)")


def line_of(path: Sequence[str | int], text: str) -> int:
    """Return the line on which `text` sets `path`, or what is around it; from 1, and 0 where nothing of it is there."""
    return locator(text)(path)


def locator(text: str) -> Callable[[Sequence[str | int]], int]:
    """Return what does `line_of` for many paths of one text, which is read once."""
    lines = _lines(text)

    def line(path: Sequence[str | int]) -> int:
        wanted = tuple(path)
        while wanted and wanted not in lines:
            wanted = wanted[:-1]
        return lines.get(wanted, 0)

    return line


def parts(dotted: str) -> Path:
    """Return the path that a message writes as `allow[2].users` or `limits.users."anna@example.org".sessions`."""
    return tuple(int(part[1:-1]) if part[0] == "[" else part.strip("\"'") for part in _PART.findall(dotted))


def syntax_place(message: str, text: str) -> tuple[str, int, int]:
    """Return what `tomllib` says of a mistake, without its place, and that place: line and column from 1."""
    found = _AT.search(message)
    if found is None:
        return message, 0, 0
    said = message[: found.start()] + message[found.end() :]
    return (said, int(found[1]), int(found[2])) if found[1] else (said, text.count("\n") + 1, 0)


def _lines(text: str) -> dict[Path, int]:
    lines: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    for number, line in enumerate(text.splitlines(), 1):
        header = _HEADER.fullmatch(line)
        if header:
            table = _within(parts(header[2]), counts)
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                lines.setdefault(table, number)
                table = (*table, counts[table])
            lines.setdefault(table, number)
            continue
        key = _KEY.match(line)
        if key:
            path = (*table, *parts(key[1]))
            for depth in range(len(table) + 1, len(path) + 1):
                lines.setdefault(path[:depth], number)
    return lines


def _within(path: Path, counts: dict[Path, int]) -> Path:
    """`path` below the newest elements of the arrays of tables that it goes through."""
    found: Path = ()
    for index, part in enumerate(path):
        found = (*found, part)
        if index + 1 < len(path) and found in counts:
            found = (*found, counts[found])
    return found

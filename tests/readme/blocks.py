"""The code blocks of a page, and what their marks say of them.

A mark is an HTML comment on the line before a block, and each block has one:

    <!-- run: MACHINE -->            its commands are run there, and each must succeed
    <!-- run: MACHINE, stays, until "TEXT" -->              it runs on; what follows waits until it has written TEXT
    <!-- run: MACHINE, types "TEXT" after "TEXT" -->        what the reader types when it asks
    <!-- run: MACHINE, logs in -->                          what the reader does in the browser
    <!-- run: MACHINE, ends its processes -->               after Ctrl-C for everything that still runs there
    <!-- shows -->                   what the block before it writes: these lines in this order, `…` for any text
    <!-- not run: REASON -->         why it cannot be run
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_MARK = re.compile(r"^<!-- (run|shows|not run)(?:: (.*?))? -->$")
_OPTIONS = re.compile(
    r'(?P<stays>stays)|until "(?P<until>[^"]+)"|types "(?P<types>[^"]+)" after "(?P<after>[^"]+)"'
    r"|(?P<logs_in>logs in)|(?P<ends>ends its processes)"
)


class Unmarked(ValueError):
    """A block has no mark, or one that is not understood; the text names page and line."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a page."""

    page: str
    line: int
    kind: str
    """`run`, `shows` or `not run`."""
    text: str
    machine: str = ""
    reason: str = ""
    """Of a block that is not run."""
    stays: bool = False
    until: str = ""
    types: str = ""
    after: str = ""
    logs_in: bool = False
    ends: bool = False

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in order. Raises Unmarked."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        if lines[number].startswith("```"):
            end = lines.index("```", number + 1)
            text = "\n".join(lines[number + 1 : end])
            found.append(_block(page.name, number + 1, lines[number - 1] if number else "", text))
            number = end
        elif lines[number].startswith("    ") and lines[number].strip() and not lines[number - 1].strip():
            raise Unmarked(f"{page.name}:{number + 1}: an indented block has no mark; write it between ```")
        number += 1
    return found


def _block(page: str, line: int, mark: str, text: str) -> Block:
    match = _MARK.match(mark)
    if match is None:
        raise Unmarked(f"{page}:{line}: the line before a block must be a mark of tests/readme/blocks.py")
    kind, rest = match[1], match[2] or ""
    if kind == "not run":
        if len(rest.split()) < 4:
            raise Unmarked(f"{page}:{line}: say why the block is not run")
        return Block(page, line, kind, text, reason=rest)
    if kind == "shows":
        return Block(page, line, kind, text)
    machine, _, options = rest.partition(", ")
    values: dict[str, str] = {}
    for option in re.split(r', (?=(?:[^"]*"[^"]*")*[^"]*$)', options) if options else []:
        understood = _OPTIONS.fullmatch(option)
        if understood is None:
            raise Unmarked(f"{page}:{line}: {option!r} is not understood")
        values |= {name: value for name, value in understood.groupdict().items() if value}
    return Block(
        page,
        line,
        kind,
        text,
        machine=machine,
        stays="stays" in values,
        until=values.get("until", ""),
        types=values.get("types", ""),
        after=values.get("after", ""),
        logs_in="logs_in" in values,
        ends="ends" in values,
    )


def unbroken(output: list[str]) -> list[str]:
    """Return each line with those that it goes on in: a terminal of 80 columns gets sentences broken and indented."""
    lines: list[str] = []
    for line in reversed(output):
        after = lines[-1] if lines and lines[-1].startswith("  ") else ""
        lines.append(f"{line} {after.strip()}" if after else line)
    return lines[::-1]


def missing(expected: str, output: list[str]) -> str:
    """Return the first line of `expected` that the output does not have, in this order; empty: it has all."""
    rest = iter(unbroken(output))
    for line in expected.splitlines():
        pattern = re.compile(".*?".join(re.escape(part) for part in line.split("…")))
        if not any(pattern.search(written) for written in rest):
            return line
    return ""

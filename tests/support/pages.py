"""Reads pages of Markdown as tests compare them: one line for each paragraph, each item and each row.

A page is wrapped at 130 characters, and a table whose rows would be longer is a list: an item with the first cell, and
below it an item for each other cell, `* *Header:* cell`. `read` joins the lines, and returns such items as rows.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_BEGINS: Final = re.compile(r"\s*(?:[*+-] |\d+[.)] |[|#>]|```|<a id=|$)")
_CELL: Final = re.compile(r"  \* (?:\*[^*`]+:\*|[^*\s][^:]*`[^:]*:) (.*)")


def read(page: Path) -> str:
    """Return the text of a page, joined as the module says."""
    return join(page.read_text(encoding="utf-8"))


def join(text: str) -> str:
    """Return a text with one line for each paragraph, item and row. What stands in a fence stays as it is."""
    lines: list[str] = []
    fenced = False
    for line in text.split("\n"):
        goes_on = bool(lines) and not fenced and not _BEGINS.match(line) and bool(lines[-1].strip())
        if goes_on and not lines[-1].startswith(("#", "|")) and not lines[-1].lstrip().startswith("```"):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
        fenced ^= line.lstrip().startswith("```")
    return "\n".join(_rows(lines))


def _rows(lines: list[str]) -> list[str]:
    """Return the lines with each item of cells as one row of a table."""
    found: list[str] = []
    for line in lines:
        cell = _CELL.fullmatch(line)
        if cell and found and found[-1].startswith("| "):
            found[-1] += f" {cell[1]} |"
        elif cell and found and found[-1].startswith("* "):
            found[-1] = f"| {found[-1].removeprefix('* ')} | {cell[1]} |"
        else:
            found.append(line)
    return found

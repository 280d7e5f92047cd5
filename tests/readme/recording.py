"""A recorded terminal: what was typed and seen in a run, as an asciicast, and its last frame as a picture.

The format is asciicast v2 (docs.asciinema.org/manual/asciicast/v2). Output comes as it came, in its own time, but for
waits, which end after `LONGEST_WAIT`; how a command is typed is made up, because a program typed it.
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyte

ROOT = Path(__file__).resolve().parents[2]
ASCIICAST = ROOT / "docs" / "first-ten-minutes.cast"
COLUMNS, ROWS = 80, 24
LONGEST_WAIT = 1.5
_PER_CHARACTER, _AT_ONCE = 0.03, 3
_AFTER_OUTPUT = 0.8
"""Seconds that a reader has for what a command printed."""
PROMPT = "\x1b[1;32m$\x1b[0m "

CELL_WIDTH, CELL_HEIGHT, FONT_SIZE, MARGIN = 8.4, 19.0, 14, 16
SCHEMES: Mapping[str, Mapping[str, str]] = {
    "light": {
        "background": "#f6f8fa", "border": "#d1d9e0", "default": "#1f2328", "dim": "#59636e",
        "red": "#a40e26", "green": "#116329", "brown": "#7d4e00",
    },
    "dark": {
        "background": "#151b23", "border": "#3d444d", "default": "#e6edf3", "dim": "#9198a1",
        "red": "#ff7b72", "green": "#56d364", "brown": "#e3b341",
    },
}  # fmt: skip
"""The colours of each picture by the terminal's names; pyte calls yellow brown."""
PICTURES = {scheme: ROOT / "docs" / "images" / f"first-ten-minutes-{scheme}.svg" for scheme in SCHEMES}


@dataclass
class Recording:
    """One terminal of COLUMNS by ROWS, from its first prompt."""

    title: str
    replaced: dict[str, str]
    """What a run has in place of what a reader sees, such as an address -> that."""

    def __post_init__(self) -> None:
        self._events: list[tuple[float, str, str]] = []
        self._now = 0.0
        self._came: list[tuple[float, str]] = []

    def begin_section(self, name: str) -> None:
        """Mark a place that a player can jump to, and show its name as a comment."""
        self._events.append((self._now, "m", name))
        self._show(f"\x1b[2m# {name}\x1b[0m\r\n")
        self._now += LONGEST_WAIT

    def type_command(self, lines: Iterable[str], *, elsewhere: bool = False) -> None:
        """Show the lines of a command, each with its prompt, as they are typed; `elsewhere`: in another terminal."""
        if elsewhere:
            self._show("\x1b[2m# in another terminal, where it goes on:\x1b[0m\r\n")
        for line in lines:
            self._show(PROMPT if line.startswith("$ ") else line[:2])
            for begin in range(2, len(line), _AT_ONCE):
                self._now += _AT_ONCE * _PER_CHARACTER
                self._show(line[begin : begin + _AT_ONCE])
            self._show("\r\n")
        self._came = [(time.monotonic(), "")]

    def hear(self, text: str) -> None:
        """Take output of the command that was typed last, as it comes."""
        self._came.append((time.monotonic(), text))

    def end_command(self) -> None:
        """Show what was heard: texts that came within a moment are one, so that what is to be replaced is whole."""
        shown, last = "", self._came[0][0]
        for came, text in self._came[1:]:
            if came - last > 0.05:
                self._show(self._replace(shown))
                shown = ""
                self._now += min(came - last, LONGEST_WAIT)
            shown, last = shown + text, came
        self._show(self._replace(shown))
        self._now += _AFTER_OUTPUT if len(self._came) > 1 else _PER_CHARACTER

    def _replace(self, text: str) -> str:
        for ran, reads in self.replaced.items():
            text = text.replace(ran, reads)
        return text

    def _show(self, text: str) -> None:
        if text:
            self._events.append((self._now, "o", text))

    def asciicast(self) -> str:
        """Return the file of the recording."""
        header = {"version": 2, "width": COLUMNS, "height": ROWS, "title": self.title}
        lines = [json.dumps(header), *(json.dumps([round(at, 3), kind, text]) for at, kind, text in self._events)]
        return "\n".join(lines) + "\n"


def output_of(asciicast: str) -> str:
    """Return all that the terminal of a recording was sent. Raises ValueError for what is no asciicast v2."""
    header, *events = (json.loads(line) for line in asciicast.splitlines())
    if (header["version"], header["width"], header["height"]) != (2, COLUMNS, ROWS):
        raise ValueError(f"not an asciicast v2 of {COLUMNS} x {ROWS}: {header}")
    return "".join(text for _, kind, text in events if kind == "o")


def picture_of(asciicast: str, scheme: str) -> str:
    """Return the last frame of a recording as SVG in the colours of a scheme."""
    screen = pyte.Screen(COLUMNS, ROWS)
    # pyte keeps no attribute for dim text: it becomes a colour that arcbridge does not print.
    pyte.Stream(screen).feed(output_of(asciicast).replace("\x1b[2m", "\x1b[35m"))
    colours = SCHEMES[scheme]
    width, height = COLUMNS * CELL_WIDTH + 2 * MARGIN, ROWS * CELL_HEIGHT + 2 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img"'
        f' font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" font-size="{FONT_SIZE}">',
        f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="8" fill="{colours["background"]}"'
        f' stroke="{colours["border"]}"/>',
    ]
    for row in range(ROWS):
        for column, text, colour, bold in _runs(screen, row):
            x, y = MARGIN + column * CELL_WIDTH, MARGIN + row * CELL_HEIGHT + FONT_SIZE
            weight = ' font-weight="bold"' if bold else ""
            fill = colours["dim" if colour == "magenta" else colour]
            lines.append(
                f'<text x="{x:.1f}" y="{y:.1f}" textLength="{len(text) * CELL_WIDTH:.1f}" xml:space="preserve"'
                f' fill="{fill}"{weight}>{html.escape(text)}</text>'
            )
    return "\n".join([*lines, "</svg>"]) + "\n"


def _runs(screen: pyte.Screen, row: int) -> Iterator[tuple[int, str, str, bool]]:
    """Yield (first column, text, colour, bold) of each run of a row that looks the same, without blanks around it."""
    cells = [screen.buffer[row][column] for column in range(COLUMNS)]
    begin = 0
    for column in range(1, COLUMNS + 1):
        same = column < COLUMNS and (cells[column].fg, cells[column].bold) == (cells[begin].fg, cells[begin].bold)
        if not same:
            text = "".join(cell.data for cell in cells[begin:column])
            if stripped := text.strip():
                yield begin + text.index(stripped[0]), stripped, cells[begin].fg, cells[begin].bold
            begin = column

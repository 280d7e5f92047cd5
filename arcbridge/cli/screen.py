"""Lays text out for what it is printed to: width, colour, marks, tables, and the line that shows that a command waits.

Pure but for `Screen.of`, which asks the stream, and `Waiting`. What is no terminal gets every column at its natural
width, no colour and no line breaks of ours: programs read it. On a terminal columns give way in the order of their
`rank`, and nothing is cut within a word: the terminal itself breaks one that is wider than it is. Text comes in escaped
(`cli.output.plain`). docs/decisions/0047-output-that-fits.md says why this is no library.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType
    from typing import TextIO

    _Shown = Sequence[tuple["Column", list[str]]]

DEFAULT_WIDTH = 80
WIDEST_PROSE = 100
"""Columns of the widest lines of help and errors: longer lines are hard to read."""
GAP = 3
"""Spaces between two columns."""
LEAST_PROSE = 24
"""Columns that a column of sentences keeps, as long as others can give way."""
_WAIT_SHOWN = 0.5
"""Seconds after which a wait is shown."""

GREEN, YELLOW, RED, BOLD, DIM = "32", "33", "31", "1", "2"
_STATES = {
    **dict.fromkeys(("ok", "connected", "open"), GREEN),
    **dict.fromkeys(("warning", "waiting", "connecting", "resuming", "expired"), YELLOW),
    **dict.fromkeys(("failed", "offline", "revoked"), RED),
    **dict.fromkeys(("skipped", "not running", "used up"), DIM),
}
"""The colour of each word that a column of states may have, small letters."""
_MARKS = {"ok": ("✓", "+"), "warning": ("!", "!"), "failed": ("✗", "x"), "skipped": ("–", "-")}
"""The mark of each state of a finding, and what an encoding without it shows."""

_colour_wanted = "auto"


def use_colour(when: str) -> None:
    """Decide for this process by `--color`: `auto`, `always` or `never`."""
    global _colour_wanted
    _colour_wanted = when


def wants_colour(when: str, stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Return whether to colour: `always`, `never`, or `auto`: on a terminal, without NO_COLOR (no-color.org) or
    TERM=dumb, and elsewhere where CLICOLOR_FORCE (bixense.com/clicolors) or FORCE_COLOR (force-color.org) asks for
    it."""
    if when in ("always", "never"):
        return when == "always"
    if environment.get("NO_COLOR"):
        return False
    if any(environment.get(name, "0") not in ("", "0") for name in ("CLICOLOR_FORCE", "FORCE_COLOR")):
        return True
    return environment.get("TERM") != "dumb" and stream.isatty()


class Screen:
    """What a stream can show. `width`: columns of a terminal; None: it is none, and lines may be as long as they
    are."""

    __slots__ = ("colour", "glyphs", "width")

    def __init__(self, width: int | None = None, *, colour: bool = False, glyphs: bool = True) -> None:
        self.width = width
        self.colour = colour
        self.glyphs = glyphs

    @classmethod
    def of(cls, stream: TextIO, environment: Mapping[str, str] = os.environ) -> Screen:
        """Return what this stream can show; COLUMNS goes before what the terminal says."""
        width = None
        if stream.isatty():
            width = _columns(environment)
            try:
                width = width or os.get_terminal_size(stream.fileno()).columns
            except (OSError, ValueError):
                pass
            width = max(width or DEFAULT_WIDTH, 20)
        glyphs = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "") == "utf8"
        return cls(width, colour=wants_colour(_colour_wanted, stream, environment), glyphs=glyphs)

    @property
    def prose(self) -> int | None:
        """Columns for sentences; None: they are not wrapped."""
        return None if self.width is None else min(self.width, WIDEST_PROSE)

    def paint(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour and colour and text else text

    def heading(self, text: str) -> str:
        return self.paint(text, BOLD)

    def state(self, word: str) -> str:
        """Return a word of a column of states in its colour."""
        return self.paint(word, state_colour(word))

    def mark(self, state: str) -> str:
        """Return the mark of a finding's state, in its colour."""
        return self.paint(_MARKS[state][0 if self.glyphs else 1], state_colour(state))


def _columns(environment: Mapping[str, str]) -> int:
    text = environment.get("COLUMNS", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0


def state_colour(word: str) -> str:
    return _STATES.get(word.strip().lower(), "")


# --- width and lines --------------------------------------------------------------------------------------------------


def cells(text: str) -> int:
    """Return the columns that a terminal takes for a text: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def wrap(text: str, width: int | None, indent: str = "") -> list[str]:
    """Break a text between words into lines of `width` columns; further ones begin with its own leading spaces and
    `indent`. A break stands for one space, and no other within the text is lost: records of audit logs are evidence.
    What stands between backticks stays together, and a word that is wider than a whole line is a longer line, so that
    it can be copied as it is."""
    if width is None or cells(text) <= width:
        return [text]
    line, lines, fresh = text[: min(len(text) - len(text.lstrip(" ")), max(width, 0) // 2)], [], True
    indent = line + indent
    for word in _words(text, max(width - len(indent), 1)):
        gap = "" if fresh else " "
        if not fresh and cells(line) + 1 + cells(word) > width:
            lines.append(line)
            line, gap = indent, ""
        line += gap + word
        fresh = False
    return [*lines, line]


def _words(text: str, room: int) -> list[str]:
    """Return the words of a text; a command between backticks is one where it fits a line, so that it can be copied."""
    words: list[str] = []
    quoted = False
    for word in text.strip(" ").split(" "):
        if quoted and cells(words[-1]) + 1 + cells(word) <= room:
            words[-1] += f" {word}"
        else:
            words.append(word)
        quoted ^= word.count("`") % 2 == 1
    return words


def prose(text: str, screen: Screen, indent: str = "") -> str:
    """Return lines of sentences, each broken at the screen's width and ended."""
    return "".join(f"{line}\n" for part in text.splitlines() for line in wrap(part, screen.prose, indent))


# --- tables -----------------------------------------------------------------------------------------------------------


class Column:
    """A column of a table. `rank`: 0 stays; of the others the highest gives way first where the screen is narrow.

    `words`: holds sentences, which are broken over several lines before any column gives way. `state`: its words have
    colours. `wide`: only in `-o wide`, where no column gives way.
    """

    __slots__ = ("head", "key", "rank", "state", "wide", "words")

    def __init__(
        self, key: str, head: str = "", rank: int = 0, *, words: bool = False, state: bool = False, wide: bool = False
    ) -> None:
        self.key = key
        self.head = head or key.replace("_", " ").upper()
        self.rank = rank
        self.words = words
        self.state = state
        self.wide = wide


def table(rows: Sequence[Sequence[str]], columns: Sequence[Column], screen: Screen, *, wide: bool = False) -> str:
    """Return rows of cells as a table that fits the screen; a last line names the columns that gave way.

    Where those that stay do not fit either, each row is a block of lines, `HEAD: cell`.
    """
    shown = [(column, [row[index] for row in rows]) for index, column in enumerate(columns) if wide or not column.wide]
    hidden: list[str] = []
    width = None if wide else screen.width
    while width is not None and _least(shown) > width:
        column = max((column for column, _ in shown), key=lambda one: one.rank)
        if not column.rank:
            return _blocks(rows, columns, screen)
        hidden.insert(0, column.head)
        shown = [one for one in shown if one[0] is not column]
    lines = _lines(shown, _widths(shown, width), screen)
    if hidden and rows:
        note = f"not shown: {', '.join(hidden)} (-o wide shows all)"
        lines += [screen.paint(line, DIM) for line in wrap(note, width)]
    return "".join(f"{line}\n" for line in lines)


def _natural(column: Column, texts: Iterable[str]) -> int:
    return max(map(cells, (column.head, *texts)))


def _narrowest(column: Column, texts: Iterable[str]) -> int:
    """Return the columns that a column needs: its widest word, and for sentences room for some words."""
    natural = _natural(column, texts)
    if not column.words:
        return natural
    longest = max(max(map(cells, text.split()), default=0) for text in (column.head, *texts))
    return min(natural, max(longest, LEAST_PROSE))


def _least(shown: _Shown) -> int:
    return sum(_narrowest(*one) for one in shown) + GAP * (len(shown) - 1)


def _widths(shown: _Shown, width: int | None) -> list[int]:
    """Return each column's width: columns of sentences share what the others leave."""
    widths = [_natural(*one) for one in shown]
    over = 0 if width is None else sum(widths) + GAP * (len(shown) - 1) - width
    for index in sorted(range(len(shown)), key=lambda index: -widths[index]):
        if over > 0 and shown[index][0].words:
            less = min(over, widths[index] - _narrowest(*shown[index]))
            widths[index] -= less
            over -= less
    return widths


def _lines(shown: _Shown, widths: list[int], screen: Screen) -> list[str]:
    lines = [_joined([column.head for column, _ in shown], widths)]
    for row in zip(*(texts for _, texts in shown), strict=True):
        parts = [
            wrap(text, width) if column.words else [text]
            for text, width, (column, _) in zip(row, widths, shown, strict=True)
        ]
        for number in range(max(map(len, parts))):
            texts = [part[number] if number < len(part) else "" for part in parts]
            colours = [state_colour(text) if column.state else "" for text, (column, _) in zip(row, shown, strict=True)]
            lines.append(_joined(texts, widths, colours, screen))
    return lines


def _joined(
    texts: Sequence[str], widths: Sequence[int], colours: Sequence[str] = (), screen: Screen | None = None
) -> str:
    last = max((index for index, text in enumerate(texts) if text), default=0)
    line = ""
    for index, text in enumerate(texts[: last + 1]):
        painted = screen.paint(text, colours[index]) if screen is not None and colours else text
        line += painted + (" " * (widths[index] - cells(text) + GAP) if index < last else "")
    return line


def _blocks(rows: Sequence[Sequence[str]], columns: Sequence[Column], screen: Screen) -> str:
    first, *others = [index for index, column in enumerate(columns) if not column.wide]
    lines: list[str] = []
    for row in rows:
        lines += wrap(row[first], screen.width)
        for index in others:
            column, text = columns[index], row[index]
            found = wrap(f"  {column.head}: {text}", screen.width, "  ")
            colour = state_colour(text) if column.state else ""
            lines += [found[0].replace(f" {text}", f" {screen.paint(text, colour)}")] if colour else found
    return "".join(f"{line}\n" for line in lines)


# --- waiting ----------------------------------------------------------------------------------------------------------


class Waiting:
    """Shows on a terminal that a command waits, for what and for how long, on one line that goes when the wait ends.

    A thread writes it, so that it goes on while the command's own is blocked. `limit`: seconds after which the wait
    gives up; 0: none is known. `over_waiting` prints something else meanwhile.
    """

    def __init__(self, stream: TextIO, text: str, limit: float = 0.0) -> None:
        self._stream = stream
        self._text = text
        self._limit = limit
        self._screen = Screen.of(stream)

    def __enter__(self) -> Waiting:
        if self._screen.width is not None and os.environ.get("TERM") != "dumb":
            import threading

            self._ended = threading.Event()
            self._thread = threading.Thread(target=self._show, daemon=True)
            self._thread.start()
            _shown.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self in _shown:
            _shown.remove(self)
            self._ended.set()
            self._thread.join()

    def _show(self) -> None:
        import time

        began, pause, shown = time.monotonic(), _WAIT_SHOWN, False
        while not self._ended.wait(pause):
            passed, pause = time.monotonic() - began, 1.0
            shown = True
            line = f"{self._text} {_minutes(passed)}{f' of {_minutes(self._limit)}' if self._limit else ''}"
            fits = wrap(line, (self._screen.width or DEFAULT_WIDTH) - 1)[0]
            # The cursor stays at the beginning, so that a line of the log takes this one's place.
            self._stream.write(f"\r\x1b[K{self._screen.paint(fits, DIM)}\r")
            self._stream.flush()
        if shown:
            self.erase()

    def erase(self) -> None:
        self._stream.write("\r\x1b[K")
        self._stream.flush()


_shown: list[Waiting] = []


def over_waiting(line: str, stream: TextIO) -> str:
    """Return a line as it is to be written to `stream` in one piece: one that shows a wait is erased first, and comes
    again. Where `stream` is no terminal it may still lead to that one (`| tee`)."""
    if _shown and stream.isatty():
        return f"\r\x1b[K{line}"
    if _shown:
        _shown[-1].erase()
    return line


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"

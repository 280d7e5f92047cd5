"""Text at the width of what it is printed to: tables, sentences, colour, marks, the line that shows a wait."""

from __future__ import annotations

import io
import os
import re
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.cli import screen
from arcbridge.cli.screen import Column, Screen, Waiting, cells, over_waiting, prose, table, wants_colour, wrap


class Terminal(io.StringIO):
    encoding = "UTF-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("when", "environment", "wanted"),
    [
        ("auto", {}, True),
        ("auto", {"NO_COLOR": "1"}, False),
        ("auto", {"NO_COLOR": ""}, True),
        ("auto", {"TERM": "dumb"}, False),
        ("never", {"FORCE_COLOR": "1"}, False),
        ("always", {"NO_COLOR": "1"}, True),
    ],
)
def test_colour(when: str, environment: dict[str, str], wanted: bool) -> None:
    assert wants_colour(when, Terminal(), environment) is wanted


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [({}, False), ({"CLICOLOR_FORCE": "1"}, True), ({"FORCE_COLOR": "1"}, True), ({"CLICOLOR_FORCE": "0"}, False),
     ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)  # fmt: skip
def test_colour_of_a_pipe(environment: dict[str, str], wanted: bool) -> None:
    assert wants_colour("auto", io.StringIO(), environment) is wanted


def test_the_width_is_that_of_columns_then_of_the_terminal_then_80() -> None:
    assert Screen.of(io.StringIO(), {"COLUMNS": "70"}).width is None
    assert Screen.of(Terminal(), {"COLUMNS": "70"}).width == 70
    assert [Screen.of(Terminal(), {"COLUMNS": wrong}).width for wrong in ("", "x", "-1", "0", "9" * 9)] == [80] * 5
    assert Screen.of(Terminal(), {"COLUMNS": "3"}).width == 20
    import pty  # not on Windows

    main, end = pty.openpty()
    with os.fdopen(end, "w") as stream:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 97, 0, 0))
        assert Screen.of(stream, {}).width == 97
    os.close(main)


def test_marks_where_the_encoding_has_none() -> None:
    ascii_terminal = Terminal()
    ascii_terminal.encoding = "ANSI_X3.4-1968"
    assert [Screen.of(Terminal(), {"NO_COLOR": "1"}).mark(state) for state in ("ok", "failed")] == ["✓", "✗"]
    plain = Screen.of(ascii_terminal, {"NO_COLOR": "1"})
    assert "".join(plain.mark(state) for state in ("ok", "warning", "failed", "skipped")) == "+!x-"


def test_wide_and_combining_characters() -> None:
    assert [cells(text) for text in ("abc", "集群", "e\u0301", "a\u200bb")] == [3, 4, 1, 2]
    rows = [["集群-1", "Connected"], ["e\u0301-2", "-"]]
    lines = table(rows, (Column("name"), Column("state", state=True)), Screen(80)).splitlines()
    assert lines == ["NAME     STATE", "集群-1   Connected", "e\u0301-2      -"]


def test_lines_break_between_words() -> None:
    assert wrap("one two three", 8) == ["one two", "three"]
    assert wrap("error: one two three", 10, "  ") == ["error: one", "  two", "  three"]
    assert wrap("  a b", 80) == ["  a b"]
    assert wrap("  key: " + "v" * 9, 10, "  ") == ["  key:", "    " + "v" * 9]
    assert wrap("a `run this now` b", 14) == ["a", "`run this now`", "b"]
    assert wrap("x " + "y" * 12, 5) == ["x", "y" * 12]
    assert wrap("one two three", None) == ["one two three"]
    assert prose("one two\nthree", Screen(5)) == "one\ntwo\nthree\n"
    assert prose("x " * 70, Screen(160)).splitlines()[0] == " ".join("x" * 50)


@given(st.text(st.sampled_from("ab 集`-"), max_size=60), st.integers(-9, 30), st.integers(0, 1))
def test_nothing_is_lost_and_nothing_is_wider(text: str, width: int, indent: int) -> None:
    lines = wrap(text, width, " " * indent)
    assert "".join("".join(lines).split()) == "".join(text.split())
    if (lead := len(text) - len(text.lstrip(" "))) <= width // 2:
        assert " ".join([lines[0], *(line[lead + indent :] for line in lines[1:])]).rstrip() == text.rstrip()
    assert all(cells(line) <= width or " " not in line.strip() or "`" in line for line in lines)


COLUMNS = (Column("name"), Column("state", state=True), Column("since", rank=1), Column("why", rank=2, words=True),
           Column("pin", wide=True))  # fmt: skip
ROWS = [["berlin", "Connected", "3 h", "-", "sha256:" + "0" * 64], ["munich", "failed", "2 d", "no agent " * 6, "-"]]


def test_columns_give_way_in_their_order() -> None:
    assert table(ROWS, COLUMNS, Screen()).splitlines()[2].endswith("no agent no agent ")
    assert table(ROWS, COLUMNS, Screen(54)).splitlines() == [
        "NAME     STATE       SINCE   WHY",
        "berlin   Connected   3 h     -",
        "munich   failed      2 d     no agent no agent no",
        "                             agent no agent no agent",
        "                             no agent",
    ]
    assert table(ROWS, COLUMNS, Screen(40)).splitlines() == [
        "NAME     STATE       SINCE",
        "berlin   Connected   3 h",
        "munich   failed      2 d",
        "not shown: WHY (-o wide shows all)",
    ]
    assert "SINCE" not in table(ROWS, COLUMNS, Screen(22)).splitlines()[0]
    assert "sha256:" + "0" * 64 in table(ROWS, COLUMNS, Screen(40), wide=True)


def test_what_does_not_fit_at_all_is_a_block_for_each_row() -> None:
    text = table([["n" * 30, "failed"]], COLUMNS[:2], Screen(20, colour=True))
    assert text.splitlines() == ["n" * 30, "  STATE: \x1b[31mfailed\x1b[0m"]


@given(st.lists(st.lists(st.text("ab集 ", max_size=40), min_size=5, max_size=5), max_size=4), st.integers(20, 90))
def test_no_line_is_wider_than_the_screen(rows: list[list[str]], width: int) -> None:
    lines = table(rows, COLUMNS, Screen(width)).splitlines()
    assert all(cells(line) <= width or " " not in line.strip() for line in lines)


def test_colour_changes_no_width() -> None:
    plain, coloured = (table(ROWS, COLUMNS, Screen(80, colour=colour)) for colour in (False, True))
    assert "\x1b[32mConnected\x1b[0m" in coloured
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain


def test_a_wait_is_a_line_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_WAIT_SHOWN", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    written = threading.Event()

    class Seen(Terminal):
        def flush(self) -> None:
            written.set()

    stream = Seen()
    with Waiting(stream, "Waiting for the login", 300):
        assert written.wait(30)
        assert over_waiting("a line", stream) == "\r\x1b[Ka line"
        erased = re.compile(r"\r\x1b\[K(\r|$)")
        assert not erased.search(stream.getvalue())
        assert over_waiting("a line", io.StringIO()) == "a line"  # `| tee` leads to the same terminal
        assert erased.search(stream.getvalue())
    assert "Waiting for the login 0:00 of 5:00" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")
    assert over_waiting("a line", stream) == "a line"
    pipe = io.StringIO()
    with Waiting(pipe, "Waiting"):
        assert over_waiting("a line", stream) == "a line"
    assert pipe.getvalue() == ""

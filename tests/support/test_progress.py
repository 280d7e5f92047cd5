"""Progress on a terminal and elsewhere, and the commands that are followed with it."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import progress
from tests.support.progress import Progress, StatusLine

PROGRAM = [sys.executable, str(Path(progress.__file__))]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty columns, and no second passes, however slow the machine is."""
    monkeypatch.setenv("COLUMNS", "41")
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 1000.0))


def test_a_pipe_gets_the_beginning_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with Progress("building helm", total=812, unit="packages") as shown:
        shown.show(1)
        shown.show(2)
    assert stream.getvalue() == "building helm: 812 packages ...\nbuilding helm: done in 0 s\n"


def test_a_terminal_gets_one_line_that_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    with Progress("building helm", total=812, unit="packages") as shown:
        shown.show(1)
        shown.show(2, "k8s.io\x1b[2J\x07/api/core/v1")
    versions = stream.getvalue().split("\r\x1b[K")
    assert versions[1:] == [
        "building helm: 0 s, 1 of 812 packages",
        "building helm: 0 s, 2 of 812 packages, …",
        "building helm: done in 0 s\n",
    ]
    assert all(len(version.rstrip("\n")) <= 40 for version in versions)
    StatusLine().show("one\x1b[2J\x07 two\ttabs")
    assert stream.getvalue().endswith("\r\x1b[Kone twotabs")


def test_the_program_shows_the_output_of_a_failure_alone() -> None:
    good = subprocess.run([*PROGRAM, "installing", "--", "echo", "much"], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout) == (0, "")
    assert re.fullmatch(r"installing \.\.\.\ninstalling: done in \d+ s\n", good.stderr)
    bad = subprocess.run(
        [*PROGRAM, "installing", "--", "sh", "-c", "echo no network; exit 7"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert bad.returncode == 7
    assert re.fullmatch(r"installing \.\.\.\ninstalling: not done after \d+ s\nno network\n", bad.stderr)
    assert subprocess.run([*PROGRAM, "installing"], capture_output=True, check=False).returncode == 2

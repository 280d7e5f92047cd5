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
from tests.support.processes import ManagedProcess, start_piped
from tests.support.progress import Progress, StatusLine, clock, follow

PROGRAM = [sys.executable, str(Path(progress.__file__))]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def forty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "41")
    monkeypatch.setattr(progress, "EVERY", 0.0)


@pytest.fixture
def standing_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second passes, however slow the machine is."""
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 1000.0))


@pytest.mark.usefixtures("standing_clock")
def test_a_pipe_gets_the_beginning_and_the_end() -> None:
    stream = io.StringIO()
    with Progress("building helm", total=812, unit="packages", stream=stream) as shown:
        shown.show(1)
        shown.show(2)
    assert stream.getvalue() == "building helm: 812 packages ...\nbuilding helm: done in 0 s\n"


@pytest.mark.usefixtures("standing_clock")
def test_a_terminal_gets_one_line_that_is_rewritten() -> None:
    stream = Terminal()
    with Progress("building helm", total=812, unit="packages", stream=stream) as shown:
        shown.show(1)
        shown.show(2, "k8s.io/api/core/v1")
    versions = stream.getvalue().split("\r\x1b[K")
    assert versions[1:] == [
        "building helm: 0 s, 1 of 812 packages",
        "building helm: 0 s, 2 of 812 packages, …",
        "building helm: done in 0 s\n",
    ]
    assert all(len(version.rstrip("\n")) <= 40 for version in versions)


@pytest.mark.usefixtures("standing_clock")
def test_a_long_title_gives_way_to_the_count() -> None:
    stream = Terminal()
    with Progress("building kube-apiserver, server, kubectl", total=2338, unit="packages", stream=stream) as shown:
        shown.show(17)
    assert "\x1b[Kbuilding kube…: 0 s, 17 of 2338 packages\r" in stream.getvalue()


@pytest.mark.usefixtures("standing_clock")
def test_a_failure_is_told_from_an_end() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="broken"), Progress("building helm", stream=stream):
        raise ValueError("broken")
    assert stream.getvalue().endswith("building helm: not done after 0 s\n")


def test_control_characters_do_not_reach_the_terminal() -> None:
    stream = Terminal()
    StatusLine(stream).show("one\x1b[2J\x07 two\ttabs")
    assert stream.getvalue() == "\r\x1b[Kone twotabs"


def test_lines_that_stay_take_the_place_of_the_status() -> None:
    stream, pipe = Terminal(), io.StringIO()
    for each in (stream, pipe):
        status = StatusLine(each)
        status.show("round 1")
        status.say("FAILED: it")
        status.say("and this")
    assert stream.getvalue() == "\r\x1b[Kround 1\r\x1b[KFAILED: it\nand this\n"
    assert pipe.getvalue() == "FAILED: it\nand this\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (125, "2 min 5 s")])
def test_durations(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_output_is_heard_line_by_line_and_returned() -> None:
    heard: list[str] = []
    process = start_piped([sys.executable, "-c", "print('one'); print('half', end=''); print('\\rwhole')"])
    assert follow(process, heard.append) == "one\nhalf\rwhole\n"
    assert [line for line in heard if line] == ["one", "whole"]
    assert process.returncode == 0


def test_a_process_that_takes_too_long_is_ended() -> None:
    process = start_piped(["sleep", "1000"])
    with pytest.raises(subprocess.TimeoutExpired):
        follow(process, lambda line: None, timeout=0.05)
    assert process.returncode == -9


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


def test_the_program_rewrites_its_line_on_a_terminal(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    subprocess.run(["mkfifo", fifo], check=True)
    command = ["sh", "-c", f"echo collecting wheels; cat {fifo}"]
    with ManagedProcess([*PROGRAM, "installing", "--", *command], log_dir=tmp_path, terminal=(24, 80)) as running:
        running.wait_for_line(r"installing: \d+ s, collecting wheels")
        fifo.write_text("")
        running.wait_for_line("installing: done in")
        assert running.wait() == 0

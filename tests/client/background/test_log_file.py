"""The log has a bound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge.client.background.log_file import LogFile


def test_one_former_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log" / "background.log"
    with LogFile(path, limit=100) as log:
        for number in range(50):
            log.write(f"line {number:03}\n")
    assert sorted(file.name for file in path.parent.iterdir()) == ["background.log", "background.log.1"]
    assert all(file.stat().st_size <= 100 for file in path.parent.iterdir())
    text = path.with_name("background.log.1").read_text() + path.read_text()
    assert text.splitlines()[-1] == "line 049"
    assert text.splitlines() == sorted(text.splitlines())
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_longer_line_is_written_whole(tmp_path: Path) -> None:
    with LogFile(tmp_path / "log", limit=10) as log:
        log.write("a" * 50 + "\n")
        assert not log.isatty()
    assert (tmp_path / "log").read_text() == "a" * 50 + "\n"


def test_standard_error_goes_there_too_behind_an_exchange(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from arcbridge.client.background.log_file import LogFile\n"
        "log = LogFile(Path(sys.argv[1]), limit=10, standard_error=True)\n"
        "log.write('first line\\n'); log.write('second\\n'); os.write(2, b'a crash\\n')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "log")], check=True, timeout=30)
    assert (tmp_path / "log").read_text() == "second\na crash\n"


def test_a_file_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    """As by `rm`, or with the whole state directory, which the process makes anew."""
    path = tmp_path / "log" / "background.log"
    with LogFile(path, limit=100) as log:
        log.write("before\n")
        path.unlink()
        path.parent.rmdir()
        with pytest.raises(FileNotFoundError):
            log.write("nowhere\n")
        path.parent.mkdir()
        log.write("after\n")
        assert path.read_text() == "after\n"
        path.rename(tmp_path / "kept")
        log.write("a" * 100 + "\n")
    assert path.read_text() == "a" * 100 + "\n"

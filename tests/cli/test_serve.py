"""The agent by its command line, as far as no relay is needed. (With one: tests/e2e.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge.errors import ExitCode


def agent(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "arcbridge", "--role", "agent", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("command", ["run", "enroll"])
def test_settings_are_required(command: str) -> None:
    done = agent(command)
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.startswith(
        "error: relays: required but not set; give --relay https://host:port, or set it in the settings file (and "
    )
    assert done.stderr.count("\n") == 1


def test_enroll_without_a_token(tmp_path: Path) -> None:
    done = agent("enroll", "--relay", "127.0.0.1:1", "--state-dir", str(tmp_path / "state"))
    assert done.returncode in (ExitCode.USAGE, ExitCode.LOGIN, ExitCode.FAILURE)
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr

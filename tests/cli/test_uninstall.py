"""`uninstall` at the command line: it asks, and says what stays."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge.cli import uninstall as module
from arcbridge.cli.run import run
from arcbridge.client.commands.uninstall import _STATE
from arcbridge.errors import ExitCode
from arcbridge.pki.pins import PinStore
from arcbridge.pki.private_files import ensure_private_directory, write_private

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    pins = tmp_path / "arcbridge" / "pins.toml"
    PinStore(pins).remember("prod", f"sha256:{'0' * 64}")
    return pins


def test_without_a_terminal_it_wants_yes(pins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["uninstall"]) == ExitCode.USAGE
    assert "give --yes" in capsys.readouterr().err
    assert pins.exists()
    assert run(["uninstall", "--yes"]) == ExitCode.DONE
    assert not pins.exists()
    out = capsys.readouterr().out
    assert out.startswith("removed: keys, pins, ports and tokens")
    assert "left: kubectl's own caches" in out
    assert run(["uninstall"]) == ExitCode.DONE, "there is nothing to ask about"


def test_with_a_closed_standard_input_it_wants_yes(pins: Path) -> None:
    command = ["sh", "-c", f"exec {sys.executable} -m arcbridge uninstall <&-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert "give --yes" in done.stderr
    assert pins.exists()


def test_a_flag_or_variable_that_names_a_directory_means_that_one_alone(
    pins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / "pins.toml"
    PinStore(other).remember("prod", f"sha256:{'0' * 64}")
    assert run(["uninstall", "--yes", "--state-dir", str(other.parent)]) == ExitCode.DONE
    assert (pins.exists(), other.exists()) == (True, False)
    assert "`arcbridge uninstall` alone" in " ".join(capsys.readouterr().out.split())
    PinStore(other).remember("prod", f"sha256:{'0' * 64}")
    monkeypatch.setenv("ARCBRIDGE_STATE_DIR", str(other.parent))
    assert run(["uninstall", "--yes"]) == ExitCode.DONE
    assert (pins.exists(), other.exists()) == (True, False)


def test_each_file_that_a_client_keeps_in_its_state_is_listed() -> None:
    code = [path.read_text() for path in (ROOT / "arcbridge/client").rglob("*.py") if path.name != "relay_profile.py"]
    kept = set(re.findall(r'(?:self|state)\.path / "([\w.-]+)"', "\n".join(code)))
    listed = {name.partition("/")[0] for lock, names in _STATE.items() for name in (lock, *names)}
    assert {"pins.toml", "local-ca"} < kept <= listed | {"running"}, "what a running process has is looked for there"


def test_a_damaged_profile_holds_up_nothing(pins: Path, tmp_path: Path) -> None:
    profile = tmp_path / "arcbridge" / "relays" / "relay.example_443" / "profile.json"
    write_private_at(profile, b"{")
    write_private_at(profile.parents[1] / ".lock", b"")
    assert run(["uninstall", "--yes"]) == ExitCode.DONE
    assert not (tmp_path / "arcbridge").exists()


def test_on_windows(pins: Path) -> None:
    command = [sys.executable, "-m", "tests.support.windows", "arcbridge", "--role", "client", "uninstall", "--yes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("removed: keys, pins, ports and tokens")
    assert not pins.exists()


def write_private_at(path: Path, data: bytes) -> None:
    ensure_private_directory(path.parent)
    write_private(path, data)


@pytest.mark.parametrize(("answer", "code"), [(False, ExitCode.FAILURE), (True, ExitCode.DONE)])
def test_on_a_terminal_it_asks_and_shows_what_goes(
    pins: Path, monkeypatch: pytest.MonkeyPatch, answer: bool, code: ExitCode
) -> None:
    asked = []

    async def ask_yes(question: str) -> bool:
        asked.append(question)
        return answer

    monkeypatch.setattr(module, "ask_yes", ask_yes)
    reading, writing = os.openpty()
    with os.fdopen(writing) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        assert run(["uninstall"]) == code
    os.close(reading)
    assert str(pins) in asked[0]
    assert pins.exists() is not answer

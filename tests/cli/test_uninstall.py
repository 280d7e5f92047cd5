"""`uninstall` at the command line: it asks, and says what stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from arcbridge.cli import uninstall as module
from arcbridge.cli.run import run
from arcbridge.errors import ExitCode


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    pins = tmp_path / "arcbridge" / "pins.toml"
    pins.parent.mkdir(mode=0o700)
    pins.write_text("")
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
        assert run(["uninstall"]) == code
    os.close(reading)
    assert str(pins) in asked[0]
    assert pins.exists() is not answer

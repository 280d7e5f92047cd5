"""By which path kubectl runs this installation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from arcbridge import single_file
from arcbridge.installation import NAME, is_another, is_there, own_path, program


def a_program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env python3\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that PATH has, and no other."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def test_the_file_that_runs(tmp_path: Path, on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = a_program(tmp_path / "venv" / "bin" / "arcbridge")
    monkeypatch.setattr(sys, "argv", [str(file)])
    assert own_path() == str(file)
    a_program(on_path / "arcbridge")
    assert own_path() == str(file), "another installation in PATH is not this one"
    assert is_another(str(on_path / "arcbridge"))


def test_a_name_in_path_that_outlives_an_upgrade(
    tmp_path: Path, on_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = a_program(tmp_path / "Cellar" / "1.0" / "arcbridge")
    (on_path / "arcbridge").symlink_to(file)
    monkeypatch.setattr(sys, "argv", [str(file)])
    assert own_path() == str(on_path / "arcbridge")
    assert not is_another(str(file))


def test_as_a_module_of_python(tmp_path: Path, on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/nonexistent/pytest"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    assert own_path() == NAME, "there is no file of it"
    assert not is_another(NAME)
    file = a_program(tmp_path / "venv" / "bin" / "arcbridge")
    assert own_path() == str(file)


def test_what_is_there(tmp_path: Path, on_path: Path) -> None:
    assert not is_there(NAME)
    a_program(on_path / NAME)
    assert is_there(NAME, str(on_path))
    assert not is_there(NAME, "/nonexistent")
    assert is_there(str(on_path / NAME), "/nonexistent")
    assert not is_there(str(tmp_path / NAME))


@pytest.mark.parametrize("name", ["arcbridge", "kubectl-arcbridge"])
def test_this_very_installation_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    script = tmp_path / name
    script.write_text("#!/usr/bin/python3\n")
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert program() == [sys.executable, str(script)]
    script.write_text("#!/bin/sh\n")
    assert program() == [sys.executable, "-P", "-m", "arcbridge"]
    monkeypatch.setattr(sys, "argv", ["/opt/arcbridge.pyz"])
    assert program() == [sys.executable, "/opt/arcbridge.pyz"]
    monkeypatch.setattr(single_file, "_file", "/opt/arcbridge-linux-x86_64")
    assert program() == ["/opt/arcbridge-linux-x86_64"]

"""The directory of one command: private, gone at the end, and swept after a process that was killed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from arcbridge.client.kubeconfig import private as private_kubeconfig
from arcbridge.client.kubeconfig.private import place, private_directory, sweep
from arcbridge.errors import StateError


@pytest.fixture
def runtime(tmp_path: Path) -> dict[str, str]:
    return {"XDG_RUNTIME_DIR": str(tmp_path)}


def entries(runtime: dict[str, str]) -> list[str]:
    return sorted(os.listdir(runtime["XDG_RUNTIME_DIR"]))


def test_private_while_it_lasts_and_gone_at_the_end(runtime: dict[str, str]) -> None:
    with private_directory(runtime, "text") as directory:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((directory / "kubeconfig").stat().st_mode) == 0o600
        assert (directory / "kubeconfig").read_text() == "text"
        (directory / "cache" / "deep").mkdir(parents=True)  # as kubectl does
    assert entries(runtime) == []


def test_gone_after_an_error(runtime: dict[str, str]) -> None:
    with pytest.raises(KeyError), private_directory(runtime, ""):
        raise KeyError
    assert entries(runtime) == []


def test_sweep_leaves_what_a_process_has(runtime: dict[str, str]) -> None:
    with private_directory(runtime, "text") as directory:
        assert sweep(runtime) == 0
        assert (directory / "kubeconfig").exists()


def test_sweep_leaves_what_a_process_is_just_making(runtime: dict[str, str], tmp_path: Path) -> None:
    """The process has opened its lock file, and has no lock on it yet."""
    (tmp_path / "arcbridge-run-young").mkdir()
    (tmp_path / "arcbridge-run-young" / "lock").write_text("")
    assert sweep(runtime) == 0
    assert entries(runtime) == ["arcbridge-run-young"]


def left_behind(runtime: dict[str, str], name: str = "arcbridge-run-left") -> Path:
    """What a process that was killed leaves: no process has the lock."""
    directory = Path(runtime["XDG_RUNTIME_DIR"]) / name
    (directory / "cache").mkdir(parents=True)
    for file in ("kubeconfig", "lock"):
        (directory / file).write_text("")
    return directory


def test_sweep_removes_what_was_left(runtime: dict[str, str]) -> None:
    left_behind(runtime)
    assert sweep(runtime) == 1
    assert entries(runtime) == []


def test_sweep_touches_nothing_else(runtime: dict[str, str], tmp_path: Path) -> None:
    kept = left_behind(runtime, "precious")
    (tmp_path / "arcbridge-run-link").symlink_to(kept)
    (tmp_path / "arcbridge-run-file").write_text("")
    (tmp_path / "arcbridge-run-new").mkdir()  # another command is about to lock it
    before = entries(runtime)
    assert sweep(runtime) == 0
    assert entries(runtime) == before
    assert (kept / "kubeconfig").exists()


def test_sweep_leaves_what_is_another_user_s(runtime: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = left_behind(runtime)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert sweep(runtime) == 0
    assert (directory / "kubeconfig").exists()


def test_a_directory_that_was_never_locked_goes_when_it_is_old(runtime: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "arcbridge-run-old").mkdir()
    os.utime(tmp_path / "arcbridge-run-old", (0, 0))
    assert sweep(runtime) == 1
    assert entries(runtime) == []


def test_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_kubeconfig.tempfile, "gettempdir", lambda: "/elsewhere")
    assert place({"XDG_RUNTIME_DIR": str(tmp_path)}) == tmp_path
    for runtime in ("", "relative", str(tmp_path / "missing")):
        assert place({"XDG_RUNTIME_DIR": runtime}) == Path("/elsewhere")
    assert sweep({}) == 0
    with pytest.raises(StateError, match="TMPDIR"), private_directory({}, ""):
        pass

"""One file: what happens when it cannot be replaced, read, or locked. (The rest: test_kubeconfig.)"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from arcbridge.client import kubeconfig_file
from arcbridge.client.kubeconfig_file import KubeconfigFile
from arcbridge.errors import StateError


def changed(path: Path) -> KubeconfigFile:
    file = KubeconfigFile(path)
    file.read()
    file.current_context = "x"
    return file


def test_in_place_where_it_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config"
    path.write_text("current-context: " + "y" * 1000 + "\n")
    path.chmod(0o644)
    inode = path.stat().st_ino

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "replace", busy)
    changed(path).save()
    assert path.stat().st_ino == inode
    assert "current-context: x" in path.read_text()
    assert "yyy" not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config"
    path.write_text("a: b\n")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left"):
        changed(path).save()
    assert path.read_text() == "a: b\n"
    assert not list(tmp_path.glob(".config*"))


def test_unchanged_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text("current-context: x  # comment\n")
    changed(path).save()
    assert path.read_text() == "current-context: x  # comment\n"


def test_a_directory_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot read"):
        KubeconfigFile(tmp_path).read()


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubeconfig_file, "_LIMIT", 10)
    (tmp_path / "config").write_text("a: " + "x" * 20)
    with pytest.raises(StateError, match="larger than"):
        KubeconfigFile(tmp_path / "config").read()


def test_an_old_lock_says_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubeconfig_file, "LOCK_WAIT", 0.0)
    lock = tmp_path / "config.lock"
    lock.write_text("")
    os.utime(lock, (time.time() - 600, time.time() - 600))
    with pytest.raises(StateError, match="exists for 10 min"), KubeconfigFile(tmp_path / "config").locked():
        pass


def test_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StateError, match="permission denied"):
        KubeconfigFile(tmp_path / "sub" / "config").check_writable()

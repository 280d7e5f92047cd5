"""The file: new, of this user alone, whole or absent, and unpacked by tar."""

from __future__ import annotations

import errno
import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from arcbridge.bundle.archive import DIRECTORY, pack, try_directory, write_new
from arcbridge.errors import StateError


def test_what_is_packed_comes_out_by_tar(tmp_path: Path) -> None:
    data = pack({"manifest.json": b"{}", "log.jsonl": b"x" * 1_000_000}, 1_800_000_000.0)
    assert len(data) < 10_000
    write_new(tmp_path / "a.tar.gz", data)
    subprocess.run(["tar", "-xzf", "a.tar.gz"], cwd=tmp_path, check=True)
    assert (tmp_path / DIRECTORY / "log.jsonl").stat().st_size == 1_000_000
    with tarfile.open(fileobj=io.BytesIO(data)) as read:
        assert {one.mode for one in read} == {0o600}
    assert data == pack({"manifest.json": b"{}", "log.jsonl": b"x" * 1_000_000}, 1_800_000_000.0)


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_new(tmp_path / "a", b"first")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("a", "link"):
        with pytest.raises(StateError, match="File exists"):
            write_new(tmp_path / name, b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert not (tmp_path / "target").exists()


def test_a_full_disk_leaves_nothing_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    real = os.fdopen

    def opened(descriptor: int, mode: str) -> object:
        file = real(descriptor, mode, buffering=0)

        class Full:
            def __enter__(self) -> Full:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            write = full

        return Full()

    monkeypatch.setattr(os, "fdopen", opened)
    with pytest.raises(StateError, match="No space left on device; give a file in another directory, or - for"):
        write_new(tmp_path / "a", b"x")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StateError, match="No such file or directory"):
        write_new(tmp_path / "none" / "a", b"x")


def test_a_directory_is_tried_before_the_work_and_nothing_stays_there(tmp_path: Path) -> None:
    try_directory(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    for parent, reason in (("none", "No such file or directory"), ("file", "Not a directory")):
        (tmp_path / "file").touch()
        with pytest.raises(StateError, match=f"cannot write .*/{parent}/a: {reason}; give a file in another directory"):
            try_directory(tmp_path / parent / "a")

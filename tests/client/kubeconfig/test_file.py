"""One file: what happens when it cannot be replaced, read, or locked. (The rest: test_kubeconfig.)"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from pathlib import Path

import pytest
import yaml

from arcbridge.client.kubeconfig import file as kubeconfig_file
from arcbridge.client.kubeconfig.file import KubeconfigFile, Plain, dump, is_empty, parse
from arcbridge.errors import StateError
from arcbridge.pki import private_files


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


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES])
def test_a_directory_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = tmp_path / "config"
    path.write_text("a: b\n")
    fsync, inode = os.fsync, path.stat().st_ino

    def refused(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    monkeypatch.setattr(kubeconfig_file, "_write_in_place", None)
    changed(path).save()
    assert path.stat().st_ino != inode
    assert "current-context: x" in path.read_text()


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
    with pytest.raises(StateError, match=r"config\.lock exists for 10 min"):
        KubeconfigFile(tmp_path / "config").locked().__enter__()
    assert lock.exists()


def test_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StateError, match=f"{tmp_path} cannot be written to"):
        KubeconfigFile(tmp_path / "sub" / "config").check_writable()


def test_w11_directories_are_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = tmp_path / "a" / "b" / "config"
        file = KubeconfigFile(path)
        with file.locked():
            file.read()
            file.current_context = "x"
            file.save()
    finally:
        os.umask(before)
    assert [made.stat().st_mode & 0o777 for made in (path, path.parent, path.parent.parent)] == [0o600, 0o755, 0o755]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root makes files for other users")
def test_root_leaves_the_file_to_its_user(tmp_path: Path) -> None:
    """`sudo -E arcbridge status`, which repairs contexts; kubectl writes the file in place."""
    path = tmp_path / "config"
    path.write_text("current-context: mine\n")
    for one in (tmp_path, path):
        os.chown(one, 12345, 12345)
    changed(path).save()
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (12345, 0o600)


def test_root_that_may_not_give_files_away_writes_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container without CAP_CHOWN."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(private_files, "_give_to_owner", refuse)
    changed(tmp_path / "config").save()
    assert "current-context: x" in (tmp_path / "config").read_text()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root makes files for other users")
@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_w11_a_kubeconfig_that_another_user_has_put_there_is_refused(tmp_path: Path, kind: str) -> None:
    tmp_path.chmod(0o1777)
    path, mine = tmp_path / "config", tmp_path / "mine"
    mine.write_text("current-context: mine\n")
    if kind == "file":
        path.write_text("current-context: planted\n")
    else:
        path.symlink_to(mine if kind == "link" else tmp_path / "new")
    os.chown(path, 12345, 12345, follow_symlinks=False)
    file = KubeconfigFile(path)
    for use in (file.read, file.check_writable, lambda: file.locked().__enter__()):
        with pytest.raises(StateError, match="belongs to another user of this machine"):
            use()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config", "mine"]
    assert mine.read_text() == "current-context: mine\n"


@pytest.mark.parametrize(
    "text",
    [
        *("2024-01-01", "0123", "1:30", "yes", "off", "1_000", "~"),
        *("1e3", "0x1f", ".inf", "true", "3.10", "2024-05-06T07:08:09Z"),
    ],
)
def test_plain_scalars_keep_their_spelling(text: str) -> None:
    assert dump(parse(f"a: {text}\n".encode(), "f")) == f"a: {text}\n"


@pytest.mark.parametrize(
    "text", ["yes", "0123", "2024-01-01", "null", "", "1:30", "- x", "a: b", "#", "x" * 500, "é\n"]
)
def test_strings_stay_strings(text: str) -> None:
    written = dump({"a": text})
    assert yaml.safe_load(written) == {"a": text}
    again = parse(written.encode(), "f")
    assert dump(again) == written


def test_order_and_structure() -> None:
    source = b"z: 1\na:\n- {x: 1, b: [2, 3]}\n- null\nm: &id {k: v}\nn: *id\n"
    assert yaml.safe_load(dump(parse(source, "f"))) == yaml.safe_load(source)
    assert list(parse(source, "f")) == ["z", "a", "m", "n"]


def test_json_is_yaml() -> None:
    assert parse(b'{"a": ["b", 3]}', "f") == {"a": ["b", "3"]}


def test_an_error_names_the_line_and_quotes_nothing() -> None:
    with pytest.raises(StateError) as caught:
        parse(b"a: SECRET\nb: [SECRET\n", "the/file")
    assert "SECRET" not in str(caught.value)
    assert "the/file, line " in caught.value.message
    assert caught.value.__cause__ is None


def test_nothing() -> None:
    assert is_empty(parse(b"", "f"))
    for text in (b"a:", b"a: ~", b"a: NULL"):
        assert is_empty(parse(text, "f")["a"])
    assert not is_empty(parse(b'a: "null"', "f")["a"])
    assert not is_empty(Plain("x"))


@pytest.mark.parametrize("text", ["[" * 5000, "- " * 900 + "x"], ids=["brackets", "blocks"])
def test_h30_a_file_that_is_nested_deeply_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(f"current-context: y\na:\n {text}\n")
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own: Hypothesis may have set another one
    try:
        with pytest.raises(StateError):
            changed(path).save()
    finally:
        sys.setrecursionlimit(before)

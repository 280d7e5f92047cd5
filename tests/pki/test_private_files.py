import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from arcbridge.errors import StateError
from arcbridge.pki.private_files import (
    ensure_private_directory,
    locked,
    make_private,
    read_file,
    refuse_foreign_directory,
    refuse_planted,
    write_private,
)
from tests.support.unprivileged import as_unprivileged_user, closed_directory

as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root makes files for other users")
OTHER = 12345


def test_written_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        directory = tmp_path / "a" / "b" / "state"
        ensure_private_directory(directory)
        write_private(directory / "key", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((directory / "key").stat().st_mode) == 0o600
    # Parents too: in one that every user can write, another user would put a directory of his own in this one's place.
    for made in (directory, directory.parent, directory.parent.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_replaces_the_link_and_not_its_target(tmp_path: Path) -> None:
    """docs/threats.md#W3: links are not followed."""
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"untouched")
    link.symlink_to(target)
    write_private(link, b"new")
    assert target.read_bytes() == b"untouched"
    assert not link.is_symlink()
    assert link.read_bytes() == b"new"


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    write_private(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match="No space left"):
        write_private(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["key"]


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_syncs_no_directories_takes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool
) -> None:
    """As vboxsf: the file was there, and each login ended with "cannot write"."""
    fsync = os.fsync

    def refused(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(StateError, match="Input/output error") if fails else nullcontext():
        write_private(tmp_path / "key", b"new")
    assert (tmp_path / "key").read_bytes() == b"new"


@as_root
def test_root_works_for_the_owner_of_the_directory(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 23456)
    write_private(tmp_path / "key", b"")
    make_private(tmp_path / "database")
    with locked(tmp_path / "lock"):
        pass
    assert {(file.stat().st_uid, file.stat().st_gid) for file in tmp_path.iterdir()} == {(12345, 23456)}
    # An existing file keeps its owner: it may be a link to something else.
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"")
    make_private(foreign)
    with locked(foreign):
        pass
    assert foreign.stat().st_uid == 0


@as_root
def test_w11_a_file_of_another_user_is_not_read(tmp_path: Path) -> None:
    planted = tmp_path / "pins.toml"
    planted.write_text("another user's")
    planted.chmod(0o644)
    os.chown(planted, OTHER, OTHER)
    with pytest.raises(StateError, match="belongs to another user and is not used"):
        read_file(planted)
    # Root works for the owner of the directory, and reads what belongs to that user.
    os.chown(tmp_path, OTHER, OTHER)
    assert read_file(planted) == b"another user's"
    os.chown(planted, OTHER + 1, OTHER)
    with pytest.raises(StateError, match="belongs to another user"):
        read_file(planted)


@as_root
def test_w11_a_directory_that_another_user_can_change_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    refuse_foreign_directory(shared / "absent")
    (shared / "mine").mkdir(mode=0o700)
    refuse_foreign_directory(shared / "mine")
    (shared / "mine").chmod(0o777)
    with pytest.raises(StateError, match="every user of this machine can change"):
        refuse_foreign_directory(shared / "mine")
    (shared / "mine").chmod(0o757)
    with pytest.raises(StateError, match=r"a volume of a pod, choose a directory in it .*mine/arcbridge"):
        refuse_foreign_directory(shared / "mine")
    refuse_foreign_directory(shared / "mine" / "arcbridge")
    os.chown(shared / "mine", OTHER, OTHER)
    with pytest.raises(StateError, match="belongs to another user"):
        refuse_foreign_directory(shared / "mine")
    (tmp_path / "foreign").mkdir()
    os.chown(tmp_path / "foreign", OTHER, OTHER)
    with pytest.raises(StateError, match="belongs to another user"):
        refuse_foreign_directory(tmp_path / "foreign")


@as_root
def test_w11_what_another_user_has_put_into_a_shared_directory_is_refused(tmp_path: Path) -> None:
    shared, home = tmp_path / "tmp", tmp_path / "home"
    shared.mkdir()
    home.mkdir()
    shared.chmod(0o1777)
    (home / "config").write_text("mine")
    (shared / "directory").mkdir()
    (shared / "file").write_text("")
    (shared / "link").symlink_to(home / "config")
    (shared / "to-directory").symlink_to("../home")
    (shared / "dangling").symlink_to(home / "new")
    (home / "way").symlink_to("../tmp/link")  # a link of our own that leads into the shared directory
    names = ("directory", "file", "link", "to-directory", "dangling")
    for path in (*(shared / name for name in names), home / "way", shared / "absent" / "x", home / ".." / "home"):
        refuse_planted(path)  # all of it is ours so far
    for name in names:
        os.chown(shared / name, OTHER, OTHER, follow_symlinks=False)
    for path in (
        *(shared / name for name in names),
        home / "way",
        shared / "directory" / "x",
        shared / "to-directory/x",
    ):
        with pytest.raises(StateError, match="belongs to another user of this machine"):
            refuse_planted(path)
    # A directory of one user alone: what is in it is that user's affair.
    os.chown(home, OTHER, OTHER)
    os.chown(home / "config", OTHER, OTHER)
    refuse_planted(home / "config")
    (home / "loop").symlink_to("loop")
    refuse_planted(home / "loop")


def test_a_current_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    refuse_planted(tmp_path / "state")
    with pytest.raises(StateError, match="the current directory is gone"):
        refuse_planted(Path("state"))
    monkeypatch.chdir(tmp_path)


def test_a_link_that_goes_away_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to("other")

    def gone(path: Path) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "readlink", gone)
    with pytest.raises(StateError, match="cannot read the link"):
        refuse_planted(tmp_path / "link")


def test_making_keeps_what_is_there(tmp_path: Path) -> None:
    write_private(tmp_path / "database", b"1")
    make_private(tmp_path / "database")
    assert (tmp_path / "database").read_bytes() == b"1"


def test_read(tmp_path: Path) -> None:
    assert read_file(tmp_path / "absent") is None
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(StateError, match="larger than 10 bytes"):
        read_file(tmp_path / "large", limit=10)
    with pytest.raises(StateError, match="cannot read"):
        read_file(tmp_path)


def test_the_lock_excludes_threads_and_survives_an_error(tmp_path: Path) -> None:
    lock, counter = tmp_path / "lock", tmp_path / "counter"
    counter.write_text("0")

    def increment(_: int) -> None:
        with locked(lock):
            counter.write_text(str(int(counter.read_text()) + 1))

    with pytest.raises(RuntimeError, match="inside"), locked(lock):
        raise RuntimeError("inside")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(increment, range(100)))
    assert counter.read_text() == "100"


def test_unusable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for action in (
        lambda: ensure_private_directory(tmp_path / "file" / "below"),
        lambda: write_private(tmp_path / "file" / "below", b""),
        lambda: locked(tmp_path / "file" / "below").__enter__(),
    ):
        with pytest.raises(StateError, match="below"):
            action()


def test_root_waits_for_no_pipe_of_another_user_and_reads_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "ca.key"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        reading, writing = os.pipe()
        os.write(writing, b"key")
        written = pool.submit(read_file, Path(f"/dev/fd/{reading}"))
        os.close(writing)
        assert written.result(10) == b"key"
        os.close(reading)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(StateError, match="is a pipe of another user and is not read"):
        read_file(pipe)


@pytest.mark.skipif(os.name != "posix", reason="root alone reads all files there")
def test_who_forgot_sudo_is_not_told_to_chown_first() -> None:
    with closed_directory() as closed:
        (closed / "ca.key").write_text("")
        with as_unprivileged_user(closed):
            for use in (lambda: read_file(closed / "ca.key"), lambda: locked(closed / ".lock").__enter__()):
                with pytest.raises(StateError, match=r"Permission denied; run this as its owner or as root"):
                    use()

"""A recording's file is a tar archive of age files: whole up to its last member, whatever happens behind that."""

from __future__ import annotations

import errno
import hashlib
import os
import tarfile
from pathlib import Path

import pytest

from arcbridge.agent.recording import sealed_file
from arcbridge.agent.recording.sealed_file import ENDING, MAX_MEMBER, PART, RecordingFile, members
from tests.sealing.keys import X25519_IDENTITY, opened

from .keys import IDENTITIES, RECIPIENTS, published, text_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ("session" + ENDING)


def part(path: Path) -> Path:
    return path.with_name(path.name + PART)


def test_a_file_from_its_beginning_to_its_end(path: Path) -> None:
    file = RecordingFile.create(path, RECIPIENTS)
    file.append(b"first secret")
    assert part(path).stat().st_mode & 0o777 == 0o600
    assert not path.exists()
    file.append(b" and the second")
    found = published(file)
    data = path.read_bytes()
    assert (found.name, found.size) == (path.name, len(data))
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert b"secret" not in data
    assert not part(path).exists()
    assert text_of(path) == b"first secret and the second"


def test_other_programs_read_it(path: Path) -> None:
    """With tar and age alone: each member is an age file with a name that says its place."""
    file = RecordingFile.create(path, RECIPIENTS)
    for text in (b"a" * 70_000, b"b"):
        file.append(text)
    published(file)
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["000001.cast.age", "000002.cast.age"]
        found = [archive.extractfile(member) for member in archive]
        assert [opened(one.read(), IDENTITIES)[:2] for one in found if one is not None] == [b"aa", b"b"]
    assert X25519_IDENTITY.encode() not in path.read_bytes()


def test_the_name_of_another_file_is_not_taken(path: Path) -> None:
    RecordingFile.create(path, RECIPIENTS)
    with pytest.raises(FileExistsError):
        RecordingFile.create(path, RECIPIENTS)


@pytest.mark.parametrize("torn", [b"", b"x", bytes(600), b"\xff" * 2000, (b"1" * 600) + bytes(500)])
def test_a_file_whose_writer_is_gone_goes_on_behind_its_last_whole_member(path: Path, torn: bytes) -> None:
    file = RecordingFile.create(path, RECIPIENTS)
    file.append(b"one,")
    file.append(b"two,")
    os.close(file._descriptor)
    whole = part(path).stat().st_size
    with part(path).open("ab") as behind:
        behind.write(torn)
    again = RecordingFile.reopen(path, RECIPIENTS)
    assert again is not None
    assert again.size == whole == part(path).stat().st_size
    again.append(b"three")
    found = published(again)
    assert text_of(path) == b"one,two,three"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_member_that_is_cut_anywhere_is_left_out(path: Path) -> None:
    file = RecordingFile.create(path, RECIPIENTS)
    file.append(b"one")
    size = file.size
    file.append(b"two")
    data = part(path).read_bytes()
    for cut in range(size, len(data), 37):
        short = path.with_name("short")
        short.write_bytes(data[:cut])
        with short.open("rb") as opened_file:
            assert len(list(members(opened_file))) == 1


def test_a_file_whose_writer_lives_is_left_alone(path: Path) -> None:
    file = RecordingFile.create(path, RECIPIENTS)
    file.append(b"one")
    assert RecordingFile.reopen(path, RECIPIENTS) is None
    file.append(b", two")
    published(file)
    assert text_of(path) == b"one, two"


def test_behind_a_write_that_failed_the_file_is_what_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RecordingFile.create(path, RECIPIENTS)
    file.append(b"one,")
    write, calls = os.write, 0

    def half(descriptor: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            file.append(b"lost")
    file.append(b"two")
    found = published(file)
    assert text_of(path) == b"one,two"
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_member_of_a_hostile_file_is_bounded(tmp_path: Path) -> None:
    head = tarfile.TarInfo("000001.cast.age")
    head.size = MAX_MEMBER + 1
    (tmp_path / "x").write_bytes(head.tobuf(tarfile.USTAR_FORMAT) + b"x" * 1000)
    with (tmp_path / "x").open("rb") as file:
        assert list(members(file)) == []


def test_a_file_that_is_discarded_is_gone(path: Path) -> None:
    file = RecordingFile.create(path, RECIPIENTS)
    file.append(b"one")
    file.discard()
    assert not part(path).exists()
    assert not path.exists()


def test_a_file_that_is_published_or_taken_by_another_agent_is_not_written_to(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two agents of one directory: a file is locked until it has its name, and a new one that is locked is left."""
    file = RecordingFile.create(path, RECIPIENTS)
    file.append(b"one")
    file.finish()
    assert RecordingFile.reopen(path, RECIPIENTS) is None
    data = part(path).read_bytes()

    def published_meanwhile(descriptor: int) -> bool:
        os.replace(part(path), path)
        part(path).touch()  # the name is that of another file
        return True

    with monkeypatch.context() as patched:
        patched.setattr(sealed_file, "_lock", published_meanwhile)
        assert RecordingFile.reopen(path, RECIPIENTS) is None
    assert path.read_bytes() == data
    part(path).unlink()
    monkeypatch.setattr(sealed_file, "_lock", lambda descriptor: False)
    with pytest.raises(BlockingIOError):
        RecordingFile.create(path, RECIPIENTS)

"""The directory of recordings has a bound, and what a killed agent left in it is finished."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from arcbridge.agent.recording import spool as spool_module
from arcbridge.agent.recording.cast import BROKEN_OFF, CastReader
from arcbridge.agent.recording.sealed_file import ENDING, PART, FinishedFile, sha256_of
from arcbridge.agent.recording.spool import DirectoryFull, Spool
from arcbridge.errors import ConfigError

from .keys import RECIPIENTS, published, text_of


def spool(directory: Path, most: int = 100_000) -> Spool:
    return Spool(directory / "recordings", most, RECIPIENTS)


def recovered(made: Spool) -> list[FinishedFile]:
    """What a start finishes and publishes."""
    found = [one for part in made.left() if (one := made.recover(part)) is not None]
    for file, _ in found:
        file.publish()
    return [finished for _, finished in found]


def test_the_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    made = spool(tmp_path)
    assert made.directory.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"recording.directory: .* cannot be made"):
        Spool(tmp_path / "file" / "recordings", 1, RECIPIENTS)


def test_a_full_directory_takes_no_further_recording_until_there_is_room(tmp_path: Path) -> None:
    made = spool(tmp_path)
    old = made.directory / ("old" + ENDING)
    old.write_bytes(bytes(99_999))
    (made.directory / "other").write_bytes(bytes(99_999))
    made.measure()
    assert made.used == 99_999
    made.make_room(0)
    with pytest.raises(DirectoryFull, match=r"99999 bytes, and may have 100000: move some away"):
        made.make_room(1)
    old.unlink()
    made.make_room(1)
    new = made.create("new")
    made.append(new, b"x")
    assert made.used == new.size
    made.discard(new)
    assert made.used == 0


def test_what_another_agent_writes_is_seen_before_a_new_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "MEASURE", 0.0)
    made = spool(tmp_path)
    (made.directory / ("others" + ENDING)).write_bytes(bytes(100_000))
    with pytest.raises(DirectoryFull):
        made.create("new")


def test_a_file_that_is_removed_during_a_measure_is_taken_off_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bucket's thread removes it while the recorder's thread counts."""
    made = spool(tmp_path)
    for name in ("one", "two"):
        (made.directory / (name + ENDING)).write_bytes(bytes(1000))
    removal = threading.Thread(target=made.remove, args=(made.directory / ("one" + ENDING), 1000))
    size = spool_module._size

    def meanwhile(path: Path) -> int:
        if removal.ident is None:
            removal.start()
            removal.join(0.05)
        return size(path)

    monkeypatch.setattr(spool_module, "_size", meanwhile)
    made.measure()
    removal.join()
    assert made.used == 1000


def test_what_a_killed_agent_left_is_finished_and_says_that_it_broke_off(tmp_path: Path) -> None:
    made = spool(tmp_path)
    left, alive = made.create("left"), made.create("alive")
    left.append(b'{"version":3}\n[1,"o","a"]\n')
    os.close(left._descriptor)
    (made.directory / f"other{PART}").touch()
    (found,) = recovered(made)
    path = made.directory / found.name
    assert (found.sha256, found.size) == sha256_of(path)
    reader = CastReader()
    assert list(reader.events([text_of(path)])) == [(1.0, "o", b"a"), (0.0, "m", BROKEN_OFF.encode())]
    assert not reader.ended
    assert [one.name for one in made.finished()] == ["left" + ENDING]
    assert recovered(made) == []
    published(alive)


def test_a_file_that_cannot_be_finished_holds_up_no_other(tmp_path: Path) -> None:
    made = spool(tmp_path)
    (made.directory / ("a" + ENDING + PART)).mkdir()
    os.close(made.create("b")._descriptor)
    assert [one.name for one in recovered(made)] == ["b" + ENDING]
    assert made.unfinished == 1


def test_a_whole_file_without_a_record_is_finished_as_it_is(tmp_path: Path) -> None:
    """A killed agent had no time to record it: it is not said to have broken off."""
    made = spool(tmp_path)
    whole = made.create("whole")
    whole.append(b"text")
    wanted = whole.finish()
    os.close(whole._descriptor)
    assert recovered(made) == [wanted]
    assert text_of(made.directory / wanted.name) == b"text"


def test_a_full_disk_takes_no_mark_and_the_file_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = spool(tmp_path)
    left = made.create("left")
    left.append(b"text")
    os.close(left._descriptor)

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        (found,) = recovered(made)
    assert (found.sha256, found.size) == sha256_of(made.directory / found.name)
    assert text_of(made.directory / found.name) == b"text"

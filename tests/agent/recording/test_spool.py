"""The directory of recordings has a bound, and what a killed agent left in it is finished."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from arcbridge.agent.recording.cast import BROKEN_OFF, CastReader
from arcbridge.agent.recording.sealed_file import ENDING, PART, sha256_of
from arcbridge.agent.recording.spool import DirectoryFull, Spool
from arcbridge.errors import ConfigError

from .keys import RECIPIENTS, text_of


def spool(directory: Path, most: int = 100_000) -> Spool:
    return Spool(directory / "recordings", most, RECIPIENTS)


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
    made.create("new").discard()
    assert made.used == 0


def test_what_a_killed_agent_left_is_finished_and_says_that_it_broke_off(tmp_path: Path) -> None:
    made = spool(tmp_path)
    left, alive = made.create("left"), made.create("alive")
    left.append(b'{"version":3}\n[1,"o","a"]\n')
    os.close(left._descriptor)
    (made.directory / f"other{PART}").touch()
    (found,) = made.recover()
    path = made.directory / found.name
    assert (found.sha256, found.size) == sha256_of(path)
    reader = CastReader()
    assert list(reader.events([text_of(path)])) == [(1.0, "o", b"a"), (0.0, "m", BROKEN_OFF.encode())]
    assert not reader.ended
    assert [one.name for one in made.finished()] == ["left" + ENDING]
    assert list(made.recover()) == []
    alive.finish()


def test_a_file_that_cannot_be_finished_holds_up_no_other(tmp_path: Path) -> None:
    made = spool(tmp_path)
    (made.directory / ("a" + ENDING + PART)).mkdir()
    os.close(made.create("b")._descriptor)
    assert [one.name for one in made.recover()] == ["b" + ENDING]

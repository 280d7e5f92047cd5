"""A log that its role renames and removes itself, as in a pod."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from arcbridge.audit import rotation as module
from arcbridge.audit import writer as writing
from arcbridge.audit.chain import Head
from arcbridge.audit.rotation import FileRotation, RotationBounds
from arcbridge.audit.verify import verify
from arcbridge.audit.writer import AuditWriter
from tests.support.reports import until

HEAD = Head("0123456789abcdef", 7, "")


def test_a_file_is_renamed_at_its_size_and_the_chain_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "RETRY", 0.0)
    path = tmp_path / "audit.jsonl"
    writer = AuditWriter(str(path), rotation=FileRotation(RotationBounds(rotate=2000, keep=1 << 20)))
    for number in range(100):
        told: list[str] = []
        assert writer.put(f'{{"ts":"2026-11-29T00:00:00.000Z","n":{number}}}', told.append)
        until(lambda told=told: told, "it is written")
        assert told == [""]
    writer.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) > 4
    assert max(file.stat().st_size for file in files) < 2000 + 600
    report = verify(files)
    assert report.ok, report.findings
    text = "".join(file.read_text() for file in files)
    assert [f'"n":{number}}}' in text for number in range(100)] == [True] * 100


def test_a_name_is_one_that_audit_show_and_verify_find(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text("x" * 100)
    rotation = FileRotation(RotationBounds(rotate=100, keep=1000))
    rotation.rename(str(path), 99, HEAD)
    assert path.exists()
    rotation.rename(str(path), 100, HEAD)
    assert not path.exists()
    (found,) = module.with_rotated(path)[:-1]
    assert found.read_text() == "x" * 100


def files(directory: Path, count: int, size: int) -> list[Path]:
    """Renamed files, the oldest first, a minute apart."""
    made = []
    for number in range(count):
        path = directory / f"audit.jsonl-20261129T00{number:02}00Z-0123456789abcdef"
        path.write_bytes(b"x" * size)
        os.utime(path, (time.time() - 60 * (count - number),) * 2)
        made.append(path)
    return made


def test_the_oldest_are_removed_above_the_bound_once_they_are_counted(tmp_path: Path) -> None:
    made = files(tmp_path, 5, 1000)
    asked: list[list[Path]] = []

    def lost(removed: Iterable[Path]) -> list[str]:
        asked.append(list(removed))
        assert all(path.exists() for path in made), "they are counted before they go"
        return ["counted"]

    rotation = FileRotation(RotationBounds(rotate=1000, keep=2500), lost)
    doomed, lines = rotation.surplus(str(tmp_path / "audit.jsonl"))
    assert (sorted(doomed), lines) == (made[:3], ["counted"])
    rotation.remove(doomed)
    assert [path.exists() for path in made] == [False] * 3 + [True] * 2
    assert rotation.surplus(str(tmp_path / "audit.jsonl")) == ([], []), "it looks once in ten minutes"
    assert len(asked) == 1


def test_age_and_names_of_others(tmp_path: Path) -> None:
    made = files(tmp_path, 4, 10)
    others = [tmp_path / name for name in ("audit.jsonl", "audit.jsonl.1", "audit.jsonl-20261129", "x-audit.jsonl")]
    for other in others:
        other.write_text("y" * 10000)
        os.utime(other, (0, 0))
    bounds = RotationBounds(rotate=1000, keep=100000, age=150)
    doomed, _ = FileRotation(bounds).surplus(str(tmp_path / "audit.jsonl"))
    assert sorted(doomed) == made[:2], "logrotate's files are logrotate's to remove"
    assert FileRotation(RotationBounds()).surplus(str(tmp_path / "audit.jsonl")) == ([], [])


def test_what_cannot_be_renamed_or_counted_stays(tmp_path: Path) -> None:
    rotation = FileRotation(RotationBounds(rotate=1, keep=1))
    rotation.rename(str(tmp_path / "gone"), 5, HEAD)
    made = files(tmp_path, 2, 1000)

    def unreadable(_: Iterable[Path]) -> list[str]:
        raise PermissionError(13, "Permission denied")

    assert FileRotation(RotationBounds(1, 1), unreadable).surplus(str(tmp_path / "audit.jsonl")) == ([], [])
    assert all(path.exists() for path in made)
    rotation.remove([tmp_path / "gone", *made])
    assert not any(path.exists() for path in made)

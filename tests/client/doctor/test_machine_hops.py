"""This machine's directories and background process; `tests/e2e/test_doctor.py` has real faults."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.background import caller
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.doctor import machine_hops
from arcbridge.client.doctor.machine_hops import look_at_background, look_at_directories
from tests.client.background.conftest import place
from tests.client.background.test_caller import answering, listener
from tests.client.doctor.test_relay_hops import verdict

__all__ = ["listener", "place"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path)}


def test_directories_that_are_not_there_yet(environment: dict[str, str], tmp_path: Path) -> None:
    found = look_at_directories(None, environment)
    assert verdict(found) == ("ok", "")
    assert str(tmp_path / ".local/state/arcbridge") in found.detail
    assert list(tmp_path.iterdir()) == [], "nothing is made"


def test_a_file_in_the_place_of_a_directory(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".cache").write_text("")
    found = look_at_directories(None, environment)
    assert verdict(found) == ("failed", "state_directory")
    assert f"{tmp_path / '.cache'} is a file" in found.detail


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_that_others_can_change(environment: dict[str, str], tmp_path: Path, mode: int) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(mode)
    expected = ("failed", "state_directory") if mode == 0o777 else ("warning", "state_open")
    assert verdict(look_at_directories(tmp_path / "mine", environment)) == expected


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, "disk_full"), (errno.EDQUOT, "disk_full"), (errno.EROFS, "state_directory")]
)
def test_a_disk_that_takes_nothing(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def refuse(**_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = look_at_directories(None, environment)
    assert verdict(found) == ("failed", code)
    assert os.strerror(number).lower() in found.detail


def test_a_disk_that_is_almost_full(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert verdict(look_at_directories(None, environment)) == ("warning", "disk_full")


class TestBackground:
    """What the process answers."""

    @pytest.fixture(autouse=True)
    def found(self, place: BackgroundPaths, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine_hops.BackgroundPaths, "find", lambda environment: place)
        monkeypatch.setattr(caller, "SILENCE", 0.1)

    def test_none_runs(self) -> None:
        assert verdict(look_at_background({}, "")) == ("skipped", "")

    @pytest.mark.parametrize(
        ("answer", "expected", "words"),
        [
            (b'{"process":{"pid":7},"clusters":[]}\n', ("ok", ""), "pid 7, serves 0 clusters"),
            (
                b'{"process":{"pid":7},"clusters":[{"name":"prod","reason":"no\\u001b agent"}]}\n',
                ("ok", ""),
                "pid 7, serves 1 cluster; prod there: no",
            ),
            (b'{"error":"x","code":"version","version":"9.9"}\n', ("ok", ""), "version 9.9; the next command"),
            (b'{"error":"odd","exit_code":1}\n', ("failed", "background"), "odd"),
            (b"[]\n", ("failed", "background"), "cannot be read"),
        ],
    )
    def test_it_answers(self, listener: Any, answer: bytes, expected: tuple[str, str], words: str) -> None:
        answering(listener, answer)
        found = look_at_background({}, "prod")
        assert verdict(found) == expected
        assert found.detail.startswith(words) or words in found.detail
        assert "\x1b" not in found.detail

    def test_it_does_not_answer(self, listener: Any) -> None:
        found = look_at_background({}, "")
        assert verdict(found) == ("failed", "background_silent")
        assert "arcbridge stop" in found.remedy

"""Compared with platformdirs, which knows where each system keeps what."""

from __future__ import annotations

from pathlib import Path

import platformdirs.macos
import platformdirs.unix
import platformdirs.windows
import pytest

from arcbridge.settings.user_directories import shared_settings, user_directory

HOME = {"HOME": "/home/alice", "USERPROFILE": "/home/alice", "LOCALAPPDATA": "/home/alice/AppData/Local"}
KINDS = ("config", "state", "cache")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("CONFIG", "STATE", "CACHE"):
        monkeypatch.delenv(f"XDG_{kind}_HOME", raising=False)
    for name, value in HOME.items():
        monkeypatch.setenv(name, value)
    # It asks Windows itself otherwise.
    monkeypatch.setattr(platformdirs.windows, "get_win_folder", platformdirs.windows.get_win_folder_from_env_vars)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("platform", "convention"),
    [
        ("linux", platformdirs.unix.Unix),
        ("freebsd14", platformdirs.unix.Unix),
        ("darwin", platformdirs.macos.MacOS),
        ("win32", platformdirs.windows.Windows),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_conventions_of_each_system(kind: str, platform: str, convention: type[platformdirs.unix.Unix]) -> None:
    expected = getattr(convention("arcbridge", appauthor=False), f"user_{kind}_path")
    assert user_directory(kind, HOME, platform) == expected


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_xdg_counts_everywhere_where_it_is_absolute(platform: str) -> None:
    environment = {**HOME, "XDG_STATE_HOME": "/elsewhere", "XDG_CACHE_HOME": "relative"}
    assert user_directory("state", environment, platform) == Path("/elsewhere/arcbridge")
    assert user_directory("cache", environment, platform) == user_directory("cache", HOME, platform)


def test_settings_of_all_users() -> None:
    assert shared_settings({}, "linux") == Path("/etc/arcbridge")
    assert shared_settings({"PROGRAMDATA": "/pd"}, "win32") == Path("/pd/arcbridge")

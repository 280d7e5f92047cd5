"""Finds a user's settings, state and cache on each system: the conventions of platformdirs, without importing it.

Linux and others: the XDG Base Directory Specification. macOS: `~/Library`. Windows: `%LOCALAPPDATA%`. The XDG variables
count on each of them where they hold an absolute path. `tests/settings/test_user_directories.py` compares with
platformdirs.
"""

from __future__ import annotations

import sys
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

    Kind = Literal["config", "state", "cache"]

_NAME = "arcbridge"
_XDG = {
    "config": ("XDG_CONFIG_HOME", ".config"),
    "state": ("XDG_STATE_HOME", ".local/state"),
    "cache": ("XDG_CACHE_HOME", ".cache"),
}
_MACOS = {"config": "Library/Application Support", "state": "Library/Application Support", "cache": "Library/Caches"}


def user_directory(kind: Kind, environment: Mapping[str, str], platform: str = sys.platform) -> Path:
    """Return this user's directory of arcbridge for settings, state or cache; it need not be there."""
    variable, default = _XDG[kind]
    # Relative paths there are to be ignored (XDG Base Directory Specification).
    if Path(named := environment.get(variable, "")).is_absolute():
        return Path(named) / _NAME
    home = Path(environment.get("USERPROFILE" if platform == "win32" else "HOME") or "~").expanduser()
    if platform == "win32":
        local = Path(environment.get("LOCALAPPDATA") or home / "AppData" / "Local") / _NAME
        return local / "Cache" if kind == "cache" else local
    if platform == "darwin":
        return home / _MACOS[kind] / _NAME
    return home / default / _NAME


def shared_settings(environment: Mapping[str, str], platform: str = sys.platform) -> Path:
    """Return the directory of settings for all users of this machine."""
    if platform == "win32":
        return Path(environment.get("PROGRAMDATA") or "C:/ProgramData") / _NAME
    return Path("/etc") / _NAME

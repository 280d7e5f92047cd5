"""Settings that another user of a Windows machine has planted; the system's functions are simulated there alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge.errors import ConfigError
from arcbridge.settings.windows_owner import ADMINISTRATORS, TRUSTED, refuse_foreign_settings
from tests.support.windows import OWN_SID

STRANGER = "S-1-5-21-1-2-3-1001"
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("owner", [*TRUSTED, OWN_SID])
def test_administrators_the_system_and_this_user_are_trusted(owner: str, tmp_path: Path) -> None:
    refuse_foreign_settings(tmp_path / "client.toml", owner_of=lambda path: owner, own=lambda: OWN_SID)


@pytest.mark.parametrize("planted", ["file", "directory"])
def test_another_user_s_file_or_directory_is_refused(planted: str, tmp_path: Path) -> None:
    file = tmp_path / "arcbridge" / "client.toml"
    path = file if planted == "file" else file.parent

    def owner_of(asked: str) -> str:
        return STRANGER if asked == str(path) else ADMINISTRATORS

    with pytest.raises(ConfigError) as caught:
        refuse_foreign_settings(file, owner_of=owner_of, own=lambda: OWN_SID)
    assert caught.value.message.startswith(f"{path} belongs to {STRANGER}, who is neither you nor the administrators")
    assert f'icacls "{path}" /setowner *{ADMINISTRATORS}' in caught.value.message


def test_an_owner_that_cannot_be_told_is_not_trusted(tmp_path: Path) -> None:
    def owner_of(path: str) -> str:
        raise OSError(5, "Access is denied")

    with pytest.raises(ConfigError, match=r"cannot tell to whom .* so it is not used: Access is denied"):
        refuse_foreign_settings(tmp_path / "client.toml", owner_of=owner_of, own=lambda: OWN_SID)


@pytest.mark.parametrize(("owner", "code"), [(ADMINISTRATORS, 0), (OWN_SID, 0), (STRANGER, 2), ("", 2)])
def test_w15_settings_for_all_users_on_a_simulated_windows(owner: str, code: int, tmp_path: Path) -> None:
    """The whole way, by the calls that Windows has, through the command line. Without an owner the system fails."""
    shared, home = tmp_path / "ProgramData", tmp_path / "alice"
    (shared / "arcbridge").mkdir(parents=True)
    (shared / "arcbridge" / "client.toml").write_text('relay = "https://relay.example.org"\n')
    env = {
        "PATH": os.environ["PATH"],
        "USERPROFILE": str(home),
        "LOCALAPPDATA": str(home / "local"),
        "PROGRAMDATA": str(shared),
        "SIMULATED_OWNER": owner,
    }
    command = [sys.executable, "-m", "tests.support.windows", "arcbridge", "whoami", "-o", "json"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    if code:
        assert done.returncode == code
        assert done.stdout == ""
        assert f"error: {'cannot tell to whom' if not owner else shared / 'arcbridge'}" in done.stderr
    else:
        assert "belongs to" not in done.stderr
        assert "relay.example.org" in done.stdout + done.stderr

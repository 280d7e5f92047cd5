"""Where the settings of a role come from; what the command line adds to it is in tests/cli/test_settings.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_w15_settings_for_all_users_are_refused_on_a_simulated_windows(tmp_path: Path) -> None:
    """Through the command line: every user may make files in that directory (docs/threats.md#W15)."""
    shared, home = tmp_path / "ProgramData" / "arcbridge", tmp_path / "alice"
    shared.mkdir(parents=True)
    (shared / "client.toml").write_text('relay = "https://relay.example.org"\n')
    env = {
        "PATH": os.environ["PATH"],
        "USERPROFILE": str(home),
        "LOCALAPPDATA": str(home / "local"),
        "PROGRAMDATA": str(shared.parent),
    }
    command = [sys.executable, "-m", "tests.support.windows", "arcbridge", "whoami", "-o", "json"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)

    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {shared / 'client.toml'} is not used: every user of this machine may put")
    # The user's own settings, or those that are named, are taken all the same.
    env["ARCBRIDGE_CONFIG"] = str(shared / "client.toml")
    done = run()
    assert "is not used" not in done.stderr
    assert "relay.example.org" in done.stdout + done.stderr

"""The herd in its small form: a real relay process dies, and every light agent is back at the next one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(300)
def test_all_are_back_after_their_relay_was_killed(tmp_path: Path) -> None:
    out = tmp_path / "herd.json"
    argv = [sys.executable, "-m", "bench.herd", "--agents", "60", "--seconds", "60", "--out", str(out)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert out.exists(), done.stderr
    result = json.loads(out.read_text())
    assert "100" in result["back_after_kill_s"], result
    assert result["came_before_the_hint"] == 0
    assert result["attempts_ended"]["lost"] == 60
    assert set(result["attempts_ended"]) <= {"lost", "nobody_listens", "turned_away", "timeout", "limit"}
    if result["own_network_namespace"]:
        assert result["kernel"]["ListenOverflows"] == 0
    assert result["command"].startswith("python -m bench.herd --agents 60")

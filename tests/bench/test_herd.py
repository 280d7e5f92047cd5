"""The herd in its small form: real relay processes die, and every light agent is back; users join meanwhile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def herd(out: Path, *words: str) -> dict[str, Any]:
    argv = [sys.executable, "-m", "bench.herd", *words, "--agents", "60", "--seconds", "60", "--out", str(out)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert out.exists(), done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    assert "100" in result["back_after_kill_s"], result
    assert set(result["attempts_ended"]) <= {"nobody_listens", "turned_away", "timeout"}
    assert result["kernel"]["ListenOverflows"] == 0 or not result["own_network_namespace"]
    return result


@pytest.mark.timeout(300)
def test_all_are_back_after_their_relay_was_killed_and_started_again(tmp_path: Path) -> None:
    result = herd(tmp_path / "herd.json", "all", "--relays", "1")
    assert result["lost"] == 60
    assert result["kib_of_a_connection"] > 0
    assert result["relay_cpu_ms_per_agent"] > 0
    assert result["command"].startswith("python -m bench.herd all --relays 1 --agents 60")


@pytest.mark.timeout(300)
def test_the_agents_of_one_relay_go_to_another_and_users_join_there(tmp_path: Path) -> None:
    result = herd(tmp_path / "herd.json", "one", "--relays", "2")
    assert 0 < result["lost"] < 60
    assert result["joins"]["meanwhile"]["joins"] > 0
    assert result["goals"]["no_join_refused"], result["joins"]

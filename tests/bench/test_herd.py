"""The herd in its small form: a real relay process dies, and every light agent is back at the next one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.herd.agents import MAX_AGENTS, Herd, orders_of

ROOT = Path(__file__).resolve().parents[2]
ORDERS = {
    "host": "127.0.0.1",
    "port": 1,
    "relay_ca": "",
    "certificate": "",
    "key": "",
    "cluster_ca": "",
    "agents": 1,
    "sources": 1,
    "ramp": 0.0,
}


@pytest.mark.parametrize("change", [{"host": "192.0.2.1"}, {"host": "0.0.0.0"}, {"agents": MAX_AGENTS + 1}])
def test_it_goes_to_loopback_and_is_bounded(change: dict[str, object]) -> None:
    with pytest.raises(SystemExit, match="loopback only"):
        Herd(orders_of(json.dumps({**ORDERS, **change})))


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

"""The hostile bench: what it makes of calls, and once in short with real processes. How fast anything is stays out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.hostile import run
from bench.hostile.attacks import ATTACKS
from bench.hostile.watch import Watch
from tests.support import pages
from tests.support.cluster import Unavailable, binaries
from tests.support.processes import require_or_skip

ROOT = Path(__file__).resolve().parents[2]


def call(kind: str, begun: float, took: float, how: str = "ok") -> str:
    return f"{kind}\t{begun:.6f}\t{took:.3f}\t{how}"


def looked(*idle: tuple[float, float, float]) -> Watch:
    """A watch that has found these shares of the cores idle, each from when until when."""
    watch = Watch({})
    watch._idle.extend(idle)
    return watch


def test_calls_count_for_the_phase_in_which_they_began() -> None:
    lines = [
        "ready",
        call("get", 0.5, 1000.0),  # before the honest were alone
        *(call("get", 1.0 + n / 1000, float(n + 1)) for n in range(200)),
        *(call("get", 2.0 + n / 1000, 2.0 * (n + 1)) for n in range(100)),
        call("get", 2.5, 3.0, "join OVERLOADED"),
        call("get", 3.5, 1000.0, "join OVERLOADED"),  # after the attack
    ]
    found = run._honest("\n".join(lines), 1.0, 2.0, 3.0, looked((2.0, 2.05, 0.0)))["get"]
    assert found["alone"] == {
        "calls": 200, "p50_ms": 100.0, "p99_ms": 198.0, "max_ms": 200.0, "refused": 0, "refused_as": {}
    }  # fmt: skip
    assert found["attack"]["calls"] == 101
    assert found["attack"]["p99_ms"] == 198.0
    assert found["attack"]["refused_as"] == {"join OVERLOADED": 1}
    assert found["p99_ratio"] == 1.0
    assert found["attack"]["slow"] == {"calls": 0, "began_s": [], "on_a_full_machine": 0}


def test_an_attacker_leaves_the_cores_to_processes_of_other_sessions() -> None:
    """`nice` alone counts within a session, and each process of a run leads one."""
    program = (
        "import os; from bench.hostile import attacker; attacker.lower_priority(); "
        "print(os.nice(0), attacker.AUTOGROUP.read_text() if attacker.AUTOGROUP.exists() else 'nice 10')"
    )
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert done.stdout.startswith("10 "), done.stderr
    assert "nice 10" in done.stdout


def test_the_readme_has_a_row_for_each_attack() -> None:
    text = pages.read(ROOT / "bench" / "README.md")
    assert [name for name in ATTACKS if f"| `{name}` |" not in text] == []


@pytest.mark.timeout(300)
def test_an_attack_beside_honest_callers(tmp_path: Path) -> None:
    try:
        binaries()
    except Unavailable as error:
        require_or_skip("apiserver", str(error))
    out = tmp_path / "result.json"
    argv = [sys.executable, "-m", "bench.hostile", "--only", "targets", "--short", "--json", str(out)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["attacks"]["targets"]
    assert {kind for kind, told in found["honest"].items() if told["alone"]["calls"]} >= {"get", "session", "resume"}
    assert found["roles"]["agent"]["rss_mib"]["peak"] > 0
    assert found["roles"]["attacker"]["cpu_cores"]["attack"] > 0
    assert found["roles"]["attacker"]["waited_cores"]["attack"] > 0
    assert found["roles"]["relay"]["descriptors"]["after"] > 0
    assert found["audit"]["records"]["honest"] > 0
    assert found["attacker_got"]["session"] >= 1
    assert found["attacker_got"]["opened"] > 0

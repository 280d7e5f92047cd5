"""The hostile bench: what it makes of calls, and once in short with real processes. How fast anything is stays out."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arcbridge.errors import JoinRefused, SessionEnded, StreamReset, Unreachable
from arcbridge.net.join import JoinCode
from arcbridge.wire.frames import GoawayCode, ResetCode
from bench.hostile import run
from bench.hostile.attacks import ATTACKS
from bench.hostile.place import Person, Place, word
from bench.hostile.watch import Watch
from tests.support import pages
from tests.support.cluster import Unavailable, binaries
from tests.support.processes import require_or_skip

ROOT = Path(__file__).resolve().parents[2]
PLACE = Place(relay_port=1, relay_ca="", cluster="c", people=(Person("honest-0", "access", "cluster"),))


@pytest.mark.parametrize("host", ["192.0.2.1", "0.0.0.0", "::"])
def test_it_goes_to_loopback_alone(host: str) -> None:
    with pytest.raises(SystemExit, match="loopback alone"):
        dataclasses.replace(PLACE, host=host)


def test_a_place_survives_its_line_and_shows_no_secret() -> None:
    assert Place.of(PLACE.line()) == PLACE
    assert "access" not in repr(PLACE)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (JoinRefused(JoinCode.OVERLOADED, "full"), "join OVERLOADED"),
        (SessionEnded(GoawayCode.LIMIT, "flood"), "GOAWAY LIMIT"),
        (StreamReset(ResetCode.IDLE), "RESET IDLE"),
        (TimeoutError(), "no answer in time"),
        (Unreachable("away"), "Unreachable"),
        (ConnectionResetError(), "ConnectionResetError"),
    ],
)
def test_refusals_are_counted_by_their_codes(error: BaseException, expected: str) -> None:
    assert word(error) == expected


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


def test_slow_calls_are_told_apart_by_whether_a_core_was_idle() -> None:
    lines = [
        *(call("get", 1.0 + n / 1000, 10.0) for n in range(200)),
        *(call("get", 2.1 + n / 10, 21.0) for n in range(3)),
        call("get", 2.5, 20.0),
    ]
    watch = looked((2.0, 2.11, 0.5), (2.11, 2.2, 0.05), (2.2, 2.9, 0.4))
    assert run._honest("\n".join(lines), 1.0, 2.0, 3.0, watch)["get"]["attack"]["slow"] == {
        "calls": 3, "began_s": [0.1, 0.2, 0.3], "on_a_full_machine": 1
    }  # fmt: skip
    assert watch.idle(2.0, 3.0) == {"mean": 0.377, "least": 0.05}


def honest(calls: int, ratio: float, refused: int) -> dict[str, Any]:
    return {"alone": {"calls": calls}, "attack": {"refused": refused}, "p99_ratio": ratio}


def test_goals_are_no_refusal_and_twice_the_p99_of_what_was_called_often() -> None:
    good = {"honest": {"get": honest(500, 1.9, 0), "session": honest(40, 9.0, 0)}}
    assert run.goals(good) == {"no_honest_refusals": True, "p99_within_twice": True}
    bad = {"honest": {"get": honest(500, 2.1, 0), "session": honest(40, 1.0, 1)}}
    assert run.goals(bad) == {"no_honest_refusals": False, "p99_within_twice": False}
    none_came_through = {"alone": {"calls": 500}, "attack": {"refused": 400}}
    assert not run.goals({"honest": {"get": none_came_through}})["p99_within_twice"]


def test_records_are_told_apart_by_whose_they_are(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    before = '{"event":"audit","user":"hostile-1@example.com","outcome":"cut"}\n'
    log.write_text(
        before
        + '{"event":"audit","user":"alice@example.com","outcome":"answered"}\n'
        + '{"event":"audit","user":"hostile-0@example.com","outcome":"refused"}\n' * 2
        + '{"event":"audit","user":"hos'
    )
    found = run._audit(log, len(before))
    assert found["records"] == {"honest": 1, "hostile": 2}
    assert found["hostile_outcomes"] == {"refused": 2}


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
    assert found["roles"]["relay"]["descriptors"]["after"] > 0
    assert found["audit"]["records"]["honest"] > 0
    assert found["attacker_got"]["session"] >= 1
    assert found["attacker_got"]["opened"] > 0

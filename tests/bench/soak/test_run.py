"""The soak with real processes, in short: its accounts add up, and nothing is left of it. Times are not judged here."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from bench.machine import REPOSITORY
from bench.soak.__main__ import main
from bench.usage import with_descendants
from tests.support.processes import ManagedProcess

SUMMARY = {
    "opened", "completed", "failed", "resumed", "relay_kills", "bytes_lost", "bytes_doubled", "bytes_wrong",
    "stall_p50_s", "stall_p99_s", "stall_max_s", "duration_s", "bytes_up", "bytes_down", "commit", "machine",
    "command", "started", "reasons",
}  # fmt: skip


@pytest.mark.timeout(300)
def test_relays_die_and_no_byte_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    short = ["--duration=14", "--every=5", "--streams=20", "--clients=3", "--kills=2", "--patience=40"]
    status = main([*short, "--out", str(out), "--keep", str(tmp_path / "kept")])
    printed = capsys.readouterr()
    told = f"{printed.out[-3000:]}\n{printed.err[-3000:]}"
    result = json.loads(printed.out.splitlines()[-1])
    assert result.keys() >= SUMMARY
    kills = result["relay_kills"]
    assert kills in (1, 2), "a slow machine has no time for the second one"
    assert result["opened"] == result["completed"] + result["failed"]
    assert result["opened"] >= 20
    assert result["failed"] == sum(result["reasons"].values())
    assert (result["bytes_lost"], result["bytes_doubled"], result["bytes_wrong"]) == (0, 0, 0), told
    assert (status, result["failed"]) == (0, 0), told
    assert result["resumed"] >= (3 if kills == 2 else 1), "two kills hit each session, by one relay or the other"
    assert min(result["bytes_up"], result["bytes_down"]) > 0
    details = json.loads(out.read_text())
    assert details.items() >= result.items()
    assert [kill["relay"] for kill in details["kills"]] == [0, 1][:kills]
    assert result["stalls"] == sum(kill["streams_hit"] for kill in details["kills"]) > 0


def test_interrupted_it_leaves_nothing_behind(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "bench.soak", "--duration", "100", "--streams", "2", "--clients", "1"]
    kept = tmp_path / "kept"
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))}
    with ManagedProcess([*argv, "--keep", str(kept)], log_dir=tmp_path, name="soak", env=environment) as process:
        process.wait_for_line("under load", timeout=60)
        running = with_descendants(process.pid)
        assert len(running) >= 7, "itself, two relays, an agent, a client, the target, the load"
        process.signal(signal.SIGTERM)
        assert process.wait(60) == 130
        assert [pid for pid in running if Path(f"/proc/{pid}").exists()] == []
    assert "{" not in process.output("stdout"), "no result of what was not finished"

"""A process that serves is alive until it ends, however it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig
from arcbridge.client.kubeconfig.running import BACKGROUND, Running, repair_kubeconfigs, running_of
from arcbridge.client.state import StateDirectory
from arcbridge.pki.private_files import ensure_private_directory, try_lock

CODE = """
import sys
from pathlib import Path
from arcbridge.client.kubeconfig.running import Running
print(Running(Path(sys.argv[1])).begin(), flush=True)
sys.stdin.read()
"""


def test_it_is_alive_until_it_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, str(tmp_path / "running")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        running = Running(tmp_path / "running")
        assert running.alive(name)
        process.kill()
        process.wait()
        assert not running.alive(name)
    assert list((tmp_path / "running").iterdir()) == []


def test_it_knows_itself_and_ends(tmp_path: Path) -> None:
    running = Running(tmp_path / "running")
    name = running.begin()
    assert running.begin() == name
    assert running.alive(name)
    assert Running(tmp_path / "running").alive(name)
    running.end()
    assert not running.alive(name)
    running.end()


def test_a_name_of_a_kubeconfig_leads_nowhere_else(tmp_path: Path) -> None:
    held = tmp_path / "secret"
    ensure_private_directory(tmp_path / "running")
    descriptor = try_lock(held)
    assert descriptor is not None
    assert not Running(tmp_path / "running").alive("../secret")
    assert held.exists()


def test_the_background_process_has_a_lock_of_its_own(tmp_path: Path) -> None:
    lock = tmp_path / "process.lock"
    running = Running(tmp_path / "running", lock)
    assert not running.alive(BACKGROUND)
    assert not Running(tmp_path / "running").alive(BACKGROUND)
    descriptor = try_lock(lock)
    assert descriptor is not None
    assert running.alive(BACKGROUND)


def test_each_file_is_repaired_and_one_without_entries_of_ours_is_forgotten(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state", tmp_path / "cache")
    running = running_of(state, {"HOME": str(tmp_path)})
    mine, gone, damaged = tmp_path / "mine", tmp_path / "gone", tmp_path / "damaged"
    for file, process in ((mine, running.begin()), (gone, "999-killed")):
        entry = Entry("prod", "prod", "https://127.0.0.1:47011", "CA", "CERT", "KEY", process=process)
        Kubeconfig([file]).merge(entry, switch=True)
        state.add_kubeconfig([file])
    damaged.write_text("a: [")
    state.add_kubeconfig([damaged])
    state.add_kubeconfig([tmp_path / "absent"])
    assert repair_kubeconfigs(state, running) == ['what served context "prod" had ended; the kubeconfig says so now']
    assert yaml.safe_load(mine.read_text())["current-context"] == "prod"
    assert "current-context" not in yaml.safe_load(gone.read_text())
    assert state.kubeconfigs() == [[mine], [gone], [damaged]]


def test_a_look_at_what_serves_removes_nothing(tmp_path: Path) -> None:
    running = Running(tmp_path / "running")
    name = running.begin()
    others = [tmp_path / "running" / one for one in ("notes.txt", f"999-{'0' * 16}")]
    for other in others:
        other.write_text("mine")
    assert Running(tmp_path / "running").serving() == [name]
    assert all(other.read_text() == "mine" for other in others)

"""A process that serves is alive until it ends, however it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from arcbridge.client.kubeconfig.running import BACKGROUND, Running
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

"""Which process holds the lock: never one that has its id by chance, and none of another user's choice."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcbridge.client.background import lock_holder
from arcbridge.client.background.lock_holder import (
    Holder,
    end,
    holder_of,
    holder_to_end,
    is_held,
    is_working,
    sign,
    silence,
    unsign,
)
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.errors import StateError
from arcbridge.pki.private_files import try_lock
from tests.support.reports import until

HOLD = """
import os, signal, sys
from pathlib import Path
from arcbridge.client.background.lock_holder import sign
from arcbridge.pki.private_files import try_lock
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "next" in sys.argv:
    print("waits", flush=True)
while (lock := try_lock(Path(sys.argv[1]))) is None:
    pass
sign(lock)
print("held", flush=True)
while "busy" in sys.argv:
    pass
signal.pause()
"""


class Holding:
    """Starts processes that hold the lock."""

    def __init__(self, place: BackgroundPaths) -> None:
        self.place = place
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *how: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", HOLD, self.place.process_lock, *how]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == ("waits\n" if "next" in how else "held\n")
        return process

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait(10)
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture
def holding(place: BackgroundPaths) -> Iterator[Holding]:
    found = Holding(place)
    yield found
    found.end()


def test_none_holds_it(place: BackgroundPaths) -> None:
    assert not is_held(place)
    assert holder_of(place) is None
    assert holder_to_end(place) is None


def test_one_that_ends_by_sigterm(place: BackgroundPaths, holding: Holding) -> None:
    process = holding.start()
    holder = holder_of(place)
    assert holder is not None
    assert holder.pid == process.pid
    process.send_signal(signal.SIGSTOP)
    state = Path(f"/proc/{process.pid}/stat")
    until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", "it is suspended")
    assert f"(pid {process.pid}) does not answer since" in silence(place)
    assert f"`kill -CONT {process.pid}` lets it go on" in silence(place)
    assert not is_working(place)
    assert end(place, holder)
    assert process.wait(10) == -signal.SIGTERM


def test_the_next_process_gets_no_signal(place: BackgroundPaths, holding: Holding) -> None:
    """It waits for the lock whenever kubectl runs; the one before it has ended all the same."""
    process = holding.start()
    holder = holder_to_end(place)
    assert holder is not None
    following = holding.start("next")
    assert end(place, holder)
    assert process.wait(10) == -signal.SIGTERM
    until(lambda: getattr(holder_of(place), "pid", 0) == following.pid, "the next one holds the lock")
    assert end(place, holder, kill=True)
    assert following.poll() is None


def test_one_that_ends_by_sigkill_alone(
    place: BackgroundPaths, holding: Holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = holding.start("deaf", "busy")
    assert is_working(place)
    holder = holder_to_end(place)
    assert holder is not None
    monkeypatch.setattr(lock_holder, "END_TIMEOUT", 0.2)
    assert not end(place, holder)
    monkeypatch.setattr(lock_holder, "END_TIMEOUT", 10.0)
    assert end(place, holder, kill=True)
    assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize(("state", "working"), [("R", True), ("D", True), ("U", True), ("S", False), ("T", False)])
def test_one_that_waits_for_a_disk_does_not_hang(
    place: BackgroundPaths, holding: Holding, monkeypatch: pytest.MonkeyPatch, state: str, working: bool
) -> None:
    """As it syncs a file while other programs fill the disk."""
    holding.start()
    monkeypatch.setattr(lock_holder, "_state_of", lambda pid: state)
    assert is_working(place) is working


@pytest.mark.parametrize("signed", ["", "{pid} 1\n", "{pid}\n", "x y\n", "999999999 1\n"])
def test_no_signal_goes_to_a_process_that_is_not_the_one(place: BackgroundPaths, holding: Holding, signed: str) -> None:
    """The file names one that has the id of the holder and began at another time, none, or one that is gone."""
    other = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    try:
        process = holding.start()
        Path(place.process_lock).write_text(signed.format(pid=other.pid))
        assert holder_of(place) is None
        assert "(pid" not in silence(place)
        with pytest.raises(StateError, match="cannot be told, so none is ended"):
            holder_to_end(place)
        assert process.poll() is None
        assert other.poll() is None
    finally:
        other.kill()
        other.wait(10)


def test_a_process_that_ended_before_the_signal_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    other = subprocess.Popen([sys.executable, "-c", ""])
    holder = Holder(other.pid, "1")
    lock_holder._send(holder, signal.SIGKILL)  # another process has that id
    assert other.wait(10) == 0
    lock_holder._send(holder, signal.SIGKILL)


def test_what_is_signed_is_read_again(place: BackgroundPaths) -> None:
    lock = try_lock(Path(place.process_lock))
    assert lock is not None
    os.write(lock, b"a longer text of a former version, which goes\n")
    sign(lock)
    assert holder_of(place) == Holder(os.getpid(), lock_holder._start_of(os.getpid()))
    unsign(lock)
    assert holder_of(place) is None
    os.close(lock)


def test_a_full_disk_takes_the_signature_and_not_the_process(
    place: BackgroundPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    lock = try_lock(Path(place.process_lock))
    assert lock is not None
    monkeypatch.setattr(os, "pwrite", full)
    sign(lock)
    assert is_held(place)
    assert holder_of(place) is None
    os.close(lock)


def test_w16_a_process_of_another_user_gets_no_signal(
    place: BackgroundPaths, holding: Holding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/threats.md#W16: root who runs `stop` with the HOME of a user, who wrote the file."""
    holding.start()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    monkeypatch.setattr(lock_holder, "read_file", lambda path: path.read_bytes())
    assert holder_of(place) is None
    with pytest.raises(StateError, match="cannot be told, so none is ended"):
        holder_to_end(place)


@pytest.mark.skipif(not Path("/bin/ps").exists(), reason="there is no ps")
def test_a_system_without_proc(place: BackgroundPaths, holding: Holding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_holder, "_PROC", "/nonexistent")
    process = holding.start("busy")
    start = lock_holder._start_of(process.pid)
    assert start
    Path(place.process_lock).write_text(f"{process.pid} {start}\n")
    assert holder_of(place) == Holder(process.pid, start)
    assert is_working(place)
    process.send_signal(signal.SIGSTOP)
    until(lambda: lock_holder._state_of(process.pid) == "T", "it is suspended")
    assert "lets it go on" in silence(place)

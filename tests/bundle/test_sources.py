"""Sources that hang, fail, flood or may not be read: each costs itself, and a bundle is made all the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from arcbridge.bundle.contents import Contents
from arcbridge.bundle.sources import ENTRIES, ERRORS, FILE, TAIL, Collector, SourceFailed, listing, read_tail, versions
from arcbridge.errors import ConfigError
from tests.support.reports import until


def collect(
    *reads: Callable[[Collector], bytes], deadline: float = 60.0, budget: float = 60.0, without_names: bool = False
) -> tuple[dict[str, bytes], dict[str, str]]:
    collector = Collector(Contents(without_names=without_names))
    sources = {f"{number}": partial(read, collector) for number, read in enumerate(reads)}
    return collector.collect(sources, dict.fromkeys(sources, deadline), budget)


def fine(_: Collector) -> bytes:
    return b"{}"


def python(code: str) -> Callable[[Collector], bytes]:
    return lambda collector: collector.run([sys.executable, "-c", code], os.environ)[0]


def test_a_program_that_hangs_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    """Its child holds the pipe as well: as long as that lives, the pipe has no end."""
    note = tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(note)!r} + '.new', 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(note)!r} + '.new', {str(note)!r})\n"
        "time.sleep(600)\n"
    )

    collector = Collector(Contents(without_names=False))

    def interrupt() -> None:
        until(note.exists, "the program runs")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def first() -> bytes:
        threading.Thread(target=interrupt, daemon=True).start()
        return python(code)(collector)

    with pytest.raises(KeyboardInterrupt):
        collector.collect({"a": first}, {"a": 600.0}, budget=600.0)
    for pid in note.read_text().split():
        until(lambda p=pid: not _lives(int(p)), f"process {pid} has ended")


def test_what_a_program_leaves_behind_is_ended(tmp_path: Path) -> None:
    """The program has ended, and its child holds the pipe."""
    note = tmp_path / "pid"
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\n"
    )
    collector = Collector(Contents(without_names=False))

    def first() -> bytes:
        threading.Thread(target=interrupt, daemon=True).start()
        return python(code)(collector)

    def interrupt() -> None:
        until(lambda: note.exists() and note.read_text(), "the child runs")
        (program,) = collector._programs
        until(lambda: not _lives(program.pid), "the program has ended")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        collector.collect({"a": first}, {"a": 600.0}, budget=600.0)
    until(lambda: not _lives(int(note.read_text())), "its child has ended")


def test_a_source_that_was_given_up_starts_no_program() -> None:
    collector = Collector(Contents(without_names=False))
    given_up, failed = threading.Event(), threading.Event()

    def late() -> bytes:
        given_up.wait(600)
        try:
            return collector.run([sys.executable, "-c", "import time; time.sleep(600)"], os.environ)[0]
        except SourceFailed:
            failed.set()
            raise

    _, missing = collector.collect({"a": late, "b": late}, {"a": 0.1, "b": 0.1}, budget=0.1)
    assert set(missing) == {"a", "b"}
    assert missing["b"] == "no time was left for it"
    given_up.set()
    assert failed.wait(60)
    assert collector._programs == []


def test_a_program_that_the_kernel_keeps_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """In uninterruptible sleep: SIGKILL waits for the end of a system call."""
    real = subprocess.Popen.wait
    kept: list[subprocess.Popen[bytes]] = []

    def wait(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        assert timeout is not None, "it has no end"
        kept.append(self)
        raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    found, missing = collect(python("import time; time.sleep(600)"), fine, deadline=0.5)
    assert (set(found), set(missing)) == ({"1"}, {"0"})
    (program,) = kept
    assert real(program, 60) == -signal.SIGKILL


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def test_what_hangs_is_missing_and_what_follows_is_there() -> None:
    gone = threading.Event()

    def hang(_: Collector) -> bytes:
        gone.wait(600)  # as a read of a file server that is gone
        return b""

    try:
        found, missing = collect(python("import time; time.sleep(600)"), hang, deadline=0.3)
        assert (found, set(missing.values())) == ({}, {"no answer within 0 s"})
        found, missing = collect(fine, hang, fine, deadline=0.3)
        assert set(found) == {"0", "2"}
        began = time.monotonic()
        found, missing = collect(*[hang] * 20, deadline=60.0, budget=0.5)
        assert (len(missing), time.monotonic() - began < 30) == (20, True), "the budget is for all together"
    finally:
        gone.set()


def test_what_comes_on_standard_error_costs_no_document() -> None:
    """Neither more of it than a pipe has room for, nor a child that keeps it open."""
    more = "import os, sys; sys.stderr.write('x' * 1_000_000); sys.stderr.flush(); print('{}')"
    child = (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], stdout=subprocess.DEVNULL)\n"
        "print('{}')\n"
    )
    found, missing = collect(python(more), python(child), deadline=30.0)
    assert (found, missing) == ({"0": b"{}\n", "1": b"{}\n"}, {})


@pytest.mark.parametrize(
    ("ends", "said"), [("sys.exit(1)", "error: x\n"), ("sys.exit(0)", ""), ("os.kill(os.getpid(), 9)", "")]
)
def test_of_standard_error_the_end_is_kept_where_the_program_has_failed(ends: str, said: str) -> None:
    """What another program has said is not the reason why this one was killed."""
    code = f"import os, sys; sys.stderr.write('y' * 100_000 + '\\nerror: x\\n'); sys.stderr.flush(); {ends}"
    collector = Collector(Contents(without_names=False))
    errors: list[str] = []

    def read() -> bytes:
        output, end = collector.run([sys.executable, "-c", code], os.environ)
        errors.append(end)
        return output

    collector.collect({"a": read}, {})
    assert errors[0][-9:] == said
    assert len(errors[0]) == (ERRORS if said else 0)


def test_what_fails_says_why() -> None:
    def denied(_: Collector) -> bytes:
        raise PermissionError(13, "Permission denied", "/home/alice/x")

    def full(_: Collector) -> bytes:
        raise OSError(28, "No space left on device", "/home/alice/x")

    def refused(_: Collector) -> bytes:
        raise ConfigError("/home/alice/relay.toml: wrong")

    def slow(_: Collector) -> bytes:
        raise TimeoutError

    def far(_: Collector) -> bytes:
        raise TimeoutError(110, "Connection timed out")

    def nothing(_: Collector) -> bytes:
        raise SourceFailed("there is none")

    def defect(_: Collector) -> bytes:
        raise KeyError("alice")

    def large(_: Collector) -> bytes:
        return b"x" * (FILE + 1)

    def absent(collector: Collector) -> bytes:
        return collector.run(["/no/such/program"], {})[0]

    every = (denied, full, refused, nothing, defect, large, absent, python("print('x' * 20_000_000)"), fine, slow, far)
    found, missing = collect(*every)
    assert found == {"8": b"{}"}
    assert missing == {
        "0": "Permission denied",
        "1": "No space left on device",
        "2": "/home/alice/relay.toml: wrong",
        "3": "there is none",
        "4": "internal error (KeyError)",
        "5": "it has 4194305 bytes, more than the 4194304 of one file",
        "6": "No such file or directory",
        "7": "it writes more than 16777216 bytes",
        "9": "what it asks does not answer",
        "10": "Connection timed out",
    }
    _, missing = collect(*every, without_names=True)
    assert "alice" not in json.dumps(missing)


def test_of_a_file_and_of_a_pipe_the_end_is_read(tmp_path: Path) -> None:
    data = b"".join(b"%07d\n" % number for number in range(400_000))
    (tmp_path / "log").write_bytes(data)
    with (tmp_path / "log").open("rb", buffering=0) as file:
        assert read_tail(file) == data[-TAIL:]
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as pipe, open(writing, "wb") as end:
        writer = threading.Thread(target=lambda: (end.write(data), end.close()))
        writer.start()
        assert read_tail(pipe) == data[-TAIL:]
        writer.join()


def test_a_listing_opens_nothing_and_follows_no_link(tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "clusters").mkdir(parents=True, mode=0o700)
    (state / "ca.key").write_text("hunter2")
    (state / "ca.key").chmod(0o600)
    (state / "clusters" / "berlin@0123.json").write_text("hunter2" * 3)
    (state / "away").symlink_to("/etc")
    os.mkfifo(state / "pipe")
    found = {one["name"]: one for one in listing({"state": state}, Contents(without_names=False))}
    assert set(found) == {"", "away", "ca.key", "clusters", "clusters/berlin@0123.json", "pipe"}
    assert (found["ca.key"]["bytes"], found["ca.key"]["mode"]) == (7, "100600")
    assert found["clusters/berlin@0123.json"]["bytes"] == 21
    hidden = json.dumps(listing({"state": state}, Contents(without_names=True)))
    assert "berlin" not in hidden
    assert "hunter2" not in hidden
    (absent,) = listing({"state": tmp_path / "none"}, Contents(without_names=False))
    assert absent["error"] == "No such file or directory"


def test_a_listing_has_an_end_and_says_so(tmp_path: Path) -> None:
    for number in range(ENTRIES + 10):
        (tmp_path / f"{number}").touch()
    found = listing({"state": tmp_path}, Contents(without_names=False))
    assert found[ENTRIES:] == [{"error": f"only the first {ENTRIES} are listed"}]


def test_versions_name_what_runs() -> None:
    found = versions()
    assert found["libraries"]["aiohttp"]
    assert found["python"].startswith("CPython 3.")
    assert "+" in found["arcbridge"]

"""A test that hangs ends, in whatever it hangs, and the stacks say where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HANGS = {
    "loop": (
        "def test_hangs():\n"
        "    import asyncio, uvloop\n"
        "    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:\n"
        "        runner.run(asyncio.Event().wait())\n"
    ),
    "interpreter": (
        "def test_hangs():\n"
        "    import ctypes, signal\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
        "    ctypes.PyDLL(None).pause()\n"
    ),
    "thread that is left": (
        "def wait():\n"
        "    import threading\n"
        "    threading.Event().wait()\n"
        "def test_leaves():\n"
        "    import threading\n"
        "    threading.Thread(target=wait).start()\n"
    ),
}


def run(tests: str, directory: Path, seconds: int = 1) -> subprocess.CompletedProcess[str]:
    """Run tests with a deadline of so many seconds each, in a run that gives its threads one."""
    (directory / "test_hanging.py").write_text(tests)
    program = "import tests.support.deadline as d, pytest, sys; d.LEAVING = 1; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-c", "/dev/null", "-p", "no:asyncio", "-p", "no:cacheprovider", "-p", "tests.support.deadline"]
    command = [
        sys.executable,
        "-c",
        program,
        *options,
        "--timeout",
        str(seconds),
        "--rootdir",
        str(directory),
        str(directory),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("where", HANGS)
def test_a_test_that_hangs_ends(where: str, tmp_path: Path) -> None:
    done = run(HANGS[where], tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Timeout (0:00:01" in done.stderr
    assert "test_hanging.py" in done.stderr


def test_a_deadline_that_comes_while_a_report_is_made_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import signal, time\n"
        "def pytest_runtest_makereport(item, call):\n"
        "    while (item.name, call.when) == ('test_one', 'call') and signal.SIGALRM not in signal.sigpending():\n"
        "        time.sleep(0.01)\n"
    )
    done = run("def test_one():\n    pass\n\ndef test_two():\n    pass\n", tmp_path, seconds=8)
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["..", "[100%]"]), done.stdout + done.stderr

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


@pytest.mark.parametrize("where", HANGS)
def test_a_test_that_hangs_ends(where: str, tmp_path: Path) -> None:
    (tmp_path / "test_hanging.py").write_text(HANGS[where])
    program = "import tests.support.deadline as d, pytest, sys; d.LEAVING = 1; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-c", "/dev/null", "-p", "no:asyncio", "-p", "no:cacheprovider", "-p", "tests.support.deadline"]
    command = [sys.executable, "-c", program, *options, "--timeout", "1", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Timeout (0:00:01" in done.stderr
    assert "test_hanging.py" in done.stderr

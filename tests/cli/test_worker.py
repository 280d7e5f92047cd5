"""The worker's entry, as a process: without its supervisor it ends, and says nothing to systemd."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from arcbridge.relay.processes.supervisor import _CODE
from arcbridge.relay.siblings.channel import pair


def test_a_worker_without_a_supervisor_ends(tmp_path: Path) -> None:
    ours, theirs = pair()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        with theirs:
            arguments = ["arcbridge-relay-worker", "0", str(theirs.fileno()), chr(0x1F).join(sys.path)]
            process = subprocess.Popen(
                [sys.executable, "-c", _CODE, *arguments],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
                # Code in the working directory must not run instead of the supervisor's.
                cwd=_with_a_trap(tmp_path),
                stderr=subprocess.PIPE,
            )
        ours.close()
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, b"")
        with pytest.raises(BlockingIOError):
            systemd.recv(100)


def _with_a_trap(directory: Path) -> Path:
    (directory / "arcbridge").mkdir()
    (directory / "arcbridge" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    return directory

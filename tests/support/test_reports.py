"""What tests read of the roles: nothing is missed that a process wrote."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import ManagedProcess, ProcessFailed
from tests.support.reports import until, wait_for_record


class ReadLate(ManagedProcess):
    """A process whose output is read some time after its end, as a busy machine does it."""

    def _pump(self, stream: str, fd: int, path: Path) -> None:
        self._process.wait()
        time.sleep(0.3)
        super()._pump(stream, fd, path)


def test_the_last_record_of_a_process_that_has_ended(tmp_path: Path) -> None:
    words = json.dumps({"event": "it ends", "code": 3})
    with ReadLate([sys.executable, "-c", f"print({words!r})"], log_dir=tmp_path) as process:
        until(lambda: not process.running, "it has ended")
        assert wait_for_record(process, "it ends")["code"] == 3
        with pytest.raises(ProcessFailed, match="ended without 'it begins'"):
            wait_for_record(process, "it begins")

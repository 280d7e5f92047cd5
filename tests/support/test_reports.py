"""What tests read of the roles: nothing is missed that a process wrote, and a door that is shut lets nothing pass."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.processes import ManagedProcess, ProcessFailed
from tests.support.reports import Door, until, wait_for_record


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


def test_a_door_that_is_shut_while_a_connection_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection behind it comes too late, and is not left open."""
    reached, goes_on = threading.Event(), threading.Event()
    connect = socket.create_connection

    def slowly(address: tuple[str, int], timeout: float | None = None) -> socket.socket:
        reached.set()
        assert goes_on.wait(30)
        return connect(address, timeout=timeout)

    with socket.create_server(("127.0.0.1", 0)) as server, Door(f"127.0.0.1:{server.getsockname()[1]}") as door:
        monkeypatch.setattr(socket, "create_connection", slowly)
        with connect(("127.0.0.1", door.port), timeout=30) as caller:
            assert reached.wait(30)
            door.shut()
            goes_on.set()
            assert caller.recv(1) == b""
        assert door.passing == 0

"""What a role says of itself is waited for, and who cuts its connections cuts all of them."""

from __future__ import annotations

import json
import socket
import sys
import threading
from pathlib import Path

import pytest

from tests.support.processes import ManagedProcess, ProcessFailed
from tests.support.reports import Door, wait_for_record


def test_the_last_record_of_a_process_is_found_though_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end may be seen before its last output was read."""
    may_read = threading.Event()
    pump = ManagedProcess._pump

    def slow(process: ManagedProcess, *arguments: object) -> None:
        may_read.wait(30)
        pump(process, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ManagedProcess, "_pump", slow)
    code = f"print({json.dumps({'event': 'over', 'reason': 'done'})!r})"
    with ManagedProcess([sys.executable, "-c", code], log_dir=tmp_path) as process:
        process._process.wait(30)
        threading.Timer(0.2, may_read.set).start()
        assert wait_for_record(process, "over")["reason"] == "done"
        with pytest.raises(ProcessFailed, match=r"(?s)ended without 'another'.*over"):
            wait_for_record(process, "another")


def test_a_connection_that_was_on_its_way_when_the_door_was_shut_does_not_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dialled, shut = threading.Event(), threading.Event()
    connect = socket.create_connection

    def slow(*arguments: object, **more: object) -> socket.socket:
        sock = connect(*arguments, **more)  # type: ignore[arg-type]
        if threading.current_thread().name == "door pair":
            dialled.set()
            shut.wait(30)
        return sock

    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        Door(f"127.0.0.1:{server.getsockname()[1]}") as door,
    ):
        monkeypatch.setattr("tests.support.reports.socket.create_connection", slow)
        with connect(("127.0.0.1", door.port), timeout=30) as near:
            assert dialled.wait(30)
            door.shut()
            shut.set()
            assert near.recv(1) == b""
        assert door.passing == 0

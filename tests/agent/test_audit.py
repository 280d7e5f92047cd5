"""The audit log: one line per record, whatever callers put into it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from arcbridge.agent.audit import AuditLog, AuditRecord
from arcbridge.errors import ConfigError


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_lines_in_order(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(str(path))
    for number in range(2000):
        log.write(AuditRecord(request=f"s-1-{number}", session="s", user="alice", groups=2, status=200, verb="get"))
    log.close()
    found = lines(path)
    assert [record["request"] for record in found] == [f"s-1-{n}" for n in range(2000)]
    assert found[0]["user"] == "alice"
    assert found[0]["outcome"] == "answered"
    assert "as" not in found[0]
    assert log.records == 2000
    assert log.dropped == 0
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_it_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for _ in range(2):
        log = AuditLog(str(path))
        log.write(AuditRecord(request="r", session="s"))
        log.close()
    assert len(lines(path)) == 2


def test_o2_names_cannot_break_a_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(str(path))
    evil = 'x\r\n{"user":"root"}\x1b[2J\u2028<script>' + "y" * 1_000_000
    log.write(AuditRecord(request="r", session="s", user=evil, name=evil, reason=evil))
    log.close()
    text = path.read_text()
    assert text.count("\n") == 1
    assert len(text) < 8192
    assert "\x1b" not in text
    assert "\u2028" not in text


def test_a_stalled_reader_never_stalls_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = AuditLog(str(path))
    began = time.monotonic()
    for number in range(40_000):
        log.write(AuditRecord(request=f"r-{number}", session="s", user="u" * 200))
    assert time.monotonic() - began < 10
    assert log.dropped > 0
    os.close(reader)
    log.close()


def test_switched_off_and_not_writable(tmp_path: Path) -> None:
    log = AuditLog("")
    log.write(AuditRecord(request="r", session="s"))
    log.close()
    assert log.records == 1
    with pytest.raises(ConfigError, match=r"audit\.file"):
        AuditLog(str(tmp_path / "missing" / "audit.jsonl"))

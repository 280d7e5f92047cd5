"""The audit log: one line per record, whatever callers put into it."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arcbridge.agent.audit import AuditLog, AuditRecord
from arcbridge.errors import ConfigError
from arcbridge.observe.foreign_text import clean, escape


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


_TEXTS = (
    "method",
    "verb",
    "group",
    "resource",
    "subresource",
    "namespace",
    "name",
    "path",
    "target",
    "upgrade",
    "reason",
)


@given(
    texts=st.fixed_dictionaries({key: st.text(st.characters(), max_size=200) for key in _TEXTS}),
    names=st.tuples(st.text(max_size=200), st.text(max_size=200)),
    numbers=st.tuples(*[st.integers(0, 2**53)] * 4),
)
@example(texts=dict.fromkeys(_TEXTS, 'a"b\\c\n\x00\ud800'), names=('"\\', '\u2028"'), numbers=(0, 0, 0, 0))
def test_o2_a_line_is_json_that_says_what_the_record_says(
    texts: dict[str, str], names: tuple[str, str], numbers: tuple[int, int, int, int]
) -> None:
    """The log composes its lines by hand, and most texts in them come from callers."""
    groups, status, up, down = numbers
    record = AuditRecord(
        request="s-1-1", session="s", user=names[0], as_user=names[1], groups=groups, status=status, bytes_up=up,
        bytes_down=down, started=1.0, **texts,
    )  # fmt: skip
    line = record.line(3.5)
    assert "\n" not in line
    line.encode()  # also what no encoding knows was escaped
    found = json.loads(line)
    assert datetime.fromisoformat(found.pop("ts")).tzinfo is UTC
    assert found == {
        "event": "audit", "request": "s-1-1", "session": "s", "user": escape(names[0]), "groups": groups,
        **({"as": escape(names[1])} if names[1] else {}),
        **{key: clean(text) for key, text in texts.items() if text},
        **({"status": status} if status else {}),
        "outcome": "answered", "bytes_up": up, "bytes_down": down, "duration": 2.5,
    }  # fmt: skip


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

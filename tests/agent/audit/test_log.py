"""What requests see of the audit log: when they may go on, and what they are told when they may not."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from arcbridge.agent.audit import AuditLog, AuditRecord
from arcbridge.agent.audit import log as module
from arcbridge.agent.audit.budget import AuditBudget
from arcbridge.agent.audit.record import AuditSubject
from arcbridge.audit import log as base
from arcbridge.audit import writer
from arcbridge.audit.verify import verify
from arcbridge.errors import ConfigError
from tests.support.eventually import until

SUBJECT = AuditSubject("s")


def record() -> AuditRecord:
    return AuditRecord("r-1", SUBJECT)


async def test_a_begun_record_is_in_the_file_before_the_request_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(str(path))
    one = record()
    assert await log.written(log.begin, one) == ""
    assert '"stage":"begun","request":"r-1"' in path.read_text()
    one.details = {"privileged": ["container:c"]}
    assert await log.written(log.detail, one) == ""
    assert '"stage":"details","request":"r-1"' in path.read_text()
    log.write(one)
    log.close()
    assert path.read_text().count('"stage":"ended"') == 1
    assert log.records == 3
    assert log.chain_records == 4  # with the chain's own last record
    assert verify([path]).ok


async def test_switched_off(tmp_path: Path) -> None:
    log = AuditLog("")
    told: list[str] = []
    log.begin(record(), told.append)
    assert told == [""]
    log.write(record())
    log.close()
    assert (log.records, log.dropped, log.failure, log.chain_records) == (2, 0, "", 0)
    assert log.unready() is None


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"audit\.file"):
        AuditLog(str(tmp_path / "missing" / "audit.jsonl"))
    with pytest.raises(ConfigError, match=r"audit\.on_failure"):
        AuditLog("", on_failure="panic")


async def failing(log: AuditLog) -> None:
    """Wait until the log has seen that its disk is full."""
    log.write(record())
    await until(lambda: log.failure)


async def test_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "RETRY", 0.01)
    log = AuditLog("/dev/full", on_failure="refuse")
    refused = await log.written(log.begin, record())
    assert refused.startswith("the agent cannot write its audit log (No space left on device), and by its settings")
    await failing(log)
    assert await log.written(log.begin, record()) == refused
    assert log.refusal() == refused
    assert log.unready() == "the audit log cannot be written: No space left on device"
    assert log.refused == 3
    assert log.unrecorded == 0
    log.close()


async def test_continue() -> None:
    log = AuditLog("/dev/full", on_failure="continue")
    assert await log.written(log.begin, record()) == ""
    await failing(log)
    assert await log.written(log.begin, record()) == ""
    assert (log.refusal(), log.unready()) == ("", None)
    assert (log.unrecorded, log.refused, log.failures) == (2, 0, 1)
    log.close()
    assert log.dropped == 4  # the chain's beginning, two begun, one complete


@pytest.mark.parametrize("policy", ["refuse", "continue"])
async def test_a_disk_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """The event loop does not wait for it, and a request only for a while."""
    monkeypatch.setattr(base, "STALL", 0.05)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = AuditLog(str(path), on_failure=policy)
    fill = AuditRecord("r", SUBJECT, reason="x" * 1000)
    for _ in range(200):
        log.write(fill)
    told = await asyncio.wait_for(log.written(log.begin, record()), 9)
    assert told == ("" if policy == "continue" else AuditLog.refused_words.format("it takes no data"))
    await until(lambda: log.failure)
    assert log.failure == "it takes no data"
    assert (log.unready() is None) == (policy == "continue")
    os.close(reader)
    log.close()


async def test_every_request_is_decided_though_one_of_them_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of requests whose time is over one has its next record wait within the call; one timer serves all that wait."""
    monkeypatch.setattr(base, "STALL", 0.5)
    monkeypatch.setattr(writer.AuditWriter, "put", lambda *_: True)  # queued, and never written
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context.get("exception")))
    log = AuditLog(str(tmp_path / "audit.jsonl"))
    told: list[str] = []
    looks = 0
    look = log._look

    def counted() -> None:
        nonlocal looks
        looks += 1
        look()

    monkeypatch.setattr(log, "_look", counted)

    def raises(_: str) -> None:
        raise ZeroDivisionError("a bug")

    def goes_on(_: str) -> None:
        told.append("first")
        log.begin(record(), lambda _: told.append("next"))

    for recorded in (goes_on, raises, lambda _: told.append("second")):
        log.begin(record(), recorded)
    for waiting in log._undecided:
        waiting.since -= base.STALL
    log.begin(record(), lambda _: told.append("later"))
    log._look_timer.cancel()
    log._look()
    assert told == ["first", "second"]
    assert [type(one) for one in faults] == [ZeroDivisionError]
    await until(lambda: len(told) == 4)
    assert told[2:] == ["later", "next"]
    await asyncio.sleep(0.05)
    assert looks <= 3, "a second chain of timers looks again each time"
    monkeypatch.undo()
    log.close()


@pytest.mark.parametrize("policy", ["refuse", "continue"])
async def test_a_queue_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """A stalled disk has filled the queue; `test_writer` has the queue itself."""
    log = AuditLog(str(tmp_path / "audit.jsonl"), on_failure=policy)
    monkeypatch.setattr(writer.AuditWriter, "put", lambda *_: False)
    told = await log.written(log.begin, record())
    assert told == (AuditLog.refused_words.format("its queue is full") if log.refuses else "")
    assert (log.refused, log.unrecorded) == ((1, 0) if log.refuses else (0, 1))
    monkeypatch.undo()
    log.close()


async def test_a_loop_that_has_ended_is_not_called(tmp_path: Path) -> None:
    told: list[str] = []
    waiting = base._Waiting(AuditLog(""), told.append)
    waiting.loop = asyncio.new_event_loop()
    waiting.loop.close()
    waiting("")
    assert told == []
    waiting.decide("")
    waiting.decide("")
    assert told == [""], "once"


def limited(user: str = "alice") -> AuditBudget:
    """A budget for one record, about."""
    budget = AuditBudget(user)
    budget.change(0.0, 20)
    return budget


def events(path: Path) -> list[tuple[object, ...]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(one["event"], one.get("stage") or one.get("records")) for one in lines if one["event"] != "chain"]


async def test_a27_records_that_are_left_out_are_counted_in_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log, budget = AuditLog(str(path)), limited()
    one = AuditRecord("r", AuditSubject("s", "alice", budget=budget))
    for _ in range(10):
        log.write(one)
    assert log.left_out == 10
    other = AuditRecord("r", AuditSubject("s", "bob", budget=limited("bob")))
    assert await log.written(log.begin, other) == ""
    assert await log.written(log.begin, one) == "", "whether it may go on is decided elsewhere"
    log.write(one)
    log.close()
    expected = [("audit", "begun"), ("audit-left-out", 10), ("audit", "begun"), ("audit", "ended"), ("chain-end", None)]
    assert events(path) == expected
    report = verify([path])
    assert report.ok
    assert ["10 records" in note and "of alice are left out" in note for note in report.notes] == [True]


async def test_a27_each_minute_and_at_the_end_they_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEFT_OUT_INTERVAL", 0.01)
    path = tmp_path / "audit.jsonl"
    log = AuditLog(str(path))
    log.write(AuditRecord("r", AuditSubject("s", "alice", budget=limited())))
    await until(lambda: ("audit-left-out", 1) in events(path))
    monkeypatch.setattr(module, "LEFT_OUT_INTERVAL", 3600)
    log.write(AuditRecord("r", AuditSubject("s", "bob", budget=limited("bob"))))
    log.close()
    assert events(path)[1:] == [("audit-left-out", 1), ("chain-end", None)]


async def test_a27_where_nothing_goes_on_unrecorded_reads_are_owed(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log, budget = AuditLog(str(path), on_failure="refuse"), limited()
    for _ in range(3):
        log.write(AuditRecord("r", AuditSubject("s", budget=budget)))
    log.close()
    assert events(path)[:-1] == [("audit", "complete")] * 3
    assert budget.is_spent(0.0)

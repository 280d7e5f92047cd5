"""What a relay's process records: acts before and after, what strangers cause, and what a full disk means."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from arcbridge.audit.verify import verify
from arcbridge.errors import StateError
from arcbridge.relay.audit import log as module
from arcbridge.relay.audit.log import KNOWN_QUESTIONS, STRANGERS, RelayAudit, WorkerAudit, audit_file, open_audit
from arcbridge.relay.audit.record import Actor
from arcbridge.relay.operations import Operations
from arcbridge.settings.config import RelayAuditConfig, RelayConfig
from tests.support.eventually import until

ALICE = Actor("os", "alice", {"uid": 1000})


def records(path: Path) -> list[dict[str, Any]]:
    """The records of acts in a log."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [one for one in found if one["event"] == "audit"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


async def answer(question: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"user": "bob", "cluster": "prod", "session": "s"}] if question["ask"] == "end" else []


async def test_an_act_is_in_the_file_before_it_is_done(path: Path) -> None:
    audit = RelayAudit(str(path))
    async with audit.acting("user revoke", {"user": "bob"}, ALICE) as result:
        (begun,) = records(path)
        assert (begun["stage"], begun["act"], begun["actor"]) == ("begun", "user revoke", "alice")
        result["before"] = 7
    with pytest.raises(StateError):
        async with audit.acting("user restore", {"user": "bob"}, ALICE):
            raise StateError("this user is not revoked")
    with pytest.raises(ZeroDivisionError):
        async with audit.acting("user restore", {}, ALICE):
            raise ZeroDivisionError
    audit.close()
    ends = [one for one in records(path) if one["stage"] == "ended"]
    assert [(one["outcome"], one.get("reason"), one.get("result")) for one in ends] == [
        ("done", None, {"before": 7}),
        ("refused", "this user is not revoked", None),
        ("failed", "ZeroDivisionError", None),
    ]
    assert ends[0]["id"] == begun["id"]
    assert verify([path]).ok


async def test_questions_that_are_acts_are_recorded_and_others_are_not(path: Path) -> None:
    audit = RelayAudit(str(path))
    rows = await audit.answering({"ask": "end", "session": "s", "reason": "why"}, ALICE, answer)
    assert rows == await answer({"ask": "end"})
    assert await audit.answering({"ask": "sessions"}, ALICE, answer) == []
    assert await audit.answering({"ask": "nonsense"}, ALICE, answer) == []
    audit.asked_by_fleet({"ask": "accept_policy", "hash": "abc"}, lambda _: [{"hash": "abc"}])
    audit.close()
    begun, ended, odd, fleet = records(path)
    assert (begun["act"], begun["arguments"]) == ("session end", {"session": "s", "reason": "why"})
    assert ended["result"] == {"found": 1, "user": "bob", "cluster": "prod"}
    assert (odd["act"], odd["outcome"], odd["arguments"]) == ("admin question", "refused", {"question": "nonsense"})
    assert (fleet["by"], fleet["act"], fleet["arguments"]) == ("fleet", "policy accept", {"hash": "abc"})


def test_every_question_is_known() -> None:
    """One that is added to `operations` and not here would be recorded as refused."""
    answered = set(re.findall(r'^            case "([a-z_]+)":$', inspect.getsource(Operations.answer), re.MULTILINE))
    assert answered == KNOWN_QUESTIONS


async def test_what_a_command_does_itself(path: Path) -> None:
    audit = RelayAudit(str(path))
    asked = {"ask": "record", "act": "token create", "arguments": {"cluster": "prod"}}
    (row,) = await audit.answering({**asked, "stage": "begun"}, ALICE, answer)
    told = {**asked, "stage": "ended", "id": row["id"], "outcome": "done", "result": {"token_id": "t"}}
    assert await audit.answering(told, ALICE, answer) == [row]
    for odd in ({"act": "format disk"}, {"arguments": []}, {"id": "x"}, {"outcome": "perhaps"}):
        assert await audit.answering({**told, **odd}, ALICE, answer) == []
    audit.close()
    begun, ended, *refused = records(path)
    assert (begun["id"], ended["id"]) == (row["id"], row["id"])
    assert (ended["arguments"], ended["result"]) == ({"cluster": "prod"}, {"token_id": "t"})
    assert [one["reason"] for one in refused] == ["no such act", "no such act"]


async def test_l3_what_strangers_cause_is_bounded_and_counted(path: Path) -> None:
    now = 0.0
    audit = RelayAudit(str(path), clock=lambda: now)
    for _ in range(50 * STRANGERS):
        audit.note_stranger("agent enrol", {}, Actor("agent", facts={"source": "192.0.2.1"}), "not known here")
    now = 10.0
    audit.note_stranger("agent enrol", {}, Actor("agent"), "not known here")
    audit.note_stranger("agent enrol", {}, Actor("agent"), "not known here")
    audit.close()
    found = records(path)
    assert len(found) == STRANGERS + 2
    assert [one.get("omitted") for one in found[-2:]] == [49 * STRANGERS, 1]


async def test_noise_of_one_kind_leaves_out_no_record_of_another(path: Path) -> None:
    audit = RelayAudit(str(path), clock=lambda: 0.0)
    for _ in range(STRANGERS + 5):
        audit.note_stranger("agent enrol", {}, Actor("agent"), "not known here")
    audit.note_stranger("certificate renew", {"cluster": "prod"}, Actor("agent"), "renewed twice")
    audit.close()
    last = records(path)[-1]
    assert (last["act"], last["omitted"]) == ("certificate renew", 5)


async def test_a_full_disk_refuses_or_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing, going_on = (RelayAudit("/dev/full", on_failure=policy) for policy in ("refuse", "continue"))
    refused = None
    with pytest.raises(StateError, match=r"cannot write its audit log \(No space left") as caught:
        async with refusing.acting("user revoke", {}, ALICE):
            pytest.fail("it is not recorded")
    refused = caught.value.message
    asked = {"ask": "record", "act": "token create", "arguments": {}, "stage": "begun"}
    assert await refusing.answering(asked, ALICE, answer) == [{"refused": refused}]
    async with going_on.acting("user revoke", {}, ALICE):
        await until(lambda: going_on.failure)
    assert going_on.unrecorded == 1
    for one in (refusing, going_on):
        one.close()


async def test_a_worker_gives_its_lines_to_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[tuple[str, int]] = []
    audit = WorkerAudit(lambda line, number: lines.append((line, number)), on_failure="refuse", worker=1)
    audit.note("policy change", {"hash": "abc"})
    noted = asyncio.create_task(audit.noted("agent enrol", {"cluster": "prod"}, Actor("agent")))
    await until(lambda: len(lines) == 2)
    assert [(json.loads(line)["worker"], number) for line, number in lines] == [(1, 0), (1, 1)]
    assert not noted.done(), "until the line is written"
    audit.recorded(1, "")
    await noted
    noted = asyncio.create_task(audit.noted("agent enrol", {"cluster": "prod"}, Actor("agent")))
    await until(lambda: len(lines) == 3)
    audit.recorded(2, "no room")
    with pytest.raises(StateError, match="no room"):
        await noted
    monkeypatch.setattr(module, "ANSWERED", 0.01)
    with pytest.raises(StateError, match="the supervisor does not answer"):
        await audit.noted("agent enrol", {"cluster": "prod"}, Actor("agent"))
    going_on = WorkerAudit(lambda line, number: None, on_failure="continue", worker=1)
    await going_on.noted("agent enrol", {"cluster": "prod"}, Actor("agent"))
    audit.supervisors_failure = "No space left on device"
    with pytest.raises(StateError, match="No space left"):
        await audit.noted("agent enrol", {"cluster": "prod"}, Actor("agent"))
    assert audit.refusal()


def test_where_it_is(tmp_path: Path) -> None:
    config = RelayConfig(data_dir=tmp_path)
    assert audit_file(config) == str(tmp_path / "audit.jsonl")
    assert audit_file(RelayConfig(data_dir=tmp_path, audit=RelayAuditConfig(file="/log"))) == "/log"
    assert audit_file(RelayConfig(audit=RelayAuditConfig(file="-"))) == "-"
    audit = open_audit(config, "relay-1")
    audit.stop()
    audit.start({"version": "1"})
    audit.stop()
    audit.close()
    assert [one["act"] for one in records(tmp_path / "audit.jsonl")] == ["relay start", "relay stop"]
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600

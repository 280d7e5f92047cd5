"""The lines of the relay's records: whatever is in them, one JSON object on one line, bounded, without secrets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import AsyncIterator, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.relay.audit import record as module
from arcbridge.relay.audit.record import MAX_LINE, RELAY, Actor, act_line, os_actor, own_actor
from tests.support.eventually import until

TEXTS = st.text(max_size=3000)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.lists(TEXTS, max_size=30))


def made(arguments: Mapping[str, object], actor: Actor = RELAY, **more: object) -> dict[str, object]:
    line = act_line("complete", "user revoke", actor, arguments, **more)
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def test_an_act() -> None:
    actor = Actor("os", "root", {"uid": 0, "login_uid": 1000, "login": "alice"})
    found = made({"user": "bob", "reason": "left"}, actor, outcome="done", result={"before": "2026-11-29T00:00:00Z"})
    assert found.pop("ts")
    assert found == {
        "event": "audit", "stage": "complete", "act": "user revoke", "by": "os", "actor": "root", "uid": 0,
        "login_uid": 1000, "login": "alice", "arguments": {"user": "bob", "reason": "left"}, "outcome": "done",
        "result": {"before": "2026-11-29T00:00:00Z"},
    }  # fmt: skip


@given(st.dictionaries(TEXTS, VALUES, max_size=20), TEXTS, TEXTS)
def test_l1_whatever_comes_is_one_line_of_bounded_length(arguments: dict[str, object], name: str, reason: str) -> None:
    line = act_line("ended", "x", Actor("os", name, arguments), arguments, reason=reason, result=arguments)
    assert isinstance(json.loads(line), dict)
    assert not any(character in line for character in "\n\r\x1b\u2028\x85")
    assert len(line.encode()) <= 2 * MAX_LINE


def test_l1_a_name_cannot_begin_another_record() -> None:
    line = act_line("complete", "user revoke", RELAY, {"user": 'eve"}\n{"event":"audit","act":"user restore"}'})
    assert "\n" not in line
    assert json.loads(line)["arguments"] == {"user": 'eve"}\\n{"event":"audit","act":"user restore"}'}


def test_l2_what_is_named_as_a_secret_is_left_out_and_names_never_are() -> None:
    name = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"
    found = made({"token": "id.secret", "token_id": "id", "user": name}, reason=f"it had Bearer {name}")
    assert found["arguments"] == {"token": "[redacted]", "token_id": "id", "user": name}
    assert name not in str(found["reason"])


def test_what_is_too_long_is_cut_and_counted() -> None:
    found = made({f"a{n}": "x" for n in range(20)}, result={"users": [f"u{n}" for n in range(30)], "name": "é" * 2000})
    arguments, result = found["arguments"], found["result"]
    assert arguments["fields_omitted"] == 20 - module.MAX_FIELDS
    assert result["users"][-1] == f"… {30 - module.MAX_LISTED} more"
    assert len(result["name"].encode()) <= module.TEXT_LIMIT
    assert result["name"].endswith("…")


async def test_the_user_of_this_process() -> None:
    actor = await own_actor()
    assert (actor.by, actor.facts["uid"]) == ("os", os.getuid())


async def test_a_user_whom_the_system_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await os_actor(2**31 - 7, 2**22 + 1) == Actor("os", "", {"uid": 2**31 - 7})
    monkeypatch.setattr("builtins.open", lambda *_, **__: _Login())
    monkeypatch.setattr(module, "_user_name", lambda uid: {0: "root", 1000: "alice"}[uid])
    assert await os_actor(0, 1) == Actor("os", "root", {"uid": 0, "login_uid": 1000, "login": "alice"})


@contextlib.asynccontextmanager
async def hanging_directory(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """The system's directory of users, which answers nobody."""
    hold = threading.Event()
    monkeypatch.setattr(module, "_user_name", lambda uid: str(hold.wait() and ""))
    monkeypatch.setattr(module, "DIRECTORY_DEADLINE", 0.01)
    try:
        yield
    finally:
        hold.set()
        await until(lambda: not module._looking)


async def test_a_name_that_the_directory_does_not_tell_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with hanging_directory(monkeypatch):
        found = await asyncio.gather(*(own_actor() for _ in range(20)))
        assert {one.name for one in found} == {""}
        assert sum(one.name == "user-name" for one in threading.enumerate()) <= 2


class _Login:
    """/proc/1/loginuid of a session of alice, who has become root by `sudo`."""

    def __enter__(self) -> _Login:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, size: int) -> str:
        return "1000"

"""Who may ask, what comes back, and that no question ends or stalls a relay."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from arcbridge.errors import StateError
from arcbridge.relay import admin_socket as module
from arcbridge.relay.admin_socket import SOCKET, AdminSocket, ask
from arcbridge.relay.audit.log import RelayAudit
from tests.relay.audit.test_record import hanging_directory
from tests.support.eventually import until


class Relay:
    """What a relay answers."""

    def __init__(self) -> None:
        self.asked: list[Mapping[str, Any]] = []
        self.rows: list[dict[str, Any]] = [{"session": "a"}]

    async def handle(self, question: Mapping[str, Any]) -> list[dict[str, Any]]:
        self.asked.append(question)
        return self.rows


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Relay]:
    made = Relay()
    server = AdminSocket(tmp_path, made.handle, RelayAudit(""))
    await server.start()
    yield made
    await server.close()
    assert not (tmp_path / SOCKET).exists()


async def test_a_question_and_its_answer(relay: Relay, tmp_path: Path) -> None:
    assert await ask(tmp_path, {"ask": "sessions"}) == [{"session": "a"}]
    assert relay.asked == [{"ask": "sessions"}]
    assert stat.S_IMODE((tmp_path / SOCKET).stat().st_mode) == 0o600


async def test_a_directory_of_users_that_hangs_takes_no_thread_of_the_loop(
    relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are few of them, and the relay's look at revocations needs one."""
    async with hanging_directory(monkeypatch):
        for _ in range(40):
            assert await ask(tmp_path, {"ask": "sessions"}) == relay.rows
        assert await asyncio.wait_for(asyncio.to_thread(len, "free"), 5) == 4
        assert sum(one.name == "user-name" for one in threading.enumerate()) <= 2, "this user, and who has logged in"


async def test_no_relay(tmp_path: Path) -> None:
    assert await ask(tmp_path, {"ask": "sessions"}) is None
    assert await ask(tmp_path / "missing", {"ask": "sessions"}) is None


async def test_what_a_killed_relay_left_is_no_relay_and_in_no_relays_way(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / SOCKET))
    left.close()
    assert await ask(tmp_path, {"ask": "sessions"}) is None
    made = Relay()
    server = AdminSocket(tmp_path, made.handle, RelayAudit(""))
    await server.start()
    assert await ask(tmp_path, {"ask": "sessions"}) == made.rows
    await server.close()


async def test_a_directory_whose_path_is_too_long_for_an_address(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    made = Relay()
    server = AdminSocket(deep, made.handle, RelayAudit(""))
    await server.start()
    assert await ask(deep, {"ask": "sessions"}) == made.rows
    await server.close()


async def test_k1_another_user_is_not_answered(relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_operator", lambda sock: False)
    with pytest.raises(StateError):
        await ask(tmp_path, {"ask": "end", "session": "a"})
    assert relay.asked == []


def test_k1_only_the_relays_own_user_and_root(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = socket.socketpair(socket.AF_UNIX)
    with near, far:
        assert module._is_operator(near)
        if os.getuid():
            monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
            assert not module._is_operator(near)


@pytest.mark.parametrize("said", [b"", b"no JSON\n", b"[]\n", b"{" * 100_000, b'{"ask": 1}\n'])
async def test_nonsense_ends_nothing(relay: Relay, tmp_path: Path, said: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / SOCKET))
    writer.write(said)
    writer.write_eof()
    await reader.read()
    writer.close()
    assert await ask(tmp_path, {"ask": "sessions"}) == relay.rows


async def test_a_relay_that_is_asked_too_much_at_once_refuses_what_is_over(relay: Relay, tmp_path: Path) -> None:
    held = [await asyncio.open_unix_connection(str(tmp_path / SOCKET)) for _ in range(module.CONNECTIONS)]
    with pytest.raises(StateError, match="the relay is answering other commands; try again"):
        await ask(tmp_path, {"ask": "sessions"})
    for _, writer in held:
        writer.close()
        await writer.wait_closed()
    async with asyncio.timeout(5):
        while True:
            try:
                assert await ask(tmp_path, {"ask": "sessions"}) == relay.rows
                break
            except StateError:
                await asyncio.sleep(0.01)


async def test_sixteen_long_answers_come_whole_and_few_at_a_time(
    relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What this machine takes for megabytes of JSON sixteen times is no matter here.
    monkeypatch.setattr(module, "DEADLINE", 100.0)
    monkeypatch.setattr(module, "TURN", 100.0)
    relay.rows = [{"session": f"{number:016x}", "user": "u" * 200} for number in range(10_000)]
    answering = most = 0
    real = relay.handle

    async def handle(question: Mapping[str, Any]) -> list[dict[str, Any]]:
        nonlocal answering, most
        answering += 1
        most = max(most, answering)
        await asyncio.sleep(0)
        answering -= 1
        return await real(question)

    server = AdminSocket(tmp_path, handle, RelayAudit(""))
    await server.start()
    answers = await asyncio.gather(*(ask(tmp_path, {"ask": "sessions"}) for _ in range(module.CONNECTIONS)))
    assert answers == [relay.rows] * module.CONNECTIONS
    assert most <= module.ANSWERING
    await server.close()


async def test_one_whose_turn_does_not_come_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = asyncio.Event()

    async def handle(question: Mapping[str, Any]) -> list[dict[str, Any]]:
        await gate.wait()
        return []

    server = AdminSocket(tmp_path, handle, RelayAudit(""))
    await server.start()
    held = [asyncio.create_task(ask(tmp_path, {"ask": "sessions"})) for _ in range(module.ANSWERING)]
    await until(lambda: server._turn.locked())
    with monkeypatch.context() as patch:
        patch.setattr(module, "TURN", 0.05)
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / SOCKET))
        writer.write(b'{"ask":"sessions"}\n')
        assert json.loads(await asyncio.wait_for(reader.readuntil(b"\n"), 10)) == {"error": module.BUSY}
        writer.close()
    gate.set()
    assert await asyncio.gather(*held) == [[], []]
    await server.close()

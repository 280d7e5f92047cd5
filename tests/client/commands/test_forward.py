"""`forward` as a whole, in process: the line, what is carried, and the mistakes of a user."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path

import pytest

from arcbridge.client.commands.forward import run_forward
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.errors import ConfigError
from tests.client.commands.test_proxy import Case, started
from tests.client.far_side import FarSide


@pytest.fixture
def case(far: FarSide, tmp_path: Path) -> Case:
    return Case(far, tmp_path)


async def test_it_carries(case: Case) -> None:
    ready = asyncio.Event()
    work = run_forward(case.context(), "db", "127.0.0.1:0", ready=ready.set)
    async with started(work, ready):
        address = case.lines[0].split()[1]
        assert case.lines[0] == f"Forwarding {address} to db of cluster prod"
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        writer.write(b"ping")
        assert await reader.readexactly(4) == b"ping"
        writer.close()


async def test_the_port_is_closed_before_its_session_has_ended(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that the kernel accepts meanwhile would be served by nothing."""
    seen: list[int] = []
    ready, wait_closed = asyncio.Event(), SessionManager.wait_closed

    async def waits(session: SessionManager) -> None:
        with socket.socket() as sock:
            seen.append(sock.connect_ex(("127.0.0.1", int(case.lines[0].split()[1].rpartition(":")[2]))))
        await wait_closed(session)

    monkeypatch.setattr(SessionManager, "wait_closed", waits)
    work = run_forward(case.context(), "db", "127.0.0.1:0", ready=ready.set)
    async with started(work, ready):
        pass
    assert seen == [errno.ECONNREFUSED]


async def test_mistakes(case: Case) -> None:
    for target, listen in (("no such name", "127.0.0.1:0"), ("db", "nonsense:port")):
        with pytest.raises(ConfigError):
            await run_forward(case.context(), target, listen)

"""What an agent sends in the flight of its AUTH_OK, before the client has taken the session over, is not lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import pytest

from arcbridge.client.session.session_manager import SessionManager
from arcbridge.errors import PermissionRefused, Unreachable
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import Auth
from tests.client.far_side import FarSide
from tests.client.session.test_session_manager import echo, echo_again, make, running, streaming
from tests.support.eventually import until
from tests.support.stream_io import StreamIO

pytestmark = pytest.mark.usefixtures("soon")


class Prompt(FarSide):
    """An agent that does something right behind its first AUTH_OK, which waits for `accepts`, and behind the first
    resumption."""

    def __init__(self) -> None:
        super().__init__()
        self.accepts = asyncio.Event()
        self.behind: Callable[[MuxSession], None] = lambda session: None

    def auth_received(self, session: MuxSession, auth: Auth) -> None:
        if len(self.auths) > 0:
            super().auth_received(session, auth)
        else:
            self.auths.append(auth)
            self._spawn(self._accept_late(session, auth))

    def _resume(self, newcomer: MuxSession) -> None:
        super()._resume(newcomer)
        if len(self.resumptions) == 1:
            self.behind(self.resumptions[0])

    def has_early_stream(self) -> bool:
        """Return whether a stream waits for the verdict; one whose OPEN crosses GOAWAY would be refused."""
        return bool(self.auths) and bool(self.sessions[0].streams)

    async def _accept_late(self, session: MuxSession, auth: Auth) -> None:
        await self.accepts.wait()
        super().auth_received(session, auth)
        self.behind(session)


@pytest.fixture
async def prompt() -> AsyncIterator[Prompt]:
    async with Prompt() as side:
        yield side


async def early_stream(session: SessionManager, prompt: Prompt) -> StreamIO:
    """Open a stream before the token is accepted, and then let it be accepted."""
    io = StreamIO()
    (await session.ready(before_auth=True)).open("tcp:echo", io)
    await io.write(b"early")
    await until(prompt.has_early_stream)
    prompt.accepts.set()
    assert await io.read_exactly(5) == b"early"
    return io


async def test_a_connector_returns_no_session_that_drains(prompt: Prompt, tmp_path: Path) -> None:
    prompt.behind = lambda session: session.goaway(GoawayCode.DRAINING, "the agent is stopping", 1)
    connector, io = make(prompt, tmp_path).connector, StreamIO()
    attempt = asyncio.get_running_loop().create_task(connector.connect(BaseHandler()))
    session = await connector.waiters.wait(before_auth=True)
    session.open("tcp:echo", io)
    await io.write(b"early")
    await until(prompt.has_early_stream)
    prompt.accepts.set()
    with pytest.raises(Unreachable, match="is not available now"):
        await attempt
    assert session in connector.sessions
    assert await io.read_exactly(5) == b"early"
    session.abort()


async def test_a_session_that_drains_is_a_former_one(
    prompt: Prompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller gets another session while an early stream goes on in this one (docs/threats.md#S20)."""
    monkeypatch.setattr("arcbridge.client.session.waiters.FAILURE_HOLD", 0.001)
    prompt.behind = lambda session: session.goaway(GoawayCode.DRAINING, "the agent is stopping", 1)
    async with running(make(prompt, tmp_path)) as session:
        io = await early_stream(session, prompt)
        assert await echo_again(session) == b"hello"
        former = next(one for one in session.sessions() if one is not session.current)
        assert session.connector.sessions[former].detachment.agent_stops
        await io.write(b"later")
        assert await io.read_exactly(5) == b"later"
        assert len(prompt.requests) == 2


async def test_a_revocation_is_held(prompt: Prompt, tmp_path: Path) -> None:
    prompt.accepts.set()
    prompt.behind = lambda session: session.close(GoawayCode.REVOKED, "access was revoked")
    async with running(make(prompt, tmp_path)) as session:
        with pytest.raises(PermissionRefused, match="access was revoked"):
            await session.ready()
        assert session.connector.revoked.error is not None


async def test_a_move_is_made(prompt: Prompt, tmp_path: Path) -> None:
    prompt.accepts.set()
    prompt.behind = lambda session: session.migration.ask()
    async with running(make(prompt, tmp_path)) as session:
        first = await session.ready()
        await until(lambda: session.current is not None and session.current is not first)
        await first.wait_ended()
        assert await echo(session) == b"hello"


async def test_a_loss_is_followed_by_a_resumption(prompt: Prompt, tmp_path: Path) -> None:
    def close(session: MuxSession) -> None:
        prompt.behind = lambda session: None
        # AUTH_OK still goes out, with the end right behind it.
        asyncio.get_running_loop().call_soon(cast(asyncio.Transport, session.transport).close)

    prompt.behind = close
    async with running(make(prompt, tmp_path)) as session:
        io = await early_stream(session, prompt)
        assert await echo(session) == b"hello"
        assert len(prompt.resumptions) == 1
        await io.write(b"later")
        assert await io.read_exactly(5) == b"later"
        assert session.counters.established == 1


@pytest.mark.parametrize("lost", [True, False])
async def test_a_move_is_made_that_comes_with_a_resumption(prompt: Prompt, tmp_path: Path, lost: bool) -> None:
    prompt.accepts.set()
    async with streaming(prompt, tmp_path) as (session, stream):
        prompt.behind = lambda session: session.migration.ask()
        if lost:
            prompt.cut()
        else:
            prompt.sessions[0].migration.ask()
        await until(lambda: len(prompt.resumptions) == 2)
        await stream.check(b"more")
        await until(lambda: session.counters.moved + session.counters.resumed == 2)

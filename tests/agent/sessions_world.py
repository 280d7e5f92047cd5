"""Sessions of an agent without a relay, for tests: held over one connection, cut, and judged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from arcbridge.agent import agent_session
from arcbridge.agent.sessions import Sessions
from arcbridge.mux.session import MuxSession
from arcbridge.wire.session import State
from tests.support.stream_io import StreamIO

from .pair import (
    ClientSide,
    Clock,
    FakeAuthenticator,
    FakeProxy,
    joined,
    make_sessions,
)


class Held:
    """Alice's session with one stream that has been used, at an agent that also knows mallory."""

    def __init__(self, sessions: Sessions, proxy: FakeProxy, judge: FakeAuthenticator, clock: Clock) -> None:
        self.sessions, self.proxy, self.judge, self.clock = sessions, proxy, judge, clock
        self.client: MuxSession
        self.handler: ClientSide
        self.io = StreamIO()

    @property
    def old(self) -> agent_session.AgentSession:
        (found,) = self.sessions._open
        return found

    def old_of(self, letter: str) -> agent_session.AgentSession:
        (found,) = [one for one in self.sessions._open if one._join_id == letter * 16]
        return found

    async def cut(self) -> None:
        """Lose the connection and wait until both ends have noticed."""
        assert self.client.transport is not None
        self.client.transport.abort()
        await self.until(lambda: self.client.state is State.DETACHED and self.sessions.detached == 1)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.005)

    async def echo(self, data: bytes) -> None:
        await self.io.write(data)
        got = b""
        async with asyncio.timeout(30):
            while len(got) < len(data):
                got += await self.io.read(len(data) - len(got))
        assert got == data


@asynccontextmanager
async def holding(**settings: Any) -> AsyncIterator[Held]:
    judge, clock = FakeAuthenticator(), Clock()
    judge.add("t", "alice", "dev")
    judge.add("m", "mallory")
    sessions, proxy = make_sessions(judge, clock, **settings)
    held = Held(sessions, proxy, judge, clock)
    async with joined(sessions, via="relay-1:443") as (held.client, held.handler):
        held.client.open("kubernetes", held.io)
        await held.echo(b"before")
        yield held


def written(audit: Path) -> list[dict[str, Any]]:
    """The records of a file, without the two of the chain itself: where it begins and where it ends."""
    return [json.loads(line) for line in audit.read_text().splitlines()][1:-1]

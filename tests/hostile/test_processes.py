"""Some of the lies with real processes, started from settings: what a user reads at the command line, and exit codes.

The other tests of this folder run all roles in one event loop. These show that nothing of what they find depends on
that.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from arcbridge.errors import ExitCode
from tests.hostile.organisation import Client, Person, TaggedApiServer
from tests.support import world as world_module
from tests.support.reports import records, until, wait_for_record
from tests.support.world import ALICE, BOB, ApiServer, User, World

SCRIPT = "tests.hostile.process"


@contextlib.asynccontextmanager
async def world_with(
    directory: Path, monkeypatch: pytest.MonkeyPatch, role: str, lie: str
) -> AsyncIterator[tuple[World, TaggedApiServer]]:
    """An organisation whose relay or agent lies; its API server is in this process."""
    honest = world_module.arcbridge

    def lying(*args: str) -> list[str]:
        if args[:3] == ("--role", role, "--config"):
            return [sys.executable, "-m", SCRIPT, lie, *args]
        return honest(*args)

    monkeypatch.setattr(world_module, "arcbridge", lying)
    async with TaggedApiServer.serving(directory) as api:
        world = World(ApiServer(api.url, api.ca_file, api.token_file), directory=directory / "world")
        try:
            await asyncio.to_thread(world.start)
            yield world, api
        finally:
            await asyncio.to_thread(world.stop)


async def refused(world: World, user: User = ALICE) -> str:
    """Run a proxy, which must not start; the one line that it prints."""
    done = await asyncio.to_thread(world.run_client, user, "--port", "0", timeout=40)
    assert done.returncode in (ExitCode.FAILURE, ExitCode.UNREACHABLE), done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return re.sub(r" \(session [0-9a-f]{16}\)\Z", "", line.removeprefix("error: "))


async def test_b2_a_relay_that_crosses_two_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world_with(tmp_path, monkeypatch, "relay", "crosses-users") as (world, api):
        lines = await asyncio.gather(refused(world, ALICE), refused(world, BOB))
        for line in lines:
            assert line == (
                f'the relay joined you to an agent of cluster "{world.cluster}" that came for another user; if it '
                "happens again, tell the relay's operator"
            )
        await asyncio.to_thread(
            until, lambda: len(records(world.agent, "session refused")) == 2, "the agent has refused both"
        )
        told = records(world.agent, "session refused")
        assert [one["reason"] for one in told] == [
            "the client was joined under another id than this agent: the relay has crossed two joins"
        ] * 2
        assert api.requests == []


async def test_d2_an_agent_with_the_certificate_of_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world_with(tmp_path, monkeypatch, "agent", "strange-certificate") as (world, api):
        assert await refused(world) == (
            f'the peer that answered for cluster "{world.cluster}" is not certified by its CA; another party may be in '
            "between: tell the relay's operator"
        )
        assert await asyncio.to_thread(records, world.agent, "session opened") == []
        assert api.requests == []


async def test_b1_a_relay_that_flips_a_bit_of_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world_with(tmp_path, monkeypatch, "relay", "flips-an-answer") as (world, api):
        api.repeats = 8000
        started: Any = await asyncio.to_thread(world.start_client, ALICE)
        caller = Client(Person(ALICE.email), world.cluster, started.directory)
        answer = await caller.get()
        assert answer.status == 200
        assert len(answer.body) > 200_000
        told = await asyncio.to_thread(wait_for_record, started.process, "connection lost, waiting to resume")
        assert told["reason"].startswith("bytes were altered on the way between client and agent")
        # The answer may be whole before its log line is there.
        await asyncio.to_thread(until, lambda: records(world.agent, "session resumed"), "the agent resumed the session")
        assert len(records(world.agent, "session resumed")) == 1
        assert [request.header("impersonate-user") for request in api.requests] == [[ALICE.email.encode()]]

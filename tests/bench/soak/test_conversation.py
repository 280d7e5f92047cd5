"""Both ends against each other, with an honest network between them and with one that changes a byte."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from bench.soak import conversation, load
from bench.soak.accounts import Accounts, settle
from bench.soak.load import Load
from bench.soak.records import Kind
from bench.soak.target import Target
from tests.support.fault_proxy import FaultProxy, Plan

SEED = bytes(16)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "PACE", dict.fromkeys(Kind, 0.002))
    monkeypatch.setattr(load, "RAMP", 0.001)
    monkeypatch.setattr(load, "PAUSE", 0.01)


class Scene:
    """A load and a target in one process, each with its ledger, and what lies between them."""

    def __init__(self, near: Load, far: Target, ledgers: tuple[io.StringIO, io.StringIO]) -> None:
        self.load, self.target = near, far
        self._ledgers = ledgers

    async def run(self, streams: int, until: Callable[[], bool]) -> Accounts:
        """Run streams until `until` is true, end them in order, and return their accounts."""
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            places = [group.create_task(self.load.keep(place)) for place in range(streams)]
            while not until():
                await asyncio.sleep(0.01)
            self.load.room.draining = True
            await asyncio.wait(places)
            if self.target.tasks:
                await asyncio.wait(self.target.tasks)
        near, far = ([json.loads(line) for line in ledger.getvalue().splitlines()] for ledger in self._ledgers)
        return settle(near, far, self.load.opened)


@asynccontextmanager
async def scene(second: Plan | None = None) -> AsyncIterator[Scene]:
    """`second`: what happens to the second connection."""
    near, far = io.StringIO(), io.StringIO()
    target = Target(SEED, far)
    async with await asyncio.start_server(target.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with FaultProxy(("127.0.0.1", port), plan=lambda number: (number == 1 and second) or Plan()) as proxy:
            yield Scene(Load([proxy.port], SEED, near), target, (near, far))


async def test_an_honest_network_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LIVES", (0.1, 0.4))
    async with scene() as it:
        accounts = await it.run(8, lambda: it.load.completed >= 24)
    assert accounts.sound
    assert (accounts.opened, accounts.failed) == (accounts.completed, 0)
    assert accounts.completed >= 24
    assert not accounts.reasons
    assert accounts.bytes_up > 0
    assert accounts.bytes_down > 0


@pytest.mark.parametrize("plan", [Plan(flip_up=2000), Plan(flip_down=2000)], ids=["up", "down"])
async def test_a_changed_byte_is_caught(plan: Plan) -> None:
    async with scene(plan) as it:
        accounts = await it.run(5, lambda: it.load.failed > 0)
    assert not accounts.sound
    assert (accounts.bytes_lost, accounts.bytes_doubled, accounts.bytes_wrong) == (0, 0, 1)
    assert accounts.failed == 1, "its neighbours noticed nothing"
    assert accounts.opened == accounts.completed + accounts.failed
    assert [reason.split()[0] for reason in accounts.reasons] == ["bytes"]
    assert accounts.unexplained == 1

"""Both ends against each other, with an honest network between them and with every kind of liar: each one is caught."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from bench.soak import conversation, load
from bench.soak.accounts import Accounts, Kill, settle, stalls
from bench.soak.load import Load
from bench.soak.records import Kind
from bench.soak.target import Target
from tests.support.eventually import until

SEED = bytes(16)
AT = 2000
"""The byte at which liars lie: inside a record, or where two meet."""
SIZE = 100

Liar = Callable[[bytes], bytes]
"""What a direction says from byte AT on -> what arrives of it."""


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "PACE", dict.fromkeys(Kind, 0.002))
    monkeypatch.setattr(load, "RAMP", 0.001)
    monkeypatch.setattr(load, "PAUSE", 0.01)


class Network:
    """Passes connections on to `port`; of the `liar_at`-th it lies in one direction, once."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.accepted = 0
        self.liar_at = 0
        self.lie: Liar | None = None
        self.up = False
        self.end: Callable[[asyncio.StreamWriter, asyncio.StreamWriter], None] | None = None
        self.lied = asyncio.Event()
        self.ended: set[asyncio.StreamWriter] = set()
        """What a lie has ended. All that comes for them is dropped: a reset would tell what the end in order hides."""
        self.tasks: set[asyncio.Task[None] | None] = set()
        """What passes on now. Without a reference from here the collector may take a task whose sockets both wait."""

    async def pass_on(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self.tasks.add(task)
        self.accepted += 1
        lying = self.accepted == self.liar_at
        far, forth = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            await asyncio.gather(
                self._copy(near, forth, back, lying and self.up), self._copy(far, back, forth, lying and not self.up)
            )
        finally:
            back.close()
            forth.close()
            self.tasks.discard(task)

    async def _copy(
        self, source: asyncio.StreamReader, to: asyncio.StreamWriter, other: asyncio.StreamWriter, lying: bool
    ) -> None:
        try:
            if lying:
                to.write(await source.readexactly(AT))
                if self.end is not None:
                    await to.drain()
                    self.lied.set()
                    self.ended |= {to, other}
                    self.end(to, other)
                elif self.lie is not None:
                    # Enough for any liar, and for what comes to be recognised.
                    to.write(self.lie(await source.readexactly(4 * SIZE)))
                    self.lied.set()
            while data := await source.read(65536):
                if to not in self.ended:
                    to.write(data)
                    await to.drain()
            if to not in self.ended:
                to.write_eof()
        except (OSError, RuntimeError):  # uvloop: RuntimeError when it is closed already
            _reset(to, other)  # as a network that tells what it knows


def _reset(*writers: asyncio.StreamWriter) -> None:
    for writer in writers:
        sock = writer.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


class Scene:
    """A load, a network and a target in one process, each with its ledger."""

    def __init__(self, network: Network, near: Load, far: Target, ledgers: tuple[io.StringIO, io.StringIO]) -> None:
        self.network, self.load, self.target = network, near, far
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
        near, far = self.rows()
        return settle(near, far, self.load.opened)

    def rows(self) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
        near, far = ([json.loads(line) for line in ledger.getvalue().splitlines()] for ledger in self._ledgers)
        return near, far


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    near, far = io.StringIO(), io.StringIO()
    target = Target(SEED, far)
    async with await asyncio.start_server(target.serve, "127.0.0.1", 0) as server:
        network = Network(server.sockets[0].getsockname()[1])
        async with await asyncio.start_server(network.pass_on, "127.0.0.1", 0) as middle:
            yield Scene(network, Load([middle.sockets[0].getsockname()[1]], SEED, near), target, (near, far))


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


LIES: dict[str, tuple[Liar, tuple[int, int, int]]] = {
    "drop": (lambda data: data[SIZE:], (SIZE, 0, 0)),
    "drop one": (lambda data: data[1:], (1, 0, 0)),
    "double": (lambda data: data[:SIZE] + data, (0, SIZE, 0)),
    "double one": (lambda data: data[:1] + data, (0, 1, 0)),
    "swap": (lambda data: data[SIZE : 2 * SIZE] + data[:SIZE] + data[2 * SIZE :], (SIZE, 0, 0)),
    "change": (lambda data: bytes([data[0] ^ 1]) + data[1:], (0, 0, 1)),
    "insert": (lambda data: bytes(SIZE) + data, (0, 0, 1)),
}


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("lie", LIES)
async def test_a_liar_is_caught(lie: str, up: bool) -> None:
    async with scene() as it:
        network = it.network
        network.lie, expected = LIES[lie]
        network.up, network.liar_at = up, 2
        accounts = await it.run(5, lambda: it.load.failed > 0)
    assert not accounts.sound
    assert (accounts.bytes_lost, accounts.bytes_doubled, accounts.bytes_wrong) == expected
    assert accounts.failed == 1, "its neighbours noticed nothing"
    assert accounts.opened == accounts.completed + accounts.failed
    assert [reason.split()[0] for reason in accounts.reasons] == ["bytes"]
    assert accounts.unexplained == 1


async def test_a_stall_is_the_longest_wait_for_a_record() -> None:
    async with scene() as it:
        it.load.room.kill(0)
        done = asyncio.Event()

        async def script() -> None:
            await until(lambda: it.load.opened >= 4)
            await asyncio.sleep(0.3)  # some of the streams have a record each way by then
            for room in (it.load.room, it.target.room):
                room.kill(1)
            await asyncio.sleep(0.3)  # the stall that the accounts have to find
            done.set()

        task = asyncio.ensure_future(script())
        await it.run(4, done.is_set)
        await task
    near, far = it.rows()
    hit = [Kill(0, 0, 0.0, frozenset({0})), Kill(1, 1, 0.0, frozenset({0})), Kill(1, 1, 0.0, frozenset())]
    found = stalls(near, far, hit[:2])
    assert found[0] == [], "no stream was open then"
    assert len(found[1]) >= 1
    assert all(0 < stall < 60 for stall in found[1])
    assert stalls(near, far, hit[2:])[1] == [], "a kill that hit no session"

"""A relay that meddles with the bytes it carries: the real pumps, with a stretch of wire inside on which a lie acts.

The relay cannot read what it carries, but it sees where TLS records begin and end (RFC 8446 §5.1), and when. So a lie
acts on a record of one direction. Everything that passes is kept, for tests that look for secrets in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from arcbridge.relay.pump import Pump, Pumps

TO_AGENT, TO_CLIENT = "to_agent", "to_client"


class End(Exception):
    """The wire ends here: both sides get a FIN."""


@dataclass
class Wire:
    """What happens to the records of one pair of connections; a subclass overrides `pass_on`."""

    number: int = 0
    """Which pair of the relay this is, from 0."""
    passed: dict[str, bytearray] = field(default_factory=lambda: {TO_AGENT: bytearray(), TO_CLIENT: bytearray()})
    """What the ends sent, before the lie."""

    sinks: dict[str, socket.socket] = field(default_factory=dict)
    """Where the records of each direction go."""

    async def pass_on(self, direction: str, number: int, record: bytes) -> Iterable[bytes]:
        """What leaves in the place of a record; `number` counts the records of a direction from 0."""
        return (record,)


@dataclass
class OnRecord(Wire):
    """Acts on one record, of one direction: the first for which `when` says so."""

    direction: str = TO_AGENT
    when: Callable[[int, bytes], bool] = lambda number, record: False
    act: Callable[[bytes], Iterable[bytes]] = lambda record: (record,)
    acted: list[bytes] = field(default_factory=list)
    """The records on which it has acted."""

    async def pass_on(self, direction: str, number: int, record: bytes) -> Iterable[bytes]:
        if direction != self.direction or self.acted or not self.when(number, record):
            return (record,)
        self.acted.append(record)
        return self.act(record)


class MeddlingPumps(Pumps):
    """Pumps whose bytes take a way round; `wire` makes what acts on each pair."""

    def __init__(self, *args: Any, wire: Callable[[int], Wire], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._wire = wire
        self.wires: list[Wire] = []
        self._carrying: set[asyncio.Task[None]] = set()

    def join(self, client: socket.socket, agent: socket.socket, **settings: Any) -> Pump:
        near, far = tcp_pair()
        wire = self._wire(len(self.wires))
        wire.number = len(self.wires)
        self.wires.append(wire)
        wire.sinks = {TO_AGENT: agent, TO_CLIENT: far}
        pump = super().join(client, near, **settings)
        task = asyncio.ensure_future(self._carry(wire, far, agent))
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)
        return pump

    def close(self) -> None:
        super().close()
        for task in self._carrying:
            task.cancel()

    async def _carry(self, wire: Wire, far: socket.socket, agent: socket.socket) -> None:
        ways = [
            asyncio.ensure_future(self._one_way(wire, TO_AGENT, far)),
            asyncio.ensure_future(self._one_way(wire, TO_CLIENT, agent)),
        ]
        try:
            with contextlib.suppress(OSError, End):
                await asyncio.gather(*ways)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            far.close()
            agent.close()

    def cross(self) -> None:
        """Exchange the agents of the first two pairs."""
        first, second = self.wires[:2]
        for direction in (TO_AGENT, TO_CLIENT):
            ours, theirs = first.sinks[direction], second.sinks[direction]
            first.sinks[direction], second.sinks[direction] = theirs, ours

    async def _one_way(self, wire: Wire, direction: str, source: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        number = 0
        async for record in records(source, wire.passed[direction]):
            for piece in await wire.pass_on(direction, number, record):
                await loop.sock_sendall(wire.sinks[direction], piece)
            number += 1
        wire.sinks[direction].shutdown(socket.SHUT_WR)


async def records(source: socket.socket, passed: bytearray) -> AsyncIterator[bytes]:
    """The TLS records that come, whole."""
    loop = asyncio.get_running_loop()
    held = bytearray()
    while data := await loop.sock_recv(source, 65536):
        held += data
        passed += data
        while len(held) >= 5 and len(held) >= (size := 5 + int.from_bytes(held[3:5], "big")):
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    near.setblocking(False)
    far.setblocking(False)
    return near, far


# -- what a lie does with a record ---------------------------------------------------------------------------------


def drop(record: bytes) -> Iterable[bytes]:
    return ()


def flip(record: bytes) -> Iterable[bytes]:
    """One bit of the payload."""
    at = 5 + (len(record) - 5) // 2
    return (record[:at] + bytes([record[at] ^ 0x10]) + record[at + 1 :],)


def duplicate(record: bytes) -> Iterable[bytes]:
    return (record, record)


def truncate(record: bytes) -> Iterable[bytes]:
    """Half of it, and then an end in order, as the relay can make one of TCP but not of TLS."""
    yield record[: len(record) // 2]
    raise End


def end(record: bytes) -> Iterable[bytes]:
    """An end in order at the end of a record."""
    yield record
    raise End


def insert(record: bytes) -> Iterable[bytes]:
    """A record of the relay's own before it, of the same kind and size."""
    return (record[:5] + bytes(len(record) - 5), record)

"""One end of one stream: the same at the load and at the target, except for who speaks first and who may end first.

An end leaves one row in its ledger, whatever happens. The rows of both ends are joined by `bench.soak.accounts`.
"""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import random
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, TextIO

from bench.soak.records import Direction, Kind, Mismatch, Preamble, Receiver, Sender, Tally

CLEAN = "clean"

PACE = {Kind.CHATTY: 0.2, Kind.BULKY: 0.25}
"""Seconds between two records of one direction, on average; each pause is up to a quarter longer or shorter."""
BURST = 32
"""Records that a bulky stream sometimes sends at once: a quarter of a megabyte, so that cuts also hit full windows."""
BURST_CHANCE = 0.01
PATIENCE = 150.0
"""Seconds: longer than a session waits for a connection (120 s)."""
_READ = 65536


class Waits:
    """How long a reader waited for its next record, kill by kill; seconds, monotonic (one clock for all processes)."""

    def __init__(self, now: float) -> None:
        self.first = 0.0
        """From the opening to the first record."""
        self.stalls: dict[int, float] = {}
        self._opened = self._last = now
        self._kills: list[tuple[int, float]] = []
        """The last kill and when it was, and those before it since which no record has come."""

    def arrived(self, now: float) -> None:
        """Note that a record or the end arrived."""
        if not self.first:
            self.first = now - self._opened
        for number, _ in self._kills:
            self._waited(number, now)
        del self._kills[:-1]
        self._last = now

    def kill(self, number: int, now: float) -> None:
        """A relay is about to be killed: what follows counts for this kill, up to the next one.

        A wait under way counts whole, from the record before. It goes on counting for the kill before only if no record
        has come since that one either.
        """
        for before, at in self._kills:
            if self._last >= at:
                self._waited(before, now)
        self._kills = [kill for kill in self._kills if self._last < kill[1]]
        self._kills.append((number, now))

    def end(self, now: float) -> None:
        """Note that the reader waits for nothing more."""
        if self._kills:
            self.arrived(now)
        self._kills.clear()

    def _waited(self, number: int, now: float) -> None:
        self.stalls[number] = max(self.stalls.get(number, 0.0), round(now - self._last, 4))


@dataclass(slots=True)
class Half:
    """How one direction ended at one end."""

    end: str = ""
    """`clean`, or why not; empty while it runs."""
    mismatch: str = ""
    """What a reader found: `lost`, `doubled`, `wrong`; and how many bytes."""
    count: int = 0

    def row(self, tally: Tally) -> dict[str, Any]:
        """Return the ledger's entry for this direction."""
        row = {"bytes": tally.bytes, "records": tally.records, "sha256": tally.digest.hex(), "end": self.end}
        return row | ({"mismatch": self.mismatch, "count": self.count} if self.mismatch else {})


class Room:
    """What the streams of one process share."""

    def __init__(self, ledger: TextIO, side: str, patience: float = PATIENCE) -> None:
        self.patience = patience
        """Seconds without a byte after which a stream has hung."""
        self.draining = False
        """Streams are to end in order now."""
        self.live = 0
        self.rows = 0
        self.bytes = {"sent": 0, "received": 0}
        self._ledger = ledger
        self._side = side
        self._waits: set[Waits] = set()

    def wait(self) -> Waits:
        """Return the waits of one more reader."""
        waits = Waits(time.monotonic())
        self._waits.add(waits)
        return waits

    def over(self, waits: Waits) -> None:
        """Note that a reader is done."""
        waits.end(time.monotonic())
        self._waits.discard(waits)

    def kill(self, number: int) -> None:
        """A relay is about to be killed."""
        now = time.monotonic()
        for waits in self._waits:
            waits.kill(number, now)

    def write(self, row: dict[str, Any]) -> None:
        """Write one row of the ledger."""
        self.rows += 1
        print(json.dumps({"side": self._side, **row}), file=self._ledger, flush=True)


class End:
    """One end of a stream on an open TCP connection."""

    def __init__(
        self,
        room: Room,
        preamble: Preamble,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        outgoing: Direction,
        *,
        client: int | None = None,
    ) -> None:
        self.sent, self.received = Half(), Half()
        self._room = room
        self._preamble = preamble
        self._reader, self._writer = reader, writer
        self._outgoing = outgoing
        self._client = client
        self._sender = Sender(preamble, outgoing)
        self._receiver = Receiver(preamble, Direction(1 - outgoing))
        self._enough = asyncio.Event()
        """This end has no more to say."""
        self._waits = room.wait()
        self._random = random.Random(preamble.stream * 2 + outgoing)

    @property
    def clean(self) -> bool:
        """Both directions ended in order, and every byte that came was right."""
        return self.sent.end == self.received.end == CLEAN

    async def run(self, life: float = math.inf) -> None:
        """Speak for `life` seconds, or as long as the other end does, end in order, write the row.

        What goes wrong with the stream is never raised; a stream with a wrong byte is cut at once. When cancelled,
        the stream is cut too.
        """
        begun = time.monotonic()
        self._room.live += 1
        try:
            async with asyncio.TaskGroup() as group:
                speaking = group.create_task(self._speak(begun + life))
                group.create_task(self._listen(speaking))
        finally:
            self._room.live -= 1
            self._room.over(self._waits)
            self._close()
            self._room.write(
                {
                    "stream": self._preamble.stream,
                    **({} if self._client is None else {"client": self._client}),
                    "kind": self._preamble.kind.name.lower(),
                    "begun": round(begun, 3),
                    "seconds": round(time.monotonic() - begun, 3),
                    "first_record_s": round(self._waits.first, 4),
                    "sent": self.sent.row(self._sender.tally),
                    "received": self.received.row(self._receiver.tally),
                    "stalls": self._waits.stalls,
                }
            )

    def _close(self) -> None:
        if self.clean:
            self._writer.close()
            return
        # A FIN would look like an end in order to the other end.
        sock = self._writer.get_extra_info("socket")
        try:
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass  # it is dead already
        self._writer.transport.abort()

    # -- speaking ---------------------------------------------------------------------------------------------------

    async def _speak(self, until: float) -> None:
        try:
            await self._send(self._sender.opening())
            if self._answers:
                await self._enough.wait()
            else:
                await self._talk(until)
            await self._send(self._sender.trailer())
            self._require_open()
            self._writer.write_eof()
            self.sent.end = CLEAN
        except OSError as error:
            self.sent.end = _broken(error)
        except asyncio.CancelledError:
            self.sent.end = self.sent.end or "given up"
            raise

    @property
    def _answers(self) -> bool:
        """Whether this end says one record for each that it hears, and nothing else."""
        return self._outgoing is Direction.DOWN and self._preamble.kind is Kind.CHATTY

    async def _talk(self, until: float) -> None:
        kind = self._preamble.kind
        while not self._enough.is_set() and not self._room.draining and time.monotonic() < until:
            burst = kind is Kind.BULKY and self._random.random() < BURST_CHANCE
            for _ in range(BURST if burst else 1):
                await self._send(self._sender.next())
            self._look()
            await asyncio.sleep(PACE[kind] * self._random.uniform(0.75, 1.25))

    async def _send(self, data: bytes) -> None:
        self._require_open()
        self._room.bytes["sent"] += len(data)
        self._writer.write(data)
        await self._writer.drain()

    def _require_open(self) -> None:
        if self._writer.is_closing():  # uvloop has another error for it
            raise ConnectionResetError(errno.ECONNRESET, "it was cut before")

    def _look(self) -> None:
        """The target ends when it has heard all, or has said what it was to say; the load when its time is over."""
        if self._outgoing is Direction.DOWN:
            most = self._preamble.target_records
            if self._receiver.ended or (most and self._sender.tally.records >= most):
                self._enough.set()

    # -- listening --------------------------------------------------------------------------------------------------

    async def _listen(self, speaking: asyncio.Task[None]) -> None:
        received = self.received
        try:
            while True:
                async with asyncio.timeout(self._room.patience):
                    data = await self._reader.read(_READ)
                if not data:
                    self._receiver.eof()
                    received.end = CLEAN
                    self._room.over(self._waits)
                    return
                self._room.bytes["received"] += len(data)
                completed = self._receiver.feed(data)
                if completed:
                    self._waits.arrived(time.monotonic())
                    await self._heard(completed - self._receiver.ended)
        except TimeoutError as error:
            received.end = _broken(error) if error.errno else f"hung: nothing came for {self._room.patience:g} s"
        except OSError as error:
            received.end = _broken(error)
        except Mismatch as error:
            received.end = str(error)
            received.mismatch = error.what
            received.count = error.count
        except asyncio.CancelledError:
            received.end = "given up"
            raise
        # A failure of one direction ends both.
        self.sent.end = self.sent.end or received.end
        speaking.cancel()

    async def _heard(self, records: int) -> None:
        if self._answers:
            for _ in range(records):
                if not self._enough.is_set() and self.sent.end == "":
                    await self._send(self._sender.next())
                    self._look()
        self._look()


def _broken(error: OSError) -> str:
    return f"cut: {os.strerror(error.errno)}" if error.errno else f"cut: {type(error).__name__}"

"""What the soak's streams say: records whose every byte the reader knows before it comes.

A direction of a stream is records, then one trailer, then FIN; the way to the target begins with a preamble that says
which stream it is. All numbers are big endian:

    preamble   "SOAK" | run seed (16) | stream (8) | kind (1) | records after which the target ends (4) | crc32 (4)
    record     seq (8) | length (4) | payload (length) | crc32 of all before (4)
    trailer    records (8) | 0xFFFFFFFF (4) | bytes before the trailer (8) | SHA-256 of them (32) | crc32 (4)

Length and payload are SHAKE-128 of (seed, stream, direction, kind, seq). Nothing here shares code with arcbridge, on
purpose: a fault in one must not hide in the other.
"""

from __future__ import annotations

import enum
import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_HEADER = struct.Struct("!QI")
_CRC = struct.Struct("!I")
_TRAILER = struct.Struct("!QIQ32s")
_PREAMBLE = struct.Struct("!4s16sQBI")
_MAGIC = b"SOAK"
_LAST = 0xFFFFFFFF
_HORIZON = 1024 * 1024
"""Bytes to either side in which bytes out of place are looked for."""
_ENOUGH = 24
"""Bytes by which a place is recognised."""

PREAMBLE_SIZE = _PREAMBLE.size + _CRC.size
TRAILER_SIZE = _TRAILER.size + _CRC.size


class Kind(enum.IntEnum):
    """How a stream talks."""

    CHATTY = 0
    """Short records; the target answers each with one of its own."""
    BULKY = 1
    """Longer records, both ways on their own, now and then many at once."""


SIZES = {Kind.CHATTY: (16, 256), Kind.BULKY: (1024, 16384)}
"""The shortest and the longest payload, bytes."""


class Direction(enum.IntEnum):
    """Which way a record goes."""

    UP = 0
    """To the target."""
    DOWN = 1
    """From the target."""


class Mismatch(Exception):
    """A reader got what it must not get. `count`: bytes lost, or doubled; 1 where that cannot be told."""

    def __init__(self, what: Literal["lost", "doubled", "wrong"], count: int, detail: str) -> None:
        super().__init__(f"{count} bytes {what}: {detail}")
        self.what = what
        self.count = count


@dataclass(frozen=True, slots=True)
class Preamble:
    """What a stream's first bytes say: run, stream, and how it talks."""

    seed: bytes
    """16 bytes, one seed per run."""
    stream: int
    kind: Kind
    target_records: int
    """The target ends its direction after so many records, when that comes first; 0: when the other direction ends."""

    def encode(self) -> bytes:
        """Return the preamble's bytes on the wire."""
        head = _PREAMBLE.pack(_MAGIC, self.seed, self.stream, self.kind, self.target_records)
        return head + _CRC.pack(zlib.crc32(head))

    @classmethod
    def decode(cls, data: bytes) -> Preamble:
        """Read the preamble from `PREAMBLE_SIZE` bytes. Raises Mismatch."""
        head, crc = data[: _PREAMBLE.size], data[_PREAMBLE.size :]
        magic, seed, stream, kind, target_records = _PREAMBLE.unpack(head)
        if magic != _MAGIC or crc != _CRC.pack(zlib.crc32(head)) or kind not in set(Kind):
            raise Mismatch("wrong", 1, "a stream did not begin with its preamble")
        return cls(seed, stream, Kind(kind), target_records)


class Script:
    """All records of one direction of one stream."""

    def __init__(self, preamble: Preamble, direction: Direction) -> None:
        self._low, high = SIZES[preamble.kind]
        self._span = high - self._low + 1
        self.key = preamble.seed + struct.pack("!QBB", preamble.stream, direction, preamble.kind)
        self._base = hashlib.shake_128(self.key)

    def record(self, seq: int) -> bytes:
        """Return one whole record."""
        source = self._base.copy()
        source.update(seq.to_bytes(8, "big"))
        length = self._low + int.from_bytes(source.digest(4), "big") % self._span
        body = _HEADER.pack(seq, length) + source.digest(4 + length)[4:]
        return body + _CRC.pack(zlib.crc32(body))

    def records(self, seq: int, step: int = 1) -> Iterator[bytes]:
        """Records from `seq` on, or back to the first with a step of -1."""
        while seq >= 0:
            yield self.record(seq)
            seq += step

    def trailer(self, records: int, total: int, digest: bytes) -> bytes:
        """Return the trailer. Its crc covers stream and direction, so that another stream's is wrong."""
        body = _TRAILER.pack(records, _LAST, total, digest)
        return body + _CRC.pack(zlib.crc32(self.key + body))


class Tally:
    """What one end counts of one direction."""

    def __init__(self) -> None:
        self.records = 0
        self.bytes = 0
        self._sha = hashlib.sha256()

    def count(self, data: bytes | bytearray | memoryview) -> None:
        """Count the bytes that arrived."""
        self.bytes += len(data)
        self._sha.update(data)

    @property
    def digest(self) -> bytes:
        """Return the SHA-256 of all counted bytes."""
        return self._sha.digest()


class Sender:
    """Makes one direction, in order. What it returned counts as sent."""

    def __init__(self, preamble: Preamble, direction: Direction) -> None:
        self._script = Script(preamble, direction)
        self._opening = preamble.encode() if direction is Direction.UP else b""
        self.tally = Tally()
        self.ended = False

    def opening(self) -> bytes:
        """Return what comes before the first record."""
        self.tally.count(self._opening)
        return self._opening

    def next(self) -> bytes:
        """Return the next record."""
        record = self._script.record(self.tally.records)
        self.tally.records += 1
        self.tally.count(record)
        return record

    def trailer(self) -> bytes:
        """Return the trailer; no record follows it."""
        trailer = self._script.trailer(self.tally.records, self.tally.bytes, self.tally.digest)
        self.tally.count(trailer)
        self.ended = True
        return trailer


class Receiver:
    """Compares one direction with what it must be, byte by byte. The preamble is the caller's business (`opening`)."""

    def __init__(self, preamble: Preamble, direction: Direction) -> None:
        self._script = Script(preamble, direction)
        self._buffer = bytearray()
        self._expected = b""
        self.tally = Tally()
        self.ended = False
        """The trailer has come, and was right."""
        if direction is Direction.UP:
            self.tally.count(preamble.encode())

    def feed(self, data: bytes) -> int:
        """Bytes arrived; how many records they completed, the trailer included. Raises Mismatch."""
        self._buffer += data
        completed = 0
        while len(self._buffer) >= _HEADER.size:
            if self.ended:
                raise Mismatch("doubled", len(self._buffer), "bytes behind the trailer")
            if self._at_trailer():
                if len(self._buffer) < TRAILER_SIZE:
                    break
                self._end()
            else:
                expected = self._expected = self._expected or self._script.record(self.tally.records)
                if not self._buffer.startswith(expected):
                    if not self._differs(whole=False):
                        break  # so far it is right, or too short to tell where it belongs
                    raise self._misplaced()
                self.tally.records += 1
                self._take(len(expected))
            completed += 1
        return completed

    def eof(self) -> None:
        """The direction ended in order. Raises Mismatch, unless the trailer was the last that came.

        Then how much is missing is for the accounts to say: this end cannot know what the other still sent.
        """
        if self.ended and self._buffer:
            raise Mismatch("doubled", len(self._buffer), "bytes behind the trailer")
        if self._buffer and not self._at_trailer() and self._differs(whole=True):
            raise self._misplaced()
        # Right, so far as they go: with an end in order these bytes did arrive.
        self.tally.count(bytes(self._buffer))
        self._buffer.clear()
        if not self.ended:
            raise Mismatch("lost", 0, f"ended in order after {self.tally.bytes} bytes, but without a trailer")

    def _at_trailer(self) -> bool:
        return len(self._buffer) >= _HEADER.size and _HEADER.unpack_from(self._buffer)[1] == _LAST

    def _take(self, count: int) -> None:
        self.tally.count(bytes(self._buffer[:count]))
        del self._buffer[:count]
        self._expected = b""

    def _end(self) -> None:
        records, _, total, digest = _TRAILER.unpack_from(self._buffer)
        tally = self.tally
        if self._buffer[:TRAILER_SIZE] != self._script.trailer(records, total, digest):
            raise Mismatch("wrong", 1, f"a trailer that is none, at byte {tally.bytes}")
        if total > tally.bytes:
            raise Mismatch("lost", total - tally.bytes, f"the records before the trailer, from {tally.records} on")
        if (records, total, digest) != (tally.records, tally.bytes, tally.digest):
            raise Mismatch("wrong", 1, f"the trailer tells {records} records, {total} bytes; {tally.records} came")
        self.ended = True
        self._take(TRAILER_SIZE)

    def _differs(self, *, whole: bool) -> bool:
        """Whether what is buffered is not what must stand here, and there is enough of it to say where it belongs."""
        expected = self._expected or self._script.record(self.tally.records)
        at = _first_difference(self._buffer, expected)
        return at < min(len(self._buffer), len(expected)) and (whole or len(self._buffer) - at >= _ENOUGH)

    def _misplaced(self) -> Mismatch:
        """Where the first wrong bytes belong: later in this direction, or earlier, or nowhere."""
        expected = self._script.record(self.tally.records)
        at = _first_difference(self._buffer, expected)
        found = bytes(self._buffer[at : at + _ENOUGH])
        place = f"at byte {self.tally.bytes + at}, record {self.tally.records}"
        if len(found) >= _ENOUGH // 2:
            ahead = _gather(self._script.records(self.tally.records)).find(found, at)
            if ahead >= 0:
                return Mismatch("lost", ahead - at, place)
            behind = b"".join(reversed(_pieces(self._script.records(self.tally.records - 1, -1)))) + expected[:at]
            # The latest place before this one; what came again may be shorter than what it is recognised by.
            after = expected[at:] + self._script.record(self.tally.records + 1)
            back = (behind + after).rfind(found, 0, len(behind) + len(found) - 1)
            if back >= 0:
                return Mismatch("doubled", len(behind) - back, place)
        return Mismatch("wrong", 1, f"{place}: {found.hex()} belongs nowhere near")


def _first_difference(left: bytes | bytearray, right: bytes | bytearray) -> int:
    """The first index at which two strings differ, or the length of the shorter."""
    end = min(len(left), len(right))
    if left[:end] == right[:end]:
        return end
    low, high = 0, end  # equal before `low`, different somewhere before `high`
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _pieces(records: Iterator[bytes]) -> list[bytes]:
    pieces, size = [], 0
    for record in records:
        pieces.append(record)
        size += len(record)
        if size >= _HORIZON:
            break
    return pieces


def _gather(records: Iterator[bytes]) -> bytes:
    return b"".join(_pieces(records))

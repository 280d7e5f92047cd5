"""Keeps the sealed entries of a ledger of revocations, and puts them into frames.

A relay seals what its operators have said of a user's or a cluster's access, one entry for each; an agent keeps the
entries as they are, and gives them back when it connects again, for the relay may have lost its registry meanwhile.
This module knows no seal: an entry is its id and bytes behind it. Invariant: what is kept has `MOST_HELD` bytes at
most, in `MOST_ENTRIES` at most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from struct import Struct
from typing import Final

from arcbridge.errors import RemoteProtocolError
from arcbridge.wire.records import Ledger

FEATURE: Final = "ledger"
"""In the HELLO of an agent: it keeps a ledger, and says next what it holds."""
ID_SIZE: Final = 16
"""Bytes at the beginning of an entry that say what it is about."""
MOST_ENTRY: Final = 8000
"""Bytes of one entry."""
MOST_HELD: Final = 4 * 1024 * 1024
"""Bytes that are kept of one relay: some 20 000 users with their reasons."""
MOST_ENTRIES: Final = 40_000
"""Entries that are kept of one relay, which names 10 000 users at most in each way. One that sends the smallest would
have ten times their bytes taken."""
PORTION: Final = 8000
"""Bytes of entries from which a frame is full: with one entry more it is still below 16 KiB."""
_LENGTH: Final = Struct(">H")


class LedgerEntries:
    """The entries of one ledger, by id. Their order means nothing."""

    def __init__(self) -> None:
        self._entries: dict[bytes, bytes] = {}
        self._size = 0
        self._digest = b""
        """Of the entries as they are; empty where it is not known."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._entries.values())

    def __contains__(self, entry: bytes) -> bool:
        return self._entries.get(entry[:ID_SIZE]) == entry

    def put(self, entry: bytes) -> None:
        """Keep an entry in the place of the one with its id, where there is room."""
        self._digest = b""
        former = self._entries.pop(entry[:ID_SIZE], b"")
        self._size -= len(former)
        if self._size + len(entry) > MOST_HELD or len(self._entries) >= MOST_ENTRIES:
            return
        self._entries[entry[:ID_SIZE]] = entry
        self._size += len(entry)

    def clear(self) -> None:
        self._entries, self._size, self._digest = {}, 0, b""

    def digest(self) -> bytes:
        """Return what is equal for equal entries, and for no others."""
        if not self._digest:  # it is asked for at each connection, and a relay may end those as it likes
            parts = b"".join(hashlib.sha256(entry).digest() for entry in sorted(self))
            self._digest = hashlib.sha256(parts).digest()
        return self._digest


def frames(entries: Iterable[bytes], *, first: bool = False, last: bool = False) -> Iterator[Ledger]:
    """Yield entries in frames, one frame at least; `first` marks the first, `last` the last."""
    part = bytearray()
    for entry in entries:
        part += _LENGTH.pack(len(entry)) + entry
        if len(part) > PORTION:
            yield Ledger(bytes(part), first=first)
            part, first = bytearray(), False
    yield Ledger(bytes(part), first=first, last=last)


def entries_of(ledger: Ledger) -> Iterator[bytes]:
    """Yield the entries of a frame. Raises `RemoteProtocolError` at one that is cut off, too short or too long."""
    at, end = 0, len(ledger.entries)
    while at < end:
        size = int.from_bytes(ledger.entries[at : at + 2], "big")
        at += 2 + size
        if not ID_SIZE < size <= MOST_ENTRY or at > end:
            raise RemoteProtocolError("a LEDGER frame has an entry of an impossible size")
        yield ledger.entries[at - size : at]

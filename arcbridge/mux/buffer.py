"""The one receive buffer of the process.

Every connection reads into it, because parsing is synchronous: what is kept between two reads is copied out, so the
buffer stays in the CPU's cache and an idle connection owns none. A view of it that outlives the callback it was
given to would show one user's bytes to another; tests that use the fixture `poisoned` (tests/conftest.py) overwrite it
after each callback, which turns such a bug into wrong bytes at once.
"""

from __future__ import annotations

SIZE = 256 * 1024
"""One read: larger reads fall out of the second-level cache, smaller ones cost frames (docs/decisions)."""

PAYLOAD = SIZE - 1024
"""Most bytes of one read that become payload: with its header and its TLS records (22 bytes for each 16 KiB) such a
frame fits into one read of the other end, and into one pipe of the relay. One that is 370 bytes longer than a read
takes two reads and two wake-ups at each hop."""

PORTION = 16 * 1024
"""Bytes that are read at a time for a stream whose backlog is full (`wire.backlog`): one TLS record."""

BUFFER = bytearray(SIZE)
VIEW = memoryview(BUFFER)

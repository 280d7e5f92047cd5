"""Pipes for `splice`, few and shared: one is taken only while bytes are in it.

An unprivileged user gets 1,024 pipes of 64 KiB before the kernel makes them smaller (`pipe-user-pages-soft`), and a
pipe costs two descriptors, so a relay with ten thousand pairs cannot own one per direction. It need not: a pipe is
filled and emptied within one wake-up, and stays with a direction only when the receiver is slower than the sender.
When the pool has none to give, the pump copies.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from typing import Final

CAPACITY: Final = 256 * 1024
"""Asked of the kernel for each pipe. A slot of a pipe holds one network fragment (1.4 KiB from a real network), so a
small pipe means small splices; if it is refused, the default of 64 KiB works as well."""
POOL: Final = 64
"""Pipes held at once at most: 128 descriptors, 16 MiB if all are full."""

SUPPORTED: Final = hasattr(os, "splice")


@dataclass(frozen=True, slots=True)
class Pipe:
    reader: int
    writer: int

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class PipePool:
    """Empty pipes; `take` gives None when the limit is reached or the system has none."""

    __slots__ = ("_free", "_limit", "give", "open", "refused")

    def __init__(self, limit: int = POOL) -> None:
        self._limit = limit if SUPPORTED else 0
        self._free: list[Pipe] = []
        self.give = self._free.append
        """Takes back an *empty* pipe."""
        self.open = 0
        """Pipes that exist, free or taken."""
        self.refused = 0
        """How often the pump had to copy for want of a pipe."""

    def take(self) -> Pipe | None:
        if self._free:
            return self._free.pop()
        if self.open >= self._limit:
            self.refused += 1
            return None
        try:
            reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            # Out of descriptors: copying works without any.
            self.refused += 1
            return None
        try:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, CAPACITY)
        except OSError:
            # Over the user's share: the default capacity stays.
            pass
        self.open += 1
        return Pipe(reader, writer)

    def discard(self, pipe: Pipe) -> None:
        """Close a pipe that still holds bytes of a pair: it must never serve another one."""
        pipe.close()
        self.open -= 1

    def close(self) -> None:
        """Close what is free; pipes that are taken are closed by their holders."""
        self._limit = 0
        while self._free:
            self.discard(self._free.pop())

"""Who may hold a connection before having shown who they are: caps in all, per IPv4 address, per IPv6 /64.

The newest is dropped: those who wait already are further along. A connection counts from the moment it is accepted
until its ticket is returned, which is when its token or certificate was found good, or when it is closed. One that was
*set aside*, into a queue that has a bound of its own, counts against its source only.
"""

from __future__ import annotations

from arcbridge.limiters import KeyedConcurrency
from arcbridge.net.address import source_of


class Admission:
    """The caps of one process. `enter` gives a ticket or the name of the cap that refused."""

    __slots__ = ("_sources", "_total", "waiting")

    def __init__(self, total: int, per_source: int) -> None:
        self._total = total
        self._sources: KeyedConcurrency[str] = KeyedConcurrency(per_source)
        self.waiting = 0
        """Connections that hold a ticket."""

    def enter(self, address: str) -> Ticket | str:
        if self.waiting >= self._total:
            return "cap_total"
        source = source_of(address)
        if not self._sources.acquire(source):
            return "cap_address"
        self.waiting += 1
        return Ticket(self, address, source)

    def leave(self, source: str, *, counted: bool = True) -> None:
        self.waiting -= counted
        self._sources.release(source)


class Ticket:
    """One unauthenticated connection; `set_aside` and `leave` may be called more than once."""

    __slots__ = ("_admission", "_counted", "_source", "address")

    def __init__(self, admission: Admission, address: str, source: str) -> None:
        self._admission: Admission | None = admission
        self._counted = True
        self._source = source
        self.address = address
        """The peer's IP, for the log."""

    def set_aside(self) -> None:
        """Count no more against the total."""
        if self._admission is not None and self._counted:
            self._counted = False
            self._admission.waiting -= 1

    def leave(self) -> None:
        if self._admission is not None:
            self._admission.leave(self._source, counted=self._counted)
            self._admission = None

"""Who may hold a connection before having shown who they are: caps in all, per IPv4 address, per IPv6 /64.

The newest is dropped: those who wait already are further along. A connection counts from the moment it is accepted
until its ticket is returned, which is when its token or certificate was found good, or when it is closed.
"""

from __future__ import annotations

from arcbridge.relay.failure_limit import source_of


class Admission:
    """The caps of one process. `enter` gives a ticket or the name of the cap that refused."""

    __slots__ = ("_per_source", "_sources", "_total", "waiting")

    def __init__(self, total: int, per_source: int) -> None:
        self._total = total
        self._per_source = per_source
        self._sources: dict[str, int] = {}
        self.waiting = 0
        """Connections that hold a ticket."""

    def enter(self, address: str) -> Ticket | str:
        if self.waiting >= self._total:
            return "cap_total"
        source = source_of(address)
        held = self._sources.get(source, 0)
        if held >= self._per_source:
            return "cap_address"
        self._sources[source] = held + 1
        self.waiting += 1
        return Ticket(self, address, source)

    def leave(self, source: str) -> None:
        self.waiting -= 1
        held = self._sources[source] - 1
        if held:
            self._sources[source] = held
        else:
            del self._sources[source]


class Ticket:
    """One unauthenticated connection; `leave` may be called more than once."""

    __slots__ = ("_admission", "_source", "address")

    def __init__(self, admission: Admission, address: str, source: str) -> None:
        self._admission: Admission | None = admission
        self._source = source
        self.address = address
        """The peer's IP, for the log."""

    def leave(self) -> None:
        if self._admission is not None:
            self._admission.leave(self._source)
            self._admission = None

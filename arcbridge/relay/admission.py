"""Places for connections that have not shown who they are: in all, for each purpose, for each address.

A connection holds a place from the moment it is accepted until its ticket is returned, which is when its token or
certificate was found good, or when it is closed. This module counts and chooses; it closes nothing itself but calls
`Ticket.on_evicted`, and it never sees a byte of a connection.

Invariant: strangers that say one purpose cannot take the places of another. Each purpose (no ClientHello yet, control,
join, HTTP) has an eighth of the places to itself; the rest is for all, but HTTP has a quarter of all places at most.
Where a newcomer finds no place, one is made by closing a connection that only waits for its peer:

1. for every purpose but HTTP the HTTP connection that has been idle longest: it loses nothing but a handshake;
2. of the newcomer's own purpose one whose address holds `MUCH_MORE` times what the newcomer's does, or one that has
   waited for longer than `PATIENCE`. Of the `CANDIDATES` that have waited longest it is the one whose address holds
   most. So few addresses with many connections give way to many addresses with few, and the first are not sacrificed
   to a crowd of equals, nor do equals displace each other for ever, each time at the price of a handshake;
3. where an address holds all it may, one of that address that has waited for longer than `PATIENCE`.

Without such a connection the newcomer is refused: those that are there are further along.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from itertools import islice
from typing import Final

from arcbridge.limiters import KeyedTokenBucket
from arcbridge.loop_shares import LoopTime, LoopTimes
from arcbridge.net.address import source_of
from arcbridge.settings.config import RelayLimitsConfig

PATIENCE: Final = 2.0
"""Seconds that a connection may wait for its peer before any newcomer may have its place: a handshake over a slow path
takes less, and all deadlines of strangers are longer."""
ARRIVAL_PATIENCE: Final = 0.5
"""The same without a ClientHello, which comes right behind the connection: it takes half a round trip."""
CANDIDATES: Final = 16
"""Connections looked at to find the one that is closed: bounds the cost of a newcomer, whatever waits."""
MUCH_MORE: Final = 2
"""How many times what the newcomer's address holds an address must hold to give way at once. Where any more was enough,
ten addresses of 100 connections each made 1200 handshakes a second, because their counts are never quite equal."""
BURST_SECONDS: Final = 5.0
"""Seconds of its rate that an address may use at once."""
SOURCES: Final = 16_384
"""Addresses whose rate is remembered."""


class Purpose(Enum):
    """What a connection is for, as far as its ClientHello says."""

    __hash__ = object.__hash__  # in C: places are looked up a dozen times for a connection

    ARRIVING = "arriving"
    """Its ClientHello is not complete."""
    CONTROL = "control"
    JOIN = "join"
    """Joins, and the hops of other relays."""
    HTTP = "http"


class _Places:
    """The connections that say one purpose."""

    __slots__ = ("evicted", "held", "waiting")

    def __init__(self) -> None:
        self.held = 0
        """How many hold a place."""
        self.waiting: dict[Ticket, None] = {}
        """Those of them that wait for their peer, in the order in which they began to."""
        self.evicted = 0
        """How many were closed to make room."""


class Admission:
    """The places of one process; `enter` gives a ticket or the name of the bound that refused."""

    def __init__(self, limits: RelayLimitsConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.loop_times: LoopTimes[str] = LoopTimes(0.0, size=SOURCES)
        """Time of the event loop that the connections of each address took."""
        self._rate: KeyedTokenBucket[str] = KeyedTokenBucket(0.0, 0.0, size=SOURCES)
        """Connections, by address."""
        self.change_limits(limits)
        self.places = {purpose: _Places() for purpose in Purpose}
        self.sources: dict[str, dict[Ticket, None]] = {}
        """The connections of each address, oldest first."""

    def change_limits(self, limits: RelayLimitsConfig) -> None:
        """Count by these limits from now on. No connection loses its place; fewer newcomers find one."""
        now, total, rate = self.clock(), limits.unauthenticated, limits.connections_per_second_per_address
        self._per_source = limits.unauthenticated_per_address
        self._reserve = total // 8
        self._shared = total - len(Purpose) * self._reserve
        """Places for all purposes, beyond the reserve that each one has."""
        self._http_most = max(total // 4, 1)
        self.loop_times.change(limits.loop_share_per_address / 100, now)
        self._rate.change(now, rate * BURST_SECONDS, rate)

    @property
    def waiting(self) -> int:
        """Connections that hold a place."""
        return sum(places.held for places in self.places.values())

    def held(self) -> dict[str, int]:
        """Return how many places are taken for each purpose, for the metrics."""
        return {purpose.value: places.held for purpose, places in self.places.items()}

    def evicted(self) -> dict[str, int]:
        """Return how many connections were closed, by purpose, to make room; for the metrics."""
        return {purpose.value: places.evicted for purpose, places in self.places.items()}

    def enter(self, address: str, *, through_proxy: bool = False) -> Ticket | str:
        """Give a connection from `address` a place; `through_proxy`: `Ticket.came_from` says later where it is from.

        A balancer's own address has no bound before the header is read, since every connection comes from it.
        Afterwards it counts for the connections whose header names no origin.
        """
        ticket = Ticket(self, address)
        if not through_proxy and (reason := self.count(ticket, source_of(address))):
            return reason
        if self.place(ticket, Purpose.ARRIVING):
            ticket.leave()
            return "cap_total"
        return ticket

    # -- for tickets -----------------------------------------------------------------------------------------------

    def count(self, ticket: Ticket, source: str) -> str:
        """Count a connection for its address, or return the name of the bound that refuses it."""
        now = self.clock()
        if self._rate.reserve(source, now) is None:
            return "rate_address"
        of_source = self.sources.get(source)
        if of_source is not None and len(of_source) >= self._per_source:
            stalled = next((one for one in of_source if one.waits_since < now - PATIENCE), None)
            if stalled is None:
                return "cap_address"
            self._evict(stalled)
        self.sources.setdefault(source, {})[ticket] = None
        ticket.source = source
        return ""

    def place(self, ticket: Ticket, purpose: Purpose) -> str:
        """Give `ticket`, which has none, a place for `purpose`, or return the name of the bound that refuses it."""
        if not self._free(purpose) and not self._make_room(purpose, ticket):
            return f"cap_{purpose.value}"
        self.places[purpose].held += 1
        ticket.purpose = purpose
        ticket.waits()
        return ""

    # -- inside ----------------------------------------------------------------------------------------------------

    def _free(self, purpose: Purpose) -> bool:
        held = self.places[purpose].held
        if purpose is Purpose.HTTP and held >= self._http_most:
            return False
        if held < self._reserve:
            return True
        return sum(max(places.held - self._reserve, 0) for places in self.places.values()) < self._shared

    def _make_room(self, purpose: Purpose, newcomer: Ticket) -> bool:
        """Close one connection so that `newcomer` has a place for `purpose`; return whether there was one to close."""
        http = self.places[Purpose.HTTP]
        if purpose is not Purpose.HTTP and http.held > self._reserve and http.waiting:
            self._evict(next(iter(http.waiting)))
            return True
        candidates = list(islice(self.places[purpose].waiting, CANDIDATES))
        if not candidates:
            return False
        # Of equals the first, which has waited longest.
        found = max(candidates, key=self._of_its_source)
        patience_ends = self.clock() - (ARRIVAL_PATIENCE if purpose is Purpose.ARRIVING else PATIENCE)
        if self._of_its_source(found) >= MUCH_MORE * self._of_its_source(newcomer) or found.waits_since < patience_ends:
            self._evict(found)
            return True
        if candidates[0].waits_since < patience_ends:
            self._evict(candidates[0])
            return True
        return False

    def _of_its_source(self, ticket: Ticket) -> int:
        return len(self.sources.get(ticket.source, ()))

    def _evict(self, ticket: Ticket) -> None:
        if ticket.purpose is not None:
            self.places[ticket.purpose].evicted += 1
        ticket.leave()
        ticket.on_evicted()


def _nothing() -> None:
    pass


class Ticket:
    """One unauthenticated connection; `set_aside` and `leave` may be called more than once."""

    __slots__ = ("_admission", "_left", "address", "on_evicted", "purpose", "source", "waits_since")

    def __init__(self, admission: Admission, address: str) -> None:
        self._admission = admission
        self._left = False
        self.address = address
        """The peer's IP, for the log; behind a balancer that of the connection's origin, once it is known."""
        self.source = ""
        """The key under which the connection counts for its address; empty: for none."""
        self.purpose: Purpose | None = None
        """What it has a place for; None: it has none."""
        self.waits_since = float("inf")
        """Since when it waits for its peer, monotonic seconds; infinite: the relay works for it."""
        self.on_evicted: Callable[[], None] = _nothing
        """Closes the connection. The place is free already when it is called."""

    @property
    def loop_time(self) -> LoopTime:
        """Whose time of the event loop work for the connection takes: that of its address."""
        return self._admission.loop_times.of(self.source, self._admission.clock())

    def held_for(self) -> float:
        """Return the seconds for which no work begins for the address of the connection."""
        return max(0.0, self.loop_time.held_until - self._admission.clock())

    def came_from(self, address: str) -> str:
        """Count for `address`, of which a balancer has told; return the name of the bound that refuses it, or ""."""
        self.address = address
        return "" if self._left else self._admission.count(self, source_of(address))

    def becomes(self, purpose: Purpose) -> str:
        """Exchange its place for one for `purpose`; return the name of the bound that refuses it, or ""."""
        if self._left:
            return ""
        self.set_aside()
        return self._admission.place(self, purpose)

    def waits(self) -> None:
        """Note that the connection waits for its peer: it may have to make room."""
        if self.purpose is not None:
            waiting = self._admission.places[self.purpose].waiting
            waiting.pop(self, None)
            waiting[self] = None
            self.waits_since = self._admission.clock()

    def works(self) -> None:
        """Note that the relay works for the connection, which keeps its place."""
        if self.purpose is not None:
            self._admission.places[self.purpose].waiting.pop(self, None)
            self.waits_since = float("inf")

    def set_aside(self) -> None:
        """Give the place up and count against the address only: for a queue that has a bound of its own."""
        if self.purpose is not None:
            self.works()
            self._admission.places[self.purpose].held -= 1
            self.purpose = None

    def leave(self) -> None:
        self._left = True
        self.set_aside()
        of_source = self._admission.sources.get(self.source, {})
        of_source.pop(self, None)
        if not of_source:
            self._admission.sources.pop(self.source, None)

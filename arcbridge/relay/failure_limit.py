"""How fast one source may keep failing, in a table that cannot grow."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable


class FailureLimit:
    """Slows down whoever keeps failing to enrol: per source, `burst` failures at once, then one each `every` seconds.

    A source is an IPv4 address or an IPv6 /64. The table holds at most `size` sources and forgets the one that
    failed longest ago: against guessing stand the 256 bits of a secret, this only keeps noise cheap. `clock` is
    monotonic.
    """

    def __init__(
        self,
        *,
        burst: int = 10,
        every: float = 6.0,
        size: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst = burst
        self._every = every
        self._size = size
        self._clock = clock
        # Source -> the time at which all its failures are forgiven; in the order of the last failure.
        self._forgiven: OrderedDict[str, float] = OrderedDict()
        self.refused = 0
        """How often `wait` said to wait; read by the metrics."""

    def __len__(self) -> int:
        return len(self._forgiven)

    def wait(self, address: str) -> int:
        """Whole seconds until this source may try again; 0: now."""
        over = self._forgiven.get(source_of(address), 0.0) - self._clock() - (self._burst - 1) * self._every
        if over <= 0:
            return 0
        self.refused += 1
        return int(over) + 1

    def failed(self, address: str) -> None:
        """Count one failure."""
        source, now = source_of(address), self._clock()
        self._forgiven[source] = max(self._forgiven.get(source, 0.0), now) + self._every
        self._forgiven.move_to_end(source)
        if len(self._forgiven) > self._size:
            self._forgiven.popitem(last=False)


def source_of(address: str) -> str:
    """Who counts as one source: an IPv4 address, or the /64 that one IPv6 subscriber has at least."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False).network_address) + "/64"

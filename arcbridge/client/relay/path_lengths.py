"""Knows how long the ways to one cluster are, through each relay: to the relay, and from there to the cluster's agent.

The first part is measured by this client's own connections, the second one is the relay's word, which is believed until
a session through it has shown the whole way: then the longer of the two counts for an hour. So a relay that claims to
be near gets a session that it may have in any case, for minutes (docs/threats.md#J33). It connects to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Final

from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.net.address import Address
from arcbridge.net.nearest import Nearest
from arcbridge.net.round_trips import LONGEST, RoundTrips

WHOLE_COUNTS: Final = 3600.0
"""Seconds for which the way that a session has shown counts against the relay's word."""


class PathLengths:
    """The ways to one cluster; to none of them where `cluster` is empty: then the relays alone count."""

    def __init__(
        self,
        relays: Sequence[RelayAccess],
        round_trips: RoundTrips | None,
        cluster: str = "",
        region: Collection[Address] = (),
    ) -> None:
        """`round_trips`: what is known; None: nothing is, and nothing is measured. `region`: the relays to prefer."""
        self._relays = relays
        self.round_trips = round_trips
        self._cluster = cluster
        self._region = region
        preferred = [relay for relay in relays if relay.address in region]
        self.nearest = Nearest(self.length, preferred)

    def of_cluster(self, cluster: str) -> PathLengths:
        """Return the ways to another cluster through the same relays."""
        return PathLengths(self._relays, self.round_trips, cluster, self._region)

    def learn(self, relay: RelayAccess, own: float, beyond: float) -> None:
        """Take the round trip to a relay, and the one from there to the agent as the relay says it; seconds, 0: not
        known."""
        if self.round_trips is not None:
            self.round_trips.note(str(relay.address), own)
            self.round_trips.note(self._to_agent(relay), beyond)

    def learn_whole(self, relay: RelayAccess, seconds: float) -> None:
        """Take the round trip of a session through a relay; 0: not known."""
        if self.round_trips is not None:
            self.round_trips.note(self._whole(relay), seconds)

    def learn_absence(self, relay: RelayAccess) -> None:
        """Note that no agent of the cluster is at a relay, behind what was learnt of the relay itself."""
        if self.round_trips is not None:
            self.round_trips.note(self._absent(relay), LONGEST)

    def length(self, relay: RelayAccess) -> float:
        """Return the way through a relay, seconds; infinity: not known, or no agent was there."""
        known = self.round_trips
        if known is not None and known.age(self._absent(relay)) <= self.age(relay) < math.inf:
            return math.inf
        return self.possible(relay)

    def possible(self, relay: RelayAccess) -> float:
        """Return the way through a relay if an agent were there. Without a word of the relay on its agent it is as far
        from it as the farthest one."""
        known = self.round_trips
        if known is None:
            return 0.0
        beyond = known.least(self._to_agent(relay))
        if beyond == math.inf:
            parts = (known.least(self._to_agent(one)) for one in self._relays)
            beyond = max((part for part in parts if part < math.inf), default=0.0)
        whole = known.least(self._whole(relay), WHOLE_COUNTS)
        return max(known.least(str(relay.address)) + beyond, whole if whole < math.inf else 0.0)

    def age(self, relay: RelayAccess) -> float:
        """Return the seconds since the way to a relay was measured; infinity: it was not."""
        return math.inf if self.round_trips is None else self.round_trips.age(str(relay.address))

    def _to_agent(self, relay: RelayAccess) -> str:
        return f"{relay.address} to {self._cluster}"

    def _absent(self, relay: RelayAccess) -> str:
        return f"{relay.address} without {self._cluster}"

    def _whole(self, relay: RelayAccess) -> str:
        return f"{self._cluster} through {relay.address}"

"""What goes wrong in one run, by its seed: a plan is made from a size and a seed alone.

So both are all that the file of a run that failed has to hold.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from arcbridge.relay.control import BURST
from arcbridge.settings.config import RelayLimitsConfig

LARGEST = 100_000
"""Agents of the largest run, whose relays are those of the product; smaller ones are paced in proportion."""
CALM_FIRST, CALM_LAST = 300.0, 600.0
"""Seconds in the beginning and at the end of a run in which nothing goes wrong."""
KINDS = ("kill", "kill", "vanish", "drain", "cut", "region", "all", "upgrade")


@dataclass(frozen=True)
class Size:
    """How large a run is."""

    agents: int = 2000
    relays: int = 12
    regions: int = 4
    users: int = 100
    outages: int = 8
    """Outages at most."""
    seconds: float = 3600.0
    agents_per_second: int = 0
    """The relays' setting; 0: so many that a relay needs as long for its agents as one of the largest run."""
    per_cluster: int = 10
    """Agents of one cluster."""
    addresses: int = 0
    """Addresses from which the agents come, as behind so many NATs, with the limits of one address in proportion to the
    pace; 0: each has its own."""

    @property
    def burst(self) -> int:
        """Handshakes that a relay begins at once after a pause."""
        return max(round(BURST * self.agents / LARGEST), 1)

    @property
    def pace(self) -> int:
        return self.agents_per_second or max(round(RelayLimitsConfig().agents_per_second * self.agents / LARGEST), 1)


@dataclass(frozen=True)
class Outage:
    """One thing that goes wrong."""

    at: float
    """Seconds since the beginning of the run."""
    kind: str
    """`kill`: the process dies; `vanish`: the machine does, without a word; `drain`: a relay is stopped in order;
    `upgrade`: all are, one after the other; `cut`: two regions do not reach each other."""
    relays: tuple[int, ...] = ()
    regions: tuple[int, int] = (-1, -1)
    seconds: float = 0.0
    """How long each relay is away, or the cut lasts."""


def outages(size: Size, seed: int) -> list[Outage]:
    """Return the outages of a seed, in order; each begins when the one before is over, or a little later."""
    draw = random.Random(seed)
    found, at = [], CALM_FIRST
    kinds = list(KINDS)
    draw.shuffle(kinds)
    for kind in kinds[: size.outages]:
        region = draw.randrange(size.regions)
        one = draw.randrange(size.relays)
        of_region = tuple(number for number in range(size.relays) if number % size.regions == region)
        everything = tuple(range(size.relays))
        seconds = draw.choice((draw.uniform(1, 5), draw.uniform(5, 90)))
        if kind == "cut":
            other = (region + draw.randrange(1, size.regions)) % size.regions
            outage = Outage(at, kind, (), (region, other), draw.uniform(30, 120))
        elif kind in ("all", "upgrade"):
            outage = Outage(at, kind, everything, seconds=draw.uniform(1, 5))
        elif kind == "vanish":
            outage = Outage(at, kind, (one,), seconds=draw.uniform(30, 180))
        else:
            outage = Outage(at, kind, of_region if kind == "region" else (one,), seconds=seconds)
        lasts = 45.0 * size.relays if kind == "upgrade" else outage.seconds
        if at + lasts > size.seconds - CALM_LAST:
            continue
        found.append(outage)
        at += lasts + draw.uniform(150, 300)
    return found

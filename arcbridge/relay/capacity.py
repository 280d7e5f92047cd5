"""Computes how many sessions and agents one process can hold, by the file descriptors that it may open.

A session takes two, an agent one; unauthenticated peers, pipes and files take some, too. Where all that the settings
allow needs more than there are, sessions and agents are both allowed in the same proportion fewer: the last to come is
then refused with a reason, instead of being left in a queue by a process that cannot accept any more. What is kept
aside for unauthenticated peers is also the reserve for the agents' joins: a client is refused before an agent is asked
to come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import structlog

from arcbridge.net.descriptors import UNLIMITED, advice
from arcbridge.relay.pipes import POOL
from arcbridge.settings.config import RelayLimitsConfig

RESERVED: Final = 64
"""Files, the loop's own, the registry, the listening sockets, connections to an issuer."""
LEAST_SESSIONS: Final = 8
LEAST_AGENTS: Final = 4

log = structlog.get_logger("arcbridge.relay")


@dataclass(frozen=True, slots=True)
class Capacity:
    """What fits."""

    sessions: int
    agents: int
    needed: int
    """Descriptors for all that the settings allow."""
    available: int


def capacity(limits: RelayLimitsConfig, available: int) -> Capacity:
    """Return what fits into so many descriptors: the settings' own numbers where all of it does."""
    wanted = 2 * limits.sessions + limits.agents
    needed = wanted + limits.unauthenticated + 2 * POOL + RESERVED
    if needed <= available:
        return Capacity(limits.sessions, limits.agents, needed, available)
    others = min(limits.unauthenticated, available // 4) + min(2 * POOL, available // 8) + RESERVED
    share = max(available - others, 0) / wanted
    return Capacity(
        min(limits.sessions, max(int(limits.sessions * share), LEAST_SESSIONS)),
        min(limits.agents, max(int(limits.agents * share), LEAST_AGENTS)),
        needed,
        available,
    )


def warn(found: Capacity, limits: RelayLimitsConfig) -> None:
    """Tell what does not fit, and what to do; nothing where all does."""
    if found.available == UNLIMITED or found.needed <= found.available:
        return
    log.warning(
        "too few file descriptors for what the settings allow",
        needed=found.needed,
        available=found.available,
        sessions=f"{found.sessions} instead of {limits.sessions}",
        agents=f"{found.agents} instead of {limits.agents}",
        advice=f"{advice(found.needed)}; or lower limits.sessions and limits.agents",
    )

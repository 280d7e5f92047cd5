"""Computes how many sessions and agents one process can hold, by the file descriptors that it may open.

A session takes two, an agent one; unauthenticated peers, pipes and files take some, too. Where all that the settings
allow needs more than there are, sessions and agents are both allowed in the same proportion fewer: the last to come is
then refused with a reason, instead of being left in a queue by a process that cannot accept any more. What is kept
aside for unauthenticated peers is also the reserve for the agents' joins: a client is refused before an agent is asked
to come.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import structlog

from arcbridge.net.descriptors import advice
from arcbridge.relay.pipes import POOL
from arcbridge.settings.config import RelayLimitsConfig

RESERVED: Final = 64
"""Files, the loop's own, the registry, the listening sockets, connections to an issuer."""
LEAST_SESSIONS: Final = 8
LEAST_AGENTS: Final = 4

log = structlog.get_logger("arcbridge.relay")


def needed(limits: RelayLimitsConfig) -> int:
    """Return how many descriptors all that the limits allow takes."""
    return 2 * limits.sessions + limits.agents + limits.unauthenticated + 2 * POOL + RESERVED


def fitted(limits: RelayLimitsConfig, available: int) -> RelayLimitsConfig:
    """Return the limits with as many sessions and agents as fit into so many descriptors: the settings' own numbers
    where all of them do. Logs what does not fit, and what to do."""
    wanted = 2 * limits.sessions + limits.agents
    if needed(limits) <= available:
        return limits
    others = min(limits.unauthenticated, available // 4) + min(2 * POOL, available // 8) + RESERVED
    share = max(available - others, 0) / wanted
    sessions = min(limits.sessions, max(int(limits.sessions * share), LEAST_SESSIONS))
    agents = min(limits.agents, max(int(limits.agents * share), LEAST_AGENTS))
    log.warning(
        "too few file descriptors for what the settings allow",
        needed=needed(limits),
        available=available,
        sessions=f"{sessions} instead of {limits.sessions}",
        agents=f"{agents} instead of {limits.agents}",
        advice=f"{advice(needed(limits))}; or lower limits.sessions and limits.agents",
    )
    return replace(limits, sessions=sessions, agents=agents)

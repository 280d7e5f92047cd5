"""Counts the attempts, sessions and resumptions of one cluster, which metrics read and nothing else does."""

from __future__ import annotations

from dataclasses import dataclass, field

from arcbridge.observe.metrics import Buckets

REASONS = ("gone", "timeout", "refused", "protocol", "closed")
"""Why a detached session was not resumed."""
DETACHED_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
"""Bounds of the histogram of detached seconds: from a try that succeeds at once to the longest wait there is."""


@dataclass
class SessionCounters:
    """Counters over all sessions of one cluster."""

    attempts: int = 0
    """Attempts to establish a session, or to resume one."""
    established: int = 0
    failures: int = 0
    """Attempts that failed and sessions that were refused."""
    resumed: int = 0
    """Sessions that were resumed after their connection was lost."""
    moved: int = 0
    """Sessions that moved to another connection while theirs still worked."""
    replayed_bytes: int = 0
    """Bytes sent again by sessions that have ended."""
    resume_failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    detached_seconds: Buckets = field(default_factory=lambda: Buckets(DETACHED_BOUNDS))

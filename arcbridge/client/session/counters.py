"""Counts the attempts, sessions and resumptions of one cluster, which metrics read and nothing else does."""

from __future__ import annotations

from arcbridge.observe.metrics import Buckets

REASONS = ("gone", "timeout", "refused", "protocol", "closed")
"""Why a detached session was not resumed."""
DETACHED_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
"""Bounds of the histogram of detached seconds: from a try that succeeds at once to the longest wait there is."""


class SessionCounters:
    """Counters over all sessions of one cluster."""

    __slots__ = (
        "attempts",
        "detached_seconds",
        "established",
        "failures",
        "moved",
        "replayed_bytes",
        "resume_failures",
        "resumed",
    )

    def __init__(self) -> None:
        self.attempts = 0
        """Attempts to establish a session, or to resume one."""
        self.established = 0
        self.failures = 0
        """Attempts that failed and sessions that were refused."""
        self.resumed = 0
        """Sessions that were resumed after their connection was lost."""
        self.moved = 0
        """Sessions that moved to another connection while theirs still worked."""
        self.resume_failures = dict.fromkeys(REASONS, 0)
        self.replayed_bytes = 0
        """Bytes sent again by sessions that have ended."""
        self.detached_seconds = Buckets(DETACHED_BOUNDS)

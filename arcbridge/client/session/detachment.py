"""Decides how long a session without a connection is worth another try; it makes none and reads no clock.

A relay that forbids and relays that do not know the agent may only have been restarted, so both have to last. Each
`now` is monotonic seconds. Invariant: a connection that is attached ends every count.
"""

from __future__ import annotations

from arcbridge.client.session.refusal import is_elsewhere
from arcbridge.errors import ArcbridgeError, PermissionRefused, SessionEnded
from arcbridge.wire.frames import GoawayCode

FORBIDDEN_TIMEOUT = 2.0
"""Seconds of refusals after which the session ends: an agent reconnects to a relay in less."""
NOT_ALLOWED = "access was revoked: you may not reach it; ask the relay's operator for access"
"""Why it ends then: the relay's own words are not shown."""
MISSING_TIMEOUT = 10.0
"""Seconds for which relays may answer that they have other agents of the cluster, but not the one with the session: it
may be reconnecting to a relay that was restarted. Afterwards the agent is taken for gone."""
MISSING_TIMEOUT_AFTER_OUTAGE = 60.0
"""The same where no relay could be reached meanwhile: the agents could not either, and each comes back by a backoff of
its own. A relay that paces the agents of many clusters puts one off for as long as a herd takes
(docs/benchmark/scale.md) and more; an agent of an older version waits for up to 30 s by itself."""


class Detachment:
    """The time that one session spends without a connection."""

    __slots__ = ("_forbidden_since", "_missing_since", "agent_stops", "outage", "since", "streams")

    def __init__(self) -> None:
        self.since: float | None = None
        """When the connection was lost; None while there is one."""
        self.streams = 0
        """Number of open streams at that moment."""
        self.outage = False
        """Whether no relay could be reached since."""
        self.agent_stops = False
        """Whether the agent is being stopped, by its GOAWAY: what runs goes on, and a lost connection is the end."""
        self._forbidden_since: float | None = None
        self._missing_since: float | None = None

    def begin(self, streams: int, now: float) -> None:
        """The connection was lost under so many streams."""
        self.since, self.streams = now, streams

    def lasted(self, now: float) -> float:
        """Return the seconds since the connection was lost; 0 while there is one."""
        return 0.0 if self.since is None else now - self.since

    def end(self) -> None:
        """The session has a connection, or is over."""
        self.since = self._forbidden_since = self._missing_since = None
        self.outage = False

    def verdict(self, error: ArcbridgeError, now: float) -> SessionEnded | None:
        """Return why the session ends after a try that failed with `error`; None: another try may succeed.

        It ends where all relays have refused this user for FORBIDDEN_TIMEOUT: the user was revoked, or the policy has
        changed. Before that, a relay that has lost its registry may only not have met the agent yet.
        """
        forbidden, missing = self._forbidden_since, self._missing_since
        lost = self.since is not None
        self._forbidden_since = _lasting(forbidden, now, lost and isinstance(error, PermissionRefused))
        self._missing_since = _lasting(missing, now, lost and is_elsewhere(error) and not self.agent_stops)
        if not lost:
            return None
        if self._forbidden_since is not None and forbidden is not None and now - forbidden >= FORBIDDEN_TIMEOUT:
            return SessionEnded(GoawayCode.REVOKED, NOT_ALLOWED)
        if not is_elsewhere(error):
            return None
        if self.agent_stops:
            reason = "the agent that has the session is being stopped, and takes no connection any more"
            return SessionEnded(GoawayCode.GONE, reason)
        timeout = MISSING_TIMEOUT_AFTER_OUTAGE if self.outage else MISSING_TIMEOUT
        if missing is not None and now - missing >= timeout:
            return SessionEnded(GoawayCode.GONE, "the agent that had the session is gone")
        return None


def _lasting(since: float | None, now: float, holds: bool) -> float | None:
    """Return since when something holds."""
    if not holds:
        return None
    return now if since is None else since

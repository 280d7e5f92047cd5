"""Frees memory when more waits towards all callers together than may.

Streams whose callers read nothing are reset, with IDLE, the one that has been stalled longest first; where that is not
enough, sessions without a connection end in the same order, because what they keep to send again cannot be freed
otherwise. It looks once a second and does nothing below the bound: a paused `kubectl logs -f` is left alone as long as
there is room. Invariant: a stream of which bytes leave is never reset here, nor one that stalls for a moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import structlog

from arcbridge.mux.session import MuxSession
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.frames import GoawayCode, ResetCode

INTERVAL = 1.0
"""Seconds between two looks."""
LEAST_STALL = 10.0
"""Seconds for which a stream must have been stalled, or a session without a connection, before it makes room."""

_log = structlog.get_logger("arcbridge.agent")


class Member(Protocol):
    """A session of the agent."""

    session: MuxSession | None
    detached_at: float | None
    """When it lost its connection, monotonic seconds; None while it has one."""


class BacklogRelief:
    """Watches one backlog, which is that of the process."""

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self.streams_reset = 0
        """Streams that were reset because they were stalled."""
        self.sessions_ended = 0
        """Sessions without a connection that were ended."""

    def relieve(self, members: Iterable[Member], now: float) -> None:
        """Make room until an eighth of the bound is free, if the backlog is full; `now` is monotonic seconds."""
        if not self._backlog.full:
            return
        enough = self._backlog.most // 8 * 7
        present = list(members)
        self._reset_streams([one.session for one in present if one.session is not None], now - LEAST_STALL, enough)
        if self._backlog.full:
            self._end_sessions(present, now - LEAST_STALL, enough)

    def _reset_streams(self, sessions: list[MuxSession], before: float, enough: int) -> None:
        stalled = [(stream, session) for session in sessions for stream in session.streams.stalled(before)]
        stalled.sort(key=lambda pair: pair[0].stalled_since)
        for stream, session in stalled:
            if self._backlog.held <= enough:
                return
            _log.warning("stalled stream reset", session=session.label, stream=stream.id, waiting=stream.held)
            session.streams.reset(stream, ResetCode.IDLE)
            self.streams_reset += 1

    def _end_sessions(self, members: list[Member], before: float, enough: int) -> None:
        detached = [(one.detached_at, one.session) for one in members if one.detached_at is not None]
        for since, session in sorted(detached, key=lambda pair: pair[0]):
            if self._backlog.held <= enough or since >= before:
                return
            if session is not None and session.backlog.held:
                session.close(GoawayCode.GONE, "the agent needed the memory that the session took without a connection")
                self.sessions_ended += 1

"""Frees memory when more waits at the agent than may: towards callers, or for readers that stopped.

Towards callers (`BacklogRelief`): where more waits for all of them together than may, streams whose callers read
nothing are reset, with IDLE, the one that has been stalled longest first; where that is not enough, sessions without a
connection end in the same order, because what they keep to send again cannot be freed otherwise. A paused
`kubectl logs -f` is left alone as long as there is room.

For readers (`AheadRelief`), which are the API server, where it leaves a body unread, and TCP targets: where a user's
bound or that of the process is reached, the user's sessions are not read (`mux.session`), and the streams whose readers
have stopped longest are reset. Nothing happens below half a bound.

Both look once a second, and go on until an eighth of the bound is free. Invariant: a stream of which bytes leave, or of
which its reader takes bytes, is never reset here, nor one that stalls for a moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import structlog

from arcbridge.mux.session import MuxSession
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.stream import PROGRESS, Stream

INTERVAL = 1.0
"""Seconds between two looks."""
LEAST_STALL = 10.0
"""Seconds for which a stream must have been stalled, or a session without a connection, before it makes room."""
LEAST_READER_STALL = 5.0
"""Seconds for which a reader must have stopped before its stream makes room. The user's sessions are not read
meanwhile, and after 25 s without a byte their other ends would take the connection for dead."""

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


class AheadRelief:
    """Watches what the readers of all sessions take."""

    def __init__(self) -> None:
        self.streams_reset = 0
        """Streams that were reset because their readers had stopped."""
        self._seen: dict[Stream, tuple[int, float]] = {}
        """Of each stream that waits for its reader: how many bytes the reader had taken, and since when (monotonic
        seconds) it has taken fewer than PROGRESS more. Empty while there is room."""

    def relieve(self, sessions: Iterable[MuxSession], now: float) -> None:
        """Make room where a bound is reached; `now` is monotonic seconds."""
        waiting = [
            (self._seen.get(stream, (stream.window.consumed, now)), stream, session)
            for session in sessions
            if any(2 * one.held >= one.most for one in _bounds(session))
            for stream in session.streams.unread()
        ]
        self._seen = {
            stream: (taken, since) if stream.window.consumed - taken < PROGRESS else (stream.window.consumed, now)
            for (taken, since), stream, _ in waiting
        }
        full = {one for _, _, session in waiting for one in _bounds(session) if one.held >= one.most}
        for _, stream, session in sorted(waiting, key=lambda found: self._seen[found[1]][1]) if full else ():
            if self._seen[stream][1] > now - LEAST_READER_STALL:
                return
            if any(one.held > one.most // 8 * 7 for one in _bounds(session) if one in full):
                waits = stream.window.unconsumed
                session.streams.reset(stream, ResetCode.IDLE)
                session.streams.unread()
                del self._seen[stream]
                self.streams_reset += 1
                _log.warning("unread stream reset", session=session.label, stream=stream.id, waiting=waits)


def _bounds(session: MuxSession) -> Iterator[Backlog]:
    """Yield the bounds of which what a session holds is a part: its user's, then the process's."""
    backlog = session.ahead.parent
    while backlog is not None:
        yield backlog
        backlog = backlog.parent

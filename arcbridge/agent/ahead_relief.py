"""Frees memory when callers have sent more ahead of readers that stopped than may wait.

Readers are the API server, where it leaves a body unread, and TCP targets. Where a user's bound or that of the process
is reached, the user's sessions are not read (`mux.session`), and the streams whose readers have stopped longest are
reset here, with IDLE, until an eighth of the bound is free. It looks once a second and does nothing below half a bound.
Invariant: a stream of which its reader takes bytes is never reset here, nor one that stalls for a moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import structlog

from arcbridge.mux.session import MuxSession
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.frames import ResetCode
from arcbridge.wire.stream import PROGRESS, Stream

LEAST_STALL = 5.0
"""Seconds for which a reader must have stopped before its stream makes room. The user's sessions are not read
meanwhile, and after 25 s without a byte their other ends would take the connection for dead."""

_log = structlog.get_logger("arcbridge.agent")


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
            if self._seen[stream][1] > now - LEAST_STALL:
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

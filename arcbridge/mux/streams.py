"""Settles the streams of one session from the shell's side: those that wait, those that are reset, and the end of all.

It moves no bytes and opens nothing. Invariant: each stream's transport, where it still has one, learns of its end once.
"""

from __future__ import annotations

from collections.abc import Callable

from arcbridge.errors import ArcbridgeError
from arcbridge.limiters import TokenBucket
from arcbridge.wire.backlog import Backlog
from arcbridge.wire.frames import ResetCode
from arcbridge.wire.session import Session
from arcbridge.wire.stream import Stream


class SessionStreams:
    """The streams that are not over; `len` is their number."""

    __slots__ = ("_act", "_table", "_window", "by_id")

    def __init__(self, machine: Session, act: Callable[[], None]) -> None:
        """`act` is called after each command to the machine."""
        self._table = machine.stream_table
        self.by_id = machine.streams
        self._window = machine.session_window
        self._act = act

    def __len__(self) -> int:
        return len(self.by_id)

    def unread(self) -> list[Stream]:
        """Return the streams, complete ones included, of which bytes wait for readers; count those bytes anew."""
        self._window.count()
        every = (*self._table.streams.values(), *self._table.unread.values())
        return [stream for stream in every if stream.window.unconsumed]

    def stalled(self, before: float) -> list[Stream]:
        """Return the streams of which nothing was taken since a moment before `before` (monotonic seconds), though
        bytes wait."""
        return [one for one in self._table.streams.values() if one.queued and one.stalled_since < before]

    def share(self, growth: Backlog, churn: TokenBucket) -> None:
        """Let windows grow within `growth` (docs/threats.md#M22), and draw on `churn` for streams that end before their
        answers (docs/threats.md#M7), as other sessions do."""
        self._table.growth.share(growth)
        self._table.churn = churn

    def reset(self, stream: Stream, code: ResetCode) -> None:
        """Reset a stream, also one whose application is done with it while bytes of it wait."""
        if stream.owner is not None:
            stream.owner.abort(code)
        else:
            self._table.reset(stream, code)
            self._act()

    def reset_all(self, code: ResetCode) -> None:
        """Reset all streams. The session goes on, unless these are more than may end so at once
        (docs/threats.md#M7)."""
        for stream in list(self._table.streams.values()):
            self.reset(stream, code)

    def session_ended(self, error: ArcbridgeError) -> None:
        """End all streams: their session is over."""
        for stream in list(self._table.streams.values()):
            if stream.owner is not None:
                stream.owner.session_ended(error)
        self._table.streams.clear()

"""Joins the two sides of a session as any upgrade's are joined, and has a recording see what passes.

The bytes go on first. What the recording costs in the event loop's time is the user's, as the bytes themselves are.
Invariant: while the session is held neither side is read, whatever the other one takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

from arcbridge.agent.audit import AuditRecord
from arcbridge.agent.kube.channel_splice import ChannelSplice
from arcbridge.agent.recording.session_recording import SessionRecording
from arcbridge.mux import buffer
from arcbridge.mux.splice import SpliceResult
from arcbridge.mux.stream import StreamTransport
from arcbridge.wire.frames import ResetCode


class RecordedSplice(ChannelSplice):
    """A splice (`session_recording.SessionControl`) of which one recording is made."""

    def __init__(
        self,
        outer: asyncio.Transport,
        on_done: Callable[[SpliceResult], None],
        recording: SessionRecording,
        stream: StreamTransport,
        record: AuditRecord,
        protocol: bytes = b"",
    ) -> None:
        super().__init__(outer, on_done, protocol, seen=recording.from_caller)
        self._recording = recording
        self._recorded = stream
        self._record = record
        self._held = False
        self._full_stream = self._full_outer = False
        """The side takes no more for now."""

    # -- what passes ----------------------------------------------------------------------------------------------

    def start(self, first: bytes = b"") -> None:
        if first:
            self._recording.from_cluster(memoryview(first))
        super().start(first)

    def buffer_updated(self, nbytes: int) -> None:
        super().buffer_updated(nbytes)
        if (payer := self._recorded.payer) is None:
            self._recording.from_cluster(buffer.VIEW[:nbytes])
        else:
            began, before = monotonic(), payer.shares.total
            self._recording.from_cluster(buffer.VIEW[:nbytes])
            payer.charge(monotonic(), began, before)

    # -- the session ----------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Read neither side for now."""
        self._held = True
        super().pause_outer()
        super().pause_writing()

    def let_go(self) -> None:
        """Read on, each side as far as the other takes it."""
        if not self._held:
            return
        self._held = False
        if not self._full_stream:
            super().resume_outer()
        if not self._full_outer:
            super().resume_writing()

    def end(self, reason: str) -> None:
        """End the session, for a reason that its record has."""
        self._record.revoke(reason)
        asyncio.get_running_loop().call_soon(self._end, reason)

    def _end(self, reason: str) -> None:
        if not self.explain(self._recorded, reason):
            self._recorded.abort(ResetCode.FORBIDDEN)

    # -- which side is full ---------------------------------------------------------------------------------------

    def pause_outer(self) -> None:
        self._full_stream = True
        super().pause_outer()

    def resume_outer(self) -> None:
        self._full_stream = False
        if not self._held:
            super().resume_outer()

    def pause_writing(self) -> None:
        self._full_outer = True
        super().pause_writing()

    def resume_writing(self) -> None:
        self._full_outer = False
        if not self._held:
            super().resume_writing()

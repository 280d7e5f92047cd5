"""The receive window of a whole session: credit for all of its streams together.

The module decides when session credit is granted and how far the window is extended while readers that stopped hold a
large part of it. It also counts what no reader has taken, for the session and all it is a part of
(`SessionContext.ahead`). It reads no frame and knows no stream. Invariant: what was granted can be stored, within
`limits.session_window` and what the process's budget gave beyond it.
"""

from __future__ import annotations

from arcbridge.wire.context import SessionContext
from arcbridge.wire.frames import FIRST_CREDIT, U32, FrameType, frame
from arcbridge.wire.replay import Budget
from arcbridge.wire.sender import Sender
from arcbridge.wire.window import MAX_CREDIT, Growth, ReceiveWindow


class SessionWindow:
    """The session's account, and its extension."""

    def __init__(self, context: SessionContext, sender: Sender, budget: Budget) -> None:
        limits = context.limits
        self._context = context
        self._sender = sender
        self._closed = False
        # Granted in small parts: what readers that stopped leave free of the window may never come to a quarter of it.
        self.account = ReceiveWindow(FIRST_CREDIT, FIRST_CREDIT, grant=limits.session_window >> 4)
        """Payload bytes of all streams together."""
        self.extension = Growth(MAX_CREDIT - limits.session_window, budget)
        """Bytes of the window beyond `limits.session_window`."""

    def open(self) -> None:
        """Grant the whole window: authentication is under way or done."""
        self.account.size = self.account.limit = self._context.limits.session_window
        self._grant(self.account.open_up())

    def release(self, count: int) -> None:
        """Return credit for `count` bytes that no stream holds any more."""
        if not count:
            return
        account = self.account
        if self.extension.held and account.consumed + count >= account.due_at:
            self._shrink(account.granted - account.consumed - count)
        self._grant(account.consume(count, self._context.now, 0.0))
        self.count()

    def count(self) -> int:
        """Count what no reader has taken in `ahead`; return it, in bytes. It is done where credit is handled anyway,
        and not for each delivery, so that the count lags by less than what comes between two ACKs."""
        ahead, unread = self._context.ahead, self.account.received - self.account.consumed
        if unread != ahead.held and not self._closed:
            ahead.add(unread - ahead.held)
        return unread

    def close(self, unread: int) -> None:
        """Promise nothing any more: the session is over. `unread` bytes still wait for their readers."""
        self.extension.clear()
        self._closed = True
        ahead = self._context.ahead
        ahead.add(unread - ahead.held)

    def keep_half_free(self) -> None:
        """Extend the window until half of its usual size is free, as far as the process has room for that.

        A stream whose reader stopped keeps its own window full for ever, and enough of them would leave nothing to the
        streams that are read.
        """
        account, usual = self.account, self._context.limits.session_window
        more = self.count() + (usual >> 1) - account.size
        if more > 0:
            account.size += self.extension.take(max(more, usual >> 3))
            account.limit = max(account.limit, account.size)
            self._grant(account.open_up())

    def _shrink(self, promised: int) -> None:
        """Take back an extension, no further than `promised`: bytes that the peer may still send or that wait."""
        account, usual = self.account, self._context.limits.session_window
        wanted = max(usual, account.unconsumed + (usual >> 1), promised)
        if wanted < account.size:
            self.extension.give(account.size - wanted)
            account.size = account.limit = wanted

    def _grant(self, increment: int) -> None:
        if increment:
            self._sender.queue_control(frame(FrameType.WINDOW, 0, U32.pack(increment)))

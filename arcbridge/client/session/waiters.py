"""Holds the callers that wait for a session of one cluster, and gives each the session or the error of the attempt.

It makes no attempt and reads no clock. Invariant: a caller that is cancelled affects no other one, and each of the
others gets exactly one answer.
"""

from __future__ import annotations

import asyncio

from arcbridge.errors import ArcbridgeError
from arcbridge.mux.session import MuxSession

FAILURE_HOLD = 1.0
"""Seconds after a failed attempt during which callers get its error instead of another attempt."""


class Waiters:
    """The callers of one cluster that wait; true while there are any."""

    def __init__(self) -> None:
        self._all: set[asyncio.Future[MuxSession]] = set()
        self._before_auth: set[asyncio.Future[MuxSession]] = set()
        """Those that take a session before its agent has accepted the token."""
        self.authenticating: MuxSession | None = None
        """The session whose token is on its way to an agent that has proved its identity."""
        self.failure: ArcbridgeError | None = None
        """Why the last attempt failed; None while a session is up."""
        self._failed_at = float("-inf")

    def __bool__(self) -> bool:
        return bool(self._all)

    async def wait(self, *, before_auth: bool) -> MuxSession:
        """Return the next session; raises the error of the attempt."""
        waiter: asyncio.Future[MuxSession] = asyncio.get_running_loop().create_future()
        self._all.add(waiter)
        if before_auth:
            self._before_auth.add(waiter)
        try:
            return await waiter
        finally:
            self._all.discard(waiter)
            self._before_auth.discard(waiter)

    def recent_failure(self, now: float) -> ArcbridgeError | None:
        """Return the error that a caller gets instead of another attempt; `now`: monotonic seconds."""
        return self.failure if now - self._failed_at < FAILURE_HOLD else None

    def begin_auth(self, session: MuxSession) -> None:
        """Give the session to the callers that take it before its token is accepted."""
        self.authenticating = session
        _complete(self._before_auth, session)

    def complete(self, session: MuxSession) -> None:
        """Give the session to all."""
        self.failure = None
        _complete(self._all, session)

    def fail(self, error: ArcbridgeError, now: float) -> None:
        """Give the error to all, and to those that come within FAILURE_HOLD."""
        self.failure, self._failed_at = error, now
        self.close(error)

    def close(self, error: ArcbridgeError) -> None:
        """Give the error to all that wait now."""
        for waiter in self._all:
            if not waiter.done():
                waiter.set_exception(error.copy())
                waiter.exception()  # retrieved: a caller that was cancelled in this turn will not await it


def _complete(waiters: set[asyncio.Future[MuxSession]], session: MuxSession) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(session)

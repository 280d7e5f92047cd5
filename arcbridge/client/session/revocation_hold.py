"""Delays the return of a client whose access an agent has revoked, so that it does not come back in a loop.

The token that was refused will be refused again, until an operator takes the revocation back. So after REVOKED the
client makes no attempt by itself; and for a caller that wants a stream only after a wait that doubles each time, or at
once with another token. It makes no attempt and holds no timer: `session_manager` asks it. Invariant: with one token
there is at most one attempt in LONGEST seconds, once the wait has grown.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from arcbridge.errors import ArcbridgeError

FIRST = 5.0
"""Seconds until the first attempt with the same token: an operator who made a mistake takes it back at once."""
LONGEST = 60.0
"""Seconds at which the wait stops to grow."""


@dataclass(slots=True)
class RevocationHold:
    """The hold of one cluster's session; `now` is monotonic seconds."""

    error: ArcbridgeError | None = None
    """The error for callers; None while no revocation is known."""
    _token: bytes = b""
    _wait: float = 0.0
    _until: float = 0.0

    def begin(self, error: ArcbridgeError, token: str, now: float) -> None:
        """Hold attempts back: the agent has revoked what `token` (empty: not known) opened, or would have opened."""
        self._wait = min(2 * self._wait or FIRST, LONGEST)
        self.error, self._token, self._until = error, _digest(token), now + self._wait

    def end(self) -> None:
        """Hold nothing back any more: a session was established."""
        self.error, self._token, self._wait, self._until = None, b"", 0.0, 0.0

    def refusal(self, token: str, now: float) -> ArcbridgeError | None:
        """Return the error for a caller while no attempt may be made with `token`; empty: the token to come is not
        known."""
        if self.error is None or now >= self._until or (token and _digest(token) != self._token):
            return None
        return self.error


def _digest(token: str) -> bytes:
    """Return what is kept of a token, for comparison alone."""
    return hashlib.sha256(token.encode()).digest() if token else b""

"""Bounds the connections to the API server: how many are held at once, and how often one is made.

Each bound is there for a user and for the process, so that one user costs neither the agent its descriptors nor the API
server its TLS handshakes. A user who connects too often waits for a turn; one who holds too many is refused. The
agent's own calls are under no bound: without them no user could log in. The module opens no connection. Invariant:
what `enter` took is held until `leave`, and a call that raises has taken no place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.limiters import KeyedConcurrency, KeyedTokenBucket, TokenBucket

LONGEST_WAIT = 10.0
"""Seconds that a request may wait for its turn to connect; then it is refused: a client gives up after 30."""
FEW_PER_USER = 32
"""Connections of one user that may have as much of the kernel's memory as it gives: a large answer arrives faster."""
USERS = 4096
"""Users whose connects are remembered."""


@dataclass(frozen=True, slots=True)
class ConnectLimits:
    """The bounds."""

    connections: int = 4096
    """Connections that requests of all users hold at once: each is a descriptor and some 50 KiB."""
    connections_per_user: int = 512
    """Connections that one user's requests hold at once: each watch, `logs -f` and forward is one; k9s and 500 watches
    fit in."""
    connects_per_second: float = 200.0
    """Connections made in a second, after a burst of twice as many: a TLS handshake costs the agent a millisecond."""
    connects_per_second_per_user: float = 50.0
    """The same of one user, after a burst of four times as many: what kubectl allows itself."""


class ConnectLimit:
    """Counts the connections of one agent. Every `now` is monotonic seconds and an argument."""

    def __init__(self, limits: ConnectLimits | None = None) -> None:
        self.limits = limits = limits or ConnectLimits()
        self.held = 0
        """Connections that requests hold."""
        self.delayed = 0
        """Connects that had to wait."""
        self.refused = 0
        """Requests that were refused for want of a connection."""
        self._per_user: KeyedConcurrency[str] = KeyedConcurrency(limits.connections_per_user)
        self._rate = TokenBucket(2 * limits.connects_per_second, limits.connects_per_second)
        rate = limits.connects_per_second_per_user
        self._rate_per_user: KeyedTokenBucket[str] = KeyedTokenBucket(4 * rate, rate, size=USERS, shares=True)

    def enter(self, user: str) -> None:
        """Hold one connection more for `user`. Raises RequestRefusal (429) where that is more than may be held."""
        if self.held >= self.limits.connections:
            self.refused += 1
            raise RequestRefusal(
                429, "the agent has as many connections to the API server as it may; try again shortly", retry_after=1
            )
        if not self._per_user.acquire(user):
            self.refused += 1
            text = f"you have {self.limits.connections_per_user} requests at the API server and may have no more"
            raise RequestRefusal(429, f"{text}; end some watches, logs or forwards", retry_after=1)
        self.held += 1

    def leave(self, user: str) -> None:
        """Hold one connection less for `user`."""
        self.held -= 1
        self._per_user.release(user)

    def user_turn(self, user: str, now: float) -> float:
        """Return the seconds until `user` may ask for its `turn` among all. Raises RequestRefusal (429)."""
        wait = self._rate_per_user.reserve(user, now, LONGEST_WAIT)
        return self._granted(wait, self._rate_per_user.wait(user, now) if wait is None else 0.0)

    def turn(self, now: float) -> float:
        """Return the seconds until a user whose turn has come may connect. Raises RequestRefusal (429)."""
        wait = self._rate.reserve(now, LONGEST_WAIT)
        return self._granted(wait, self._rate.wait(now) if wait is None else 0.0)

    def _granted(self, wait: float | None, until: float) -> float:
        if wait is None:
            self.refused += 1
            seconds = max(1, math.ceil(until - LONGEST_WAIT / 2))
            text = "more connections to the API server are asked for than the agent may make"
            raise RequestRefusal(429, f"{text}; try again in {seconds} s", retry_after=seconds)
        if wait:
            self.delayed += 1
        return wait

    def crowded(self, user: str) -> bool:
        """Whether so many connections are held that a new one should ask the kernel for little memory."""
        return self.held > self.limits.connections // 16 or self._per_user.held(user) > FEW_PER_USER

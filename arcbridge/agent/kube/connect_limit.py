"""Bounds how often connections to the API server are made, for a user and for all, and counts those that are held.

A TLS handshake costs the agent and the API server a millisecond each, so a user who connects too often waits for a
turn, and is refused where it is too far away. How many connections there are is bounded by the requests under way
(`authorize`), each of which holds one at the most, by the seats of those whose caller has gone, and by the bound on
unused ones (`warm_connections`). The agent's own calls are under no bound, because without them no user could log in,
but those that it makes for a user's request are that user's.
The module opens no connection. Invariant: what `enter` counted counts until `leave`.
"""

from __future__ import annotations

from arcbridge.agent.accounts import Account, Limit
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.limiters import TokenBucket

LONGEST_WAIT = 10.0
"""Seconds that a request may wait for its turn to connect; then it is refused: clients give up after 30."""
FEW_PER_USER = 32
"""Connections of one user that may have as much of the kernel's memory as it gives: a large answer arrives faster."""
FEW = 256
"""The same of all users together."""


class ConnectLimit:
    """The bounds of one agent. Every `now` is monotonic seconds and an argument."""

    def __init__(self, connects_per_second: int = 0) -> None:
        """0: no bound on all users together. The burst is two seconds' worth."""
        self.held = 0
        """Connections that requests of users hold."""
        self.delayed = 0
        """Connects that had to wait."""
        self._rate = TokenBucket(2 * connects_per_second, connects_per_second) if connects_per_second else None

    def change(self, now: float, connects_per_second: int) -> None:
        """Count by this rate from now on; 0: no bound on all users together."""
        burst, rate = 2 * connects_per_second, connects_per_second
        if not rate or self._rate is None:
            self._rate = TokenBucket(burst, rate) if rate else None
        else:
            self._rate.change(now, burst, rate)

    def enter(self, account: Account) -> None:
        """Count one connection more of this user."""
        self.held += 1
        account.connections += 1

    def leave(self, account: Account) -> None:
        """Count one connection less of this user."""
        self.held -= 1
        account.connections -= 1

    def user_turn(self, account: Account, now: float) -> float:
        """Return the seconds until a user may ask for the `turn` among all. Raises RequestRefusal (429)."""
        return self._granted(account, Limit.CONNECTS_PER_SECOND, account.reserve_connect(now, LONGEST_WAIT), now)

    def turn(self, account: Account, now: float) -> float:
        """Return the seconds until a user whose turn has come may connect. Raises RequestRefusal (429)."""
        wait = 0.0 if self._rate is None else self._rate.reserve(now, LONGEST_WAIT)
        return self._granted(account, Limit.AGENT_CONNECTS_PER_SECOND, wait, now)

    def has_turn(self, account: Account, now: float) -> bool:
        """Take the turns for a connection that no request waits for, if both are free now; return whether they were."""
        of_all = 0.0 if self._rate is None else self._rate.wait(now)
        if of_all or account.reserve_connect(now, 0.0) is None:
            return False
        return self._rate is None or self._rate.take(now)

    def crowded(self, account: Account) -> bool:
        """Return whether so many connections are held that a new one should ask the kernel for little memory."""
        return self.held > FEW or account.connections > FEW_PER_USER

    def _granted(self, account: Account, limit: Limit, wait: float | None, now: float) -> float:
        if wait is None:
            raise too_much(account, limit, now)
        if wait:
            self.delayed += 1
        return wait


def too_much(account: Account, limit: Limit, now: float, *, reported: bool = False) -> RequestRefusal:
    """Return the refusal of a request that reached a limit; unless it is `reported`, `Attempt.refuse` reports it."""
    reached = account.explain(limit)
    return RequestRefusal(
        429,
        reached.message,
        retry_after=reached.retry_after,
        retry_at=reached.retry_at,
        hold=account.hold(now),
        limit="" if reported else limit.value,
    )

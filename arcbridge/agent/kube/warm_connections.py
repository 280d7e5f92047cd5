"""Keeps one unused connection to the API server for each session that upgrades, for the session's next upgrade.

An upgrade has a connection of its own (`upgrade`), so that TCP and TLS would come before its first byte. A session
whose upgrade was answered gets its next connection meanwhile, and again until LATELY after its last upgrade. The module
sends nothing and makes no request wait: where no turn to connect is free at once, it makes none. Invariants: a
connection is given to no session but the one that it was made for, and for no other TLS settings; a session that has
ended or is detached, and an agent that drains, have none. Why: docs/decisions/0055-a-warm-connection.md.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from arcbridge.agent.kube.caller import Caller
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upstream_pool import UpstreamConnection, UpstreamPool

MAX_AGE: Final = 20.0
"""Seconds for which a connection is kept: kube-apiserver closes one that brings no request within 32 (its
ReadHeaderTimeout), and the agent is to be the first."""
LATELY: Final = 60.0
"""Seconds since a session's last upgrade after which it has no connection any more."""
SWEEP: Final = 5.0
"""Seconds between two looks at the ages."""
DELAY: Final = 0.05
"""Seconds before a connection is made: the first bytes of the upgrade that was just answered go before a handshake,
and a kubectl takes longer to start."""
FATES: Final = ("used", "expired", "closed")

Fate = Literal["used", "expired", "closed"]


@dataclass(slots=True)
class _Warm:
    """What a session has that had an upgrade lately."""

    caller: Caller
    tls: ssl.SSLContext
    upgraded_at: float
    connection: UpstreamConnection | None = None
    made_at: float = 0.0
    making: asyncio.TimerHandle | asyncio.Task[None] | None = None
    """What will make a connection, or does so."""


class WarmConnections:
    """Those of one agent. Made in the event loop."""

    def __init__(self, pool: UpstreamPool, *, most: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """`most`: sessions that may have one at a time."""
        self._pool = pool
        self._most = most
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._warm: dict[str, _Warm] = {}
        """By what the ids of the session's requests begin with, which the agent makes and no other session has."""
        self._timer: asyncio.TimerHandle | None = None
        self.counts: dict[Fate, int] = dict.fromkeys(FATES, 0)
        """What became of connections: used by an upgrade, closed for their age, closed for another reason."""

    @property
    def held(self) -> int:
        """Connections that wait for an upgrade."""
        return sum(one.connection is not None and one.connection.usable for one in self._warm.values())

    def take(self, caller: Caller, tls: ssl.SSLContext) -> UpstreamConnection | None:
        """Return the session's connection for a request that leaves now; None where it has none, or the API server has
        closed it, or the TLS settings are others."""
        one = self._warm.get(caller.request_prefix)
        if one is None or one.connection is None:
            return None
        connection = one.connection
        if connection.context is not tls or not connection.usable or not connection.silent:
            self._close(one, "closed")
            return None
        one.connection = None
        self.counts["used"] += 1
        self._pool.hand_over(connection, caller.account)
        return connection

    def upgraded(self, caller: Caller, tls: ssl.SSLContext) -> None:
        """Have a connection for the session's next upgrade: the API server has answered one."""
        if math.isinf(caller.connected_since):
            return
        one = self._warm.get(caller.request_prefix)
        if one is None:
            if len(self._warm) >= self._most:
                return
            one = self._warm[caller.request_prefix] = _Warm(caller, tls, 0.0)
        one.tls, one.upgraded_at = tls, self._clock()
        if one.connection is not None and not one.connection.usable:
            self._close(one, "closed")
        self._make(one)
        if self._timer is None:
            self._timer = self._loop.call_later(SWEEP, self.sweep)

    def end(self, caller: Caller) -> None:
        """Close what a session has: it is over, or has lost its connection."""
        self._end(caller.request_prefix, "closed")

    def end_all(self) -> None:
        """Close all: they were made with TLS settings that were replaced."""
        for key in list(self._warm):
            self._end(key, "closed")

    def change(self, most: int) -> None:
        """Let `most` sessions have one from now on."""
        self._most = most
        for key in list(self._warm)[most:]:
            self._end(key, "closed")

    def sweep(self) -> None:
        """Close those that are old, and make them anew for sessions that had an upgrade lately."""
        now = self._clock()
        for key, one in list(self._warm.items()):
            if now - one.upgraded_at >= LATELY:
                self._end(key, "expired")
            elif one.connection is not None and now - one.made_at >= MAX_AGE:
                self._close(one, "expired")
                self._make(one)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(SWEEP, self.sweep) if self._warm else None

    # -- inside -------------------------------------------------------------------------------------------------------

    def _make(self, one: _Warm) -> None:
        if one.connection is None and one.making is None:
            one.making = self._loop.call_later(DELAY, self._begin, one)

    def _begin(self, one: _Warm) -> None:
        one.making = self._loop.create_task(one.caller.account.loop_time.steps(self._dial(one)), name="warm-connection")

    async def _dial(self, one: _Warm) -> None:
        account = one.caller.account
        try:
            if account.connecting.locked() or not self._pool.limit.has_turn(account, self._clock()):
                return
            async with account.connecting:
                one.connection = await self._pool.dial(one.tls)
            one.made_at = self._clock()
        except RequestRefusal:
            pass  # the next upgrade makes its own connection, or tells its caller why there is none
        finally:
            one.making = None

    def _end(self, key: str, fate: Fate) -> None:
        one = self._warm.pop(key, None)
        if one is not None:
            if one.making is not None:
                one.making.cancel()
            self._close(one, fate)
        if not self._warm and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self, one: _Warm, fate: Fate) -> None:
        connection, one.connection = one.connection, None
        if connection is not None:
            self.counts[fate] += 1
            connection.close()

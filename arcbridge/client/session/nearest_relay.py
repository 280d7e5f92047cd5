"""Finds out which relay is the nearest one, and says when a session is to move to it.

What is not known is asked of the relays: one request each, which shows the way to the relay and brings its word on the
agent. A first start waits for the answers of near relays alone; later a relay is asked when what is known of it is old,
or when it would be nearer than the one in use, every few minutes at most. It moves no session itself. Invariant: no
request is made for a stream, and none where there is one relay.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.errors import ArcbridgeError
from arcbridge.net.nearest import shorter
from arcbridge.tasks import cancel_and_wait
from arcbridge.untrusted_json import read_json_object

if TYPE_CHECKING:
    from arcbridge.client.session.connection import ClusterAccess

FIRST_LOOK: Final = 5.0
"""Seconds from the begin of a process to the first look."""
LOOK: Final = 60.0
"""Seconds between two looks, which ask no relay by themselves."""
ASK_AGAIN: Final = 240.0
"""Least seconds between two requests to one relay."""
OLD: Final = 3600.0
"""Seconds after which a relay is asked that is not nearer as far as it is known."""
FIRST_WAIT: Final = 1.0
"""Longest time that a first start waits for relays that do not answer, seconds."""
FLIGHTS: Final = 3
"""Round trips of one request: TCP, TLS, HTTP. What has not answered for so long is farther than what has."""
DEADLINE: Final = 10.0
"""Seconds for the answers at a look."""


class NearestRelay:
    """The question for the relays to one cluster."""

    def __init__(self, access: ClusterAccess) -> None:
        self._access = access
        self._relays, self._lengths = access.relays, access.relays.lengths
        self._asked_at: dict[RelayAccess, float] = {}
        """When each relay was asked last, seconds of the loop."""
        self._answered: set[RelayAccess] = set()
        """The relays whose last answer named an agent."""
        self.asks = len(access.relays) > 1 and self._lengths.round_trips is not None

    async def learn(self, *, only_near: bool = True) -> None:
        """Ask the relays to which the way is not known, before a first join; raises as `Tokens.access` does.

        `only_near`: wait for those alone that may be nearer than what has answered, and not for long.
        """
        unknown = [relay for relay in self._relays.all if self._lengths.age(relay) == math.inf]
        if self.asks and unknown and not self._asked_at:
            await self._ask(unknown, FIRST_WAIT if only_near else DEADLINE, only_near=only_near)

    async def look(self, in_use: RelayAccess, round_trip: float) -> RelayAccess | None:
        """Return the relay to move to, or None; `round_trip`: of the session through the relay in use, 0: not known."""
        self._lengths.learn_whole(in_use, round_trip)
        now, nearest = asyncio.get_running_loop().time(), self._lengths.nearest
        due = [
            relay
            for relay in self._relays.all
            if relay is not in_use
            and now - self._asked_at.get(relay, -ASK_AGAIN) >= ASK_AGAIN
            and (
                self._lengths.age(relay) >= OLD
                or nearest.before(relay, in_use)
                or shorter(self._lengths.possible(relay), self._lengths.length(in_use))
            )
        ]
        if due:
            await self._ask(due, DEADLINE)
        if self._lengths.round_trips is not None:
            await asyncio.to_thread(self._lengths.round_trips.save)
        better = [relay for relay in due if relay in self._answered and nearest.before(relay, in_use)]
        return next((relay for relay in self._relays.order() if relay in better), None)

    async def _ask(self, relays: Sequence[RelayAccess], deadline: float, *, only_near: bool = False) -> None:
        """Ask relays, all at once; `only_near`: as in `learn`."""
        token = await self._access.tokens.access()
        loop = asyncio.get_running_loop()
        began = loop.time()
        tasks = {loop.create_task(self._ask_one(relay, token)) for relay in relays}
        self._asked_at |= dict.fromkeys(relays, began)
        waiting = tasks
        try:
            while waiting:
                left = deadline
                if only_near:
                    left = min(deadline, FLIGHTS * min(map(self._lengths.length, self._relays.all)))
                left -= loop.time() - began
                if left <= 0:
                    break
                _, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(*tasks)

    async def _ask_one(self, relay: RelayAccess, token: str) -> None:
        from arcbridge.client.session.relay_http import request  # no start with one relay needs it

        cluster, tokens = self._access.cluster, self._access.tokens
        own: list[float] = []
        self._answered.discard(relay)
        try:
            status, body = await request(relay, token, tokens, f"/v1/clusters/{cluster}", measured=own.append)
        except ArcbridgeError:
            return  # the join says why, where it is made through this relay
        row = read_json_object(body) if status == 200 else {}
        beyond = row.get("round_trip")
        self._lengths.learn(relay, own[0], beyond if isinstance(beyond, int | float) else 0.0)
        if status == 404 or row.get("agents") == 0:
            self._lengths.learn_absence(relay)
        elif status == 200:
            self._answered.add(relay)

"""Decides which relays of the list the agent connects to, and when. It has no socket and no clock.

Relays of the preferred region come first, then near ones (`net.nearest`); every agent process shuffles equals for
itself, so that many agents spread over the relays. The first ones of its order, as many as are wanted, are the
*preferred* ones. While one of them cannot be reached the next in the order stands in for it, until the preferred one
has come back and stayed.

Each relay has its own backoff: one that is down, or that has said when to come back, holds nothing else up. One that is
up and turns the agent away does, for a delay that doubles: the agents that came with this one are at the other relays
as well, and would go through their whole lists at once (docs/decisions/0051-one-virtual-clock.md).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence

from arcbridge.net.address import Address
from arcbridge.net.backoff import HEALTHY, Backoff
from arcbridge.net.nearest import Nearest
from arcbridge.net.round_trips import RoundTrips

HINT_MIN, HINT_MAX = 1, 600
"""Bounds of a relay's hint when to come back, seconds (docs/threats.md#B8)."""
PAUSE_FIRST, PAUSE_CAP = 0.5, 5.0
"""Bounds of the first and of the longest pause behind a relay that turned the agent away, seconds: with 1 and 15
the agents of one region came back within 57 s, not 30, because they found more slowly which relays had turns."""


class RelayChoice:
    """The order of the relays, and the earliest time for each. `draw` returns floats in [0, 1)."""

    def __init__(
        self,
        relays: Sequence[Address],
        wanted: int,
        *,
        draw: Callable[[], float] = random.random,
        make_backoff: Callable[[], Backoff] = Backoff,
        round_trips: RoundTrips | None = None,
        region: Collection[Address] = (),
    ) -> None:
        """`round_trips`: those to the relays, by their addresses. `region`: the relays of the preferred region."""
        self.round_trips = round_trips or RoundTrips()
        self._draw = draw
        self._lengths: dict[Address, float] = {}
        self._nearest = Nearest(self._lengths.__getitem__, region)
        self._note_lengths(relays)
        self.order = self._nearest.ranked(list(relays), draw)
        self.wanted = max(1, min(wanted, len(self.order)))
        self._backoffs = {relay: make_backoff() for relay in self.order}
        self._not_before = dict.fromkeys(self.order, 0.0)
        self._named_a_time: set[Address] = set()
        """Relays that named the time at which they may be tried again."""
        self._pauses = Backoff(first=PAUSE_FIRST, cap=PAUSE_CAP, random=draw)
        self._paused_at = self._paused_until = -math.inf
        """When a relay turned the agent away last, and until when none is tried."""
        self._turned_away: dict[Address, list[float]] = {}
        """When each relay did, the last two times at most, of those that did within HEALTHY seconds of one another."""

    @property
    def preferred(self) -> list[Address]:
        """The relays that this agent connects to when all can be reached."""
        return self.order[: self.wanted]

    def rerank(self) -> None:
        """Order the relays by the round trips that are known now; preferred ones give way to nearer ones alone."""
        self._note_lengths(self.order)
        found = self._nearest.chosen(self.preferred, self.order, self.wanted, self._draw)
        self.order = found + self._nearest.ranked([one for one in self.order if one not in found], self._draw)

    def _note_lengths(self, relays: Sequence[Address]) -> None:
        self._lengths.update((relay, self.round_trips.least(str(relay))) for relay in relays)

    def unmeasured(self, taken: Collection[Address], within: float) -> list[Address]:
        """Return the relays outside of `taken` whose round trip was not measured for so many seconds; none where all
        relays are wanted."""
        if self.wanted == len(self.order):
            return []
        return [one for one in self.order if one not in taken and self.round_trips.age(str(one)) >= within]

    def next(self, taken: Collection[Address], now: float) -> Address | None:
        """Return the first relay of the order that is not in `taken` and may be tried. Those that turned the agent away
        twice of late come last: one that always does would else be the first behind each pause. Once it says that there
        are many agents, who are at home later if they go elsewhere."""
        free = [one for one in self.order if one not in taken and self.may_try(one, now)]
        return min(free, key=lambda one: max(self._turned_away.get(one, [])[1:], default=-math.inf), default=None)

    def next_time(self, taken: Collection[Address]) -> float | None:
        """Return when a relay that is not in `taken` may be tried; None: there is none."""
        times = [when for one, when in self._not_before.items() if one not in taken]
        return max(min(times), self._paused_until) if times else None

    def may_try(self, relay: Address, now: float) -> bool:
        """Return whether this relay may be tried now."""
        return max(self._not_before[relay], self._paused_until) <= now

    def surplus(self, up: Collection[Address]) -> list[Address]:
        """Return the relays of `up` that the agent need not keep: those behind the wanted number, in its order."""
        return [relay for relay in self.order if relay in up][self.wanted :]

    def failed(
        self,
        relay: Address,
        now: float,
        *,
        lasted: float = 0.0,
        hint: float | None = None,
        not_before: float = 0.0,
        within: float = math.inf,
    ) -> float:
        """Return the seconds until this relay may be tried again, after its connection had been good for `lasted`
        seconds.

        `hint` is the delay that the relay named; it is obeyed within bounds, and spread. `not_before` is an earlier
        answer that still holds. `within` bounds the delay where the relay named none.
        """
        if hint is not None:
            hint = min(max(hint, HINT_MIN), HINT_MAX)
        if relay in self._named_a_time:  # to another connection: a relay drains, and its successor has the address
            not_before = max(not_before, self._not_before[relay])
        named = hint is not None or not_before > now
        (self._named_a_time.add if named else self._named_a_time.discard)(relay)
        delay = self._backoffs[relay].next_delay(lasted=lasted, hint=hint)
        if hint is None:
            delay = min(delay, within)
        self._not_before[relay] = max(now + delay, not_before)
        return self._not_before[relay] - now

    def turned_away(self, relay: Address, now: float, *, within: float = math.inf) -> int:
        """Note that a relay which is up had no turn for the agent: no relay is tried for a moment, `within` at most.
        Return how many relays did so of late."""
        late = {one: times for one, times in self._turned_away.items() if now - times[-1] < HEALTHY}
        self._turned_away = late | {relay: [*late.get(relay, [])[-1:], now]}
        delay = self._pauses.next_delay(lasted=now - self._paused_at)
        self._paused_at, self._paused_until = now, min(max(self._paused_until, now + delay), now + within)
        return len(self._turned_away)

    def cap_delays(self, now: float, within: float) -> None:
        """Let each relay be tried within so many seconds, unless it named a time itself; called when no relay is left.

        A delay that was chosen while another relay served would otherwise leave the cluster without any: with two
        relays that restart in turn it grows to half a minute, though each is back in seconds.
        """
        self._paused_until = min(self._paused_until, now + within)
        for relay in self.order:
            if relay not in self._named_a_time:
                self._not_before[relay] = min(self._not_before[relay], now + within)

    def left(self, relay: Address, now: float) -> None:
        """Note that the agent has left this relay of its own accord: it may be tried at once, but for a time that it
        has named to another connection."""
        self._backoffs[relay].reset()
        if relay not in self._named_a_time:
            self._not_before[relay] = now

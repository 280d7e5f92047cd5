"""What may be observed: a reference that knows the outages and the stated bounds, and nothing of the real parts.

It is told what happens to the environment (a relay dies, a path is cut) and what is seen from outside (a handshake, a
user who is refused, an agent that is complete again). `violations` says which of it the product's pages do not allow.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from bench.virtual.plan import Outage, Size

BACK = 60.0
"""Seconds after a loss within which 99 % of the agents are complete again (docs/change.md, Upgrade)."""
HOME = 120.0
"""Seconds after its return within which a relay for which others stood in has its agents back (there)."""
HOME_FROM_ALL = 300.0
"""The same where all relays were away at once (there)."""
ATTEMPTS = 25
"""Connections of an agent to relays, on average, in the first minute after all relays were away."""
SPREAD = 0.15
"""How far from the mean the number of a relay's agents may be after an hour."""
WANTED = 2


@dataclass
class Story:
    """One outage and what came of it."""

    outage: Outage
    began: float
    ended: float = math.inf
    back: list[float] = field(default_factory=list)
    """How long each agent that lost a connection by it was incomplete, seconds."""
    home: list[float] = field(default_factory=list)
    """How long each of them was without a relay that it prefers, seconds since that was up again."""
    attempts: int = 0
    """Connections that came to relays within `BACK` after its end."""

    @property
    def lost(self) -> float:
        """From when on a lost connection can be replaced: at once, unless there is no other relay."""
        return self.ended if self.outage.kind == "all" else self.began


class Model:
    """The reference, and the counts from which a result is made."""

    def __init__(self, size: Size, ways: dict[int, int]) -> None:
        """`ways`: the region of each relay."""
        self.size, self._ways = size, ways
        self.stories: list[Story] = []
        self.turned_away: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.cut = [0, 0]
        """Sessions that drains have cut: of agents that were not told to move them, and that were."""
        self.unknown = 0
        """How often an agent was known to no relay though too few had gone."""
        self.served = 0
        self.without: list[float] = []
        """How long users were without a session, seconds."""
        self.samples: list[tuple[float, list[int]]] = []
        """Time, and how many agents each relay has."""
        self.handshakes = 0
        self.peak = 0
        """Most handshakes of one relay in any second."""
        self.attempts = 0
        self.peak_attempts = 0
        """Most connections that came to one relay in any second of the clock."""
        self.trace = 0
        """A number that is equal for equal runs."""
        self.found: Counter[str] = Counter()
        self._level = dict.fromkeys(ways, 0.0)
        self._last = dict.fromkeys(ways, 0.0)
        self._attempts = dict.fromkeys(ways, (0, 0))
        """The last second in which connections came to a relay, and how many."""
        self._recent: dict[int, list[float]] = {index: [] for index in ways}
        self._gone: list[tuple[Story, int, bool]] = []
        """By what a relay went from sight, from that of which region's agents (-1: all), and whether without a word."""

    # -- the environment ---------------------------------------------------------------------------------------------

    def relay_starts(self, index: int) -> None:
        self._level[index] = 0.0
        self._recent[index].clear()

    def outage_begins(self, outage: Outage, now: float) -> None:
        story, hard = Story(outage, now), outage.kind not in ("drain", "upgrade")
        self.stories.append(story)
        self._gone += [(story, -1, hard)] * len(outage.relays)
        for one, other in (outage.regions, outage.regions[::-1]):
            self._gone += [(story, one, True)] * sum(region == other for region in self._ways.values())

    def outage_ends(self, outage: Outage, now: float) -> None:
        self.stories[-1].ended = now

    # -- what is seen ------------------------------------------------------------------------------------------------

    def attempt(self, index: int, now: float) -> None:
        """A connection has come to a relay."""
        if self.stories and now <= self.stories[-1].ended + BACK:
            self.stories[-1].attempts += now >= self.stories[-1].ended
        second, count = self._attempts[index]
        count = count + 1 if second == int(now) else 1
        self._attempts[index] = int(now), count
        self.attempts += 1
        self.peak_attempts = max(self.peak_attempts, count)

    def handshake(self, index: int, now: float) -> None:
        """A relay begins a handshake: by its turn, or to say that there is none."""
        self.handshakes += 1
        self.trace = hash((self.trace, index, round(now, 6)))
        rate = self.size.pace + max(self.size.pace / 10, 1.0)
        self._level[index] = max(0.0, self._level[index] - (now - self._last[index]) * rate) + 1
        self._last[index] = now
        if self._level[index] > self.size.burst + 2.001:
            self.found[f"pace: a relay begins more handshakes than agents_per_second = {self.size.pace} lets in"] += 1
        recent = self._recent[index]
        recent.append(now)
        while recent[0] < now - 1.0:
            recent.pop(0)
        self.peak = max(self.peak, len(recent))

    def agent_is_back(self, since: float, now: float) -> None:
        """An agent has as many control connections as it wants, which it had not since then."""
        if (story := self._story(since)) is not None:
            story.back.append(now - max(since, min(story.lost, now)))

    def agent_is_home(self, since: float, now: float) -> None:
        """An agent is connected to the relays that it prefers, which it was not since then."""
        if (story := self._story(since)) is not None:
            story.home.append(now - max(since, min(story.ended, now)))

    def _story(self, since: float) -> Story | None:
        return next((one for one in reversed(self.stories) if one.began <= since), None)

    def user_refused(self, region: int, began: float, now: float, why: str) -> None:
        """Every relay has refused a user an agent of this region."""
        self.refused[why] += 1
        if not self._may_be_away(region, began):
            self.found[f"users: refused though too few relays had gone ({why})"] += 1

    def agent_is_unknown(self, region: int, now: float) -> None:
        """A relay has said that it, and all others, have no agent of this region that a user wants."""
        if not self._may_be_away(region, now):
            self.unknown += 1

    def _may_be_away(self, region: int, since: float) -> bool:
        lately = [one for one in self._gone if since - BACK <= one[0].lost and one[1] in (-1, region)]
        return len(lately) >= WANTED and any(hard for _, _, hard in lately)

    def cut_by_drain(self, agent_was_told: bool) -> None:
        """A drain has cut a session; its agent had a control connection to the relay, or not."""
        self.cut[agent_was_told] += 1
        if agent_was_told:
            self.found["drain: a session was cut whose agent was told to move it"] += 1

    def user_is_served(self, began: float, now: float, without: float) -> None:
        self.served += 1
        self.without.append(without)

    @property
    def chance(self) -> float:
        """By what part few agents differ from many: three standard deviations of a relay's."""
        return 3 / math.sqrt(WANTED * self.size.agents / self.size.relays)

    # -- the verdict -------------------------------------------------------------------------------------------------

    def violations(self) -> list[str]:
        """Return what was seen that may not be, except for what is seen of the end (`world_at_end`)."""
        found = [f"{what} ({count} times)" for what, count in self.found.items()]
        if self.unknown > self.served / 100:  # a dial may come between two connections of an agent
            found.append(f"fleet: an agent is known to no relay though too few relays had gone ({self.unknown} times)")
        for story in self.stories:
            outage, late = story.outage, percentile(story.back, 0.99)
            if late > BACK:
                found.append(f"back: 99 % are back after {late:.0f} s, {outage}")
            if outage.kind == "all" and story.attempts > ATTEMPTS * self.size.agents:
                found.append(f"storm: {story.attempts} connections in the first minute, {outage}")
            bound = HOME_FROM_ALL if outage.kind == "all" else HOME
            if (home := percentile(story.home, 0.99)) > bound * (1 + self.chance):
                found.append(f"home: 99 % are at their own relays again after {home:.0f} s, {outage}")
        return found


def percentile(values: list[float], part: float) -> float:
    """Return the value below which `part` of them are; 0 of none."""
    return sorted(values)[min(int(len(values) * part), len(values) - 1)] if values else 0.0

"""The fleet: several relays, or processes of one, that act as one; here is what each does, and that of a relay alone.

An agent holds a control connection to a relay; that relay *registers* it. Any relay of the fleet may *dial* a
cluster: the request reaches one agent through whichever relay holds it. There is no table of who is where that could
be stale: what is not registered now is not there.

Every engine promises (tests/relay/fleet/conformance.py):

1. "No agent connected" is said at once, never after a timeout.
2. A dial goes to the connection with the fewest dials waiting, in turn; and if that one refuses, is lost or stays
   silent, to exactly one other (docs/threats.md#J4). A dial for an instance goes to that instance alone, for the
   session that a client wants back is nowhere else: "not connected" is NO_INSTANCE, at once, where the cluster has
   others.
3. A reply counts only when it names the dial's own token.
4. Of two connections of one instance the newer stays, the older is told so (docs/threats.md#E10).
5. A draining or ended connection gets no new dial; one that drains gets those for sessions that its instance holds.
6. That a user has lost the right to a cluster is told to every other process, once and without waiting: the agent that
   holds the session may be connected to any of them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from arcbridge.errors import JoinRefused
from arcbridge.net.join import JoinCode
from arcbridge.observe.metrics import Metrics
from arcbridge.tasks import within
from arcbridge.wire.records import Dial, Record, Status

FIRST_SHARE: Final = 0.4
"""Part of the time that the first of two connections gets: an agent's status takes a round trip, so a silent one is
stuck, and the second needs time to join as well."""
_RETRY_AFTER: Final = 5


@dataclass(frozen=True, slots=True)
class AgentReport:
    """What an agent has reported on itself, or what is assumed of one that has not yet."""

    ready: bool = True
    unready: str = ""
    """The readiness checks that fail, separated by spaces."""
    checks: Mapping[str, str] | None = None
    """The code of each self-check's fault, empty where it passes; None: the agent does not report its checks."""
    sessions: int = 0
    round_trip: float = 0.0
    """Seconds between relay and agent; 0: not measured."""
    relay_ca: str = ""
    """Pin of the newest of the relay's CAs that the agent knows; empty: it does not say."""
    certificate_ca: str = ""
    """Pin of the CA by which the agent's certificate is; empty: it does not say."""
    cluster_ca: str = ""
    """Pin of the newest of its cluster's CAs that the agent knows; empty: it does not say."""

    @property
    def failing(self) -> str:
        """What fails, separated by spaces: self-checks as `name:code`, and what else makes the agent unready."""
        found = {name: f"{name}:{code}" for name, code in (self.checks or {}).items() if code}
        return " ".join((*found.values(), *(name for name in self.unready.split() if name not in found)))


@dataclass(frozen=True, slots=True)
class Lost(Record):
    """A user has lost the right to a cluster: its agents are to end the user's sessions (`ControlServer.end_sessions`).

    `username` and `subject` are those of the access token. Sessions under tokens issued before `before`, unix seconds,
    end; `reason` is shown to the user. With a `session`, that one alone ends, and no right is lost.
    """

    cluster: str = ""
    username: str = ""
    subject: str = ""
    before: int = 0
    reason: str = ""
    session: str = ""


class AgentLink(Protocol):
    """A registered control connection, as the fleet uses it (`relay.control.ControlConnection`)."""

    cluster: str
    instance: str
    version: str
    since: float
    """When it was registered, unix seconds."""
    report: AgentReport
    """What it reported last; known where the connection is, and elsewhere the best is assumed."""
    draining: bool
    """Whether the connection takes no new dial."""

    @property
    def pending(self) -> int:
        """Dials that wait for this connection's status."""

    async def dial(self, dial: Dial) -> Status:
        """Send the request and wait for the status of that token, which is code 0.

        Raises `JoinRefused`: AGENT_REFUSED with the agent's words, NO_AGENT when the connection is lost first. No
        deadline of its own; cancelling it forgets the token.
        """

    def replaced(self) -> None:
        """Say goodbye, because a newer connection of the same instance was registered."""


class RelayPeers(Protocol):
    """Other relays that can take over an agent's join (`relay.hop`). A relay's id begins the dial tokens it makes."""

    relay_id: str
    """The id of this process; another one after a restart."""
    on_failed: Callable[[bytes], None]
    """Called with the SHA-256 of a dial token of this relay whose agent came to a relay that cannot pass it on."""

    async def address_of(self, relay_id: str) -> str:
        """Return the internal address of a relay, empty where no relay has this id; raises `ArcbridgeError`."""

    async def tell_failed(self, relay_id: str, token: str) -> None:
        """Tell a relay that the agent to which it gave `token` cannot be passed on to it."""


class Fleet:
    """The fleet of one relay in one process; what several have in common derives from it, and the module's docstring
    has the rules. `JoinRefused` has a `net.join.JoinCode`. A dial costs constant work in the number of a cluster's
    agents."""

    def __init__(self) -> None:
        self.on_lost: Callable[[Lost], None] = lambda lost: None
        """Called with what another process of the fleet has told."""
        self.on_engine: Callable[[], None] = lambda: None
        """Called when what connects the relays answers again, and when it does no more."""
        self.on_question: Callable[[Mapping[str, Any]], list[dict[str, Any]]] = lambda question: []
        """Answers an operator's question for this relay (`relay.operations`), where another relay of the fleet asks."""
        self._links: dict[str, dict[str, AgentLink]] = {}
        """By cluster and instance."""
        self._turn = itertools.count()
        self._last_asked: dict[AgentLink, int] = {}
        """When each link was last asked: round robin among those with equally many dials waiting."""

    async def ask_others(self, question: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Ask the other relays of the fleet; return the rows of all that answer. There are none without an engine."""
        return []

    @property
    def engine_connected(self) -> bool | None:
        """Whether the engine behind the fleet answers; None where there is none."""
        return None

    @property
    def peers(self) -> RelayPeers | None:
        """The other relays that an agent's join can be passed on to; None where the fleet has none."""
        return None

    def add_metrics(self, metrics: Metrics) -> None:
        """Register what this fleet counts."""

    async def start(self) -> None:
        """Connect to the other processes."""

    async def close(self) -> None:
        """Disconnect from the engine; links are closed by their owners."""
        self._links.clear()
        self._last_asked.clear()

    async def drain(self) -> None:
        """Take no dial from other relays any more, because this relay goes away. Its own dials still go out.

        Called before the agents are told, so that no client is sent to an agent that is about to leave.
        """

    async def register(self, link: AgentLink) -> None:
        """Let `link` take dials of its cluster from now on; an older one of the same instance here is replaced."""
        self.add(link)

    async def unregister(self, link: AgentLink) -> None:
        """Send `link` no more dials; a link that is not registered is passed over."""
        self.remove(link)

    def add(self, link: AgentLink) -> None:
        """Put a link into the table of this process: see `register`."""
        of_cluster = self._links.setdefault(link.cluster, {})
        older = of_cluster.get(link.instance)
        if older is link:
            return
        of_cluster[link.instance] = link
        self._last_asked[link] = next(self._turn)
        if older is not None:
            self._last_asked.pop(older, None)
            older.replaced()

    def remove(self, link: AgentLink) -> None:
        """Take a link out of the table of this process: see `unregister`."""
        of_cluster = self._links.get(link.cluster, {})
        # Only itself: the entry may be a newer connection's already.
        if of_cluster.get(link.instance) is link:
            del of_cluster[link.instance]
            self._last_asked.pop(link, None)
            if not of_cluster:
                del self._links[link.cluster]

    async def dial(self, cluster: str, dial: Dial, timeout: float) -> Status:
        """Ask an agent of `cluster` to join and return its consent; `dial.instance` alone where that is given.

        `timeout` in seconds bounds both attempts. Raises `JoinRefused`: NO_AGENT, NO_INSTANCE, AGENT_REFUSED,
        AGENT_TIMEOUT; of two failures the second is told, which is the more recent truth. INTERNAL, with a time to
        come back, when no agent is at this relay and the others cannot be asked: within two seconds.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        tried: list[AgentLink] = []
        failure = no_agent(cluster, dial.instance if self.has(cluster) else "")
        while len(tried) < 2 and (link := self.pick(cluster, dial.instance, tried)) is not None:
            tried.append(link)
            left = until - loop.time()
            another = len(tried) < 2 and self.pick(cluster, dial.instance, tried) is not None
            try:
                return await self.ask(link, dial, left * FIRST_SHARE if another else left)
            except JoinRefused as error:
                failure = error
        raise failure

    async def ask(self, link: AgentLink, dial: Dial, timeout: float) -> Status:
        """Ask one agent once. Raises `JoinRefused`."""
        if link in self._last_asked:
            self._last_asked[link] = next(self._turn)
        words = f"an agent of cluster {link.cluster} is connected but did not answer the dial request"
        async with within(timeout, JoinRefused(JoinCode.AGENT_TIMEOUT, words, retry_after=_RETRY_AFTER)):
            return await link.dial(dial)

    def tell_lost(self, lost: Lost) -> None:
        """Tell the other processes of the fleet. Does not wait, and leaves out a process that cannot be reached.

        The process that holds the sessions cuts them all the same, and the agent ends a session whose client does not
        come back.
        """

    async def count(self, clusters: Sequence[str]) -> Mapping[str, int]:
        """Return how many agents each of these clusters has connected; those with none may be left out."""
        return {cluster: len(self._links[cluster]) for cluster in clusters if cluster in self._links}

    def reported(self, link: AgentLink) -> None:
        """Take note that the agent of this link has reported, or has begun to drain."""

    def round_trip(self, cluster: str) -> float:
        """Return the least round trip, seconds, that an agent of the cluster reports to *this* relay; 0: none does."""
        found = (link.report.round_trip for link in self._links.get(cluster, {}).values() if not link.draining)
        return min((one for one in found if one > 0), default=0.0)

    def links(self, cluster: str | None = None) -> list[AgentLink]:
        """Return the links registered at *this* relay: all, or those of one cluster."""
        found = self._links.values() if cluster is None else [self._links.get(cluster, {})]
        return [link for of_cluster in found for link in of_cluster.values()]

    def pick(
        self, cluster: str, instance: str, tried: Collection[AgentLink] = (), avoid: Collection[str] = ()
    ) -> AgentLink | None:
        """Return the link to ask next by promise 2: neither one of the `tried` nor of an instance to `avoid`; of
        `instance` alone where that is given, which may drain: it serves what runs. None when no agent is left."""
        of_cluster = self._links.get(cluster, {})
        candidates = [
            link
            for link in ([of_cluster[instance]] if instance in of_cluster else [] if instance else of_cluster.values())
            if (instance or not link.draining) and link not in tried and link.instance not in avoid
        ]
        return min(candidates, key=lambda link: (link.pending, self._last_asked[link]), default=None)

    def find(self, cluster: str, instance: str) -> AgentLink | None:
        return self._links.get(cluster, {}).get(instance)

    def has(self, cluster: str, instance: str = "") -> bool:
        """Return whether the cluster, or that instance of it, has a link here; a draining one counts."""
        of_cluster = self._links.get(cluster, {})
        return bool(of_cluster) if not instance else instance in of_cluster


def lost_agent(cluster: str) -> JoinRefused:
    """Refuse a dial whose agent's connection was lost."""
    return JoinRefused(JoinCode.NO_AGENT, f"the agent of cluster {cluster} lost its connection", retry_after=2)


def no_agent(cluster: str, instance: str = "") -> JoinRefused:
    """Refuse a dial for want of an agent; `instance`: that one was wanted, and others are there."""
    if instance:
        return JoinRefused(
            JoinCode.NO_INSTANCE,
            f"the agent of cluster {cluster} that has the session is not connected",
            retry_after=_RETRY_AFTER,
        )
    return JoinRefused(
        JoinCode.NO_AGENT,
        f"no agent of cluster {cluster} is connected: check that its agent runs and can reach this relay",
        retry_after=_RETRY_AFTER,
    )

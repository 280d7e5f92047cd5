"""The fleet: several relays that act as one; here is what a relay asks of it.

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
5. A draining or ended connection gets no new dial.
6. That a user has lost the right to a cluster is told to every other process, once and without waiting: the agent that
   holds the session may be connected to any of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from arcbridge.observe.metrics import Metrics
from arcbridge.wire.records import Dial, Record, Status


@dataclass(frozen=True, slots=True)
class AgentReport:
    """What an agent has reported on itself, or what is assumed of one that has not yet."""

    ready: bool = True
    reason: str = ""
    """Why it is not ready."""
    checks: Mapping[str, str] | None = None
    """The code of each self-check's fault, empty where it passes; None: the agent does not report its checks."""
    sessions: int = 0
    round_trip: float = 0.0
    """Seconds between relay and agent; 0: not measured."""

    @property
    def failing(self) -> str:
        """The checks that fail, as `name:code`, separated by spaces."""
        return " ".join(f"{name}:{code}" for name, code in (self.checks or {}).items() if code)


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """What the relay tells an operator of one control connection."""

    instance: str
    version: str
    since: float
    """When it was registered, unix seconds."""
    report: AgentReport = AgentReport()
    """Known where the connection is; another process of the fleet assumes the best."""


@dataclass(frozen=True, slots=True)
class Lost(Record):
    """A user has lost the right to a cluster: its agents are to end the user's sessions (`ControlServer.end_sessions`).

    `username` and `subject` are those of the access token. Sessions under tokens issued before `before`, unix seconds,
    end; `reason` is shown to the user. With a `session`, that one alone ends, and no right is lost.
    """

    TAGS: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5, 6)
    cluster: str = ""
    username: str = ""
    subject: str = ""
    before: int = 0
    reason: str = ""
    session: str = ""


def _ignore(lost: Lost) -> None:
    """Stand in for the handler until the relay serves."""


def _no_rows(question: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Stand in for the answer until the relay serves."""
    return []


class AgentLink(Protocol):
    """A registered control connection, as the fleet uses it (`relay.control.ControlConnection`)."""

    @property
    def cluster(self) -> str: ...

    @property
    def instance(self) -> str: ...

    @property
    def info(self) -> AgentInfo: ...

    @property
    def pending(self) -> int:
        """Dials that wait for this connection's status."""
        ...

    @property
    def draining(self) -> bool:
        """Whether the connection takes no new dial."""
        ...

    async def dial(self, dial: Dial) -> Status:
        """Send the request and wait for the status of that token, which is code 0.

        Raises `JoinRefused`: AGENT_REFUSED with the agent's words, NO_AGENT when the connection is lost first. No
        deadline of its own; cancelling it forgets the token.
        """
        ...

    def replaced(self) -> None:
        """Say goodbye, because a newer connection of the same instance was registered."""
        ...


class RelayPeers(Protocol):
    """Other relays that can take over an agent's join (`relay.hop`). A relay's id begins the dial tokens it makes."""

    on_failed: Callable[[bytes], None]
    """Called with the SHA-256 of a dial token of this relay whose agent came to a relay that cannot pass it on."""

    @property
    def relay_id(self) -> str:
        """The id of this process; another one after a restart."""
        ...

    async def address_of(self, relay_id: str) -> str:
        """Return the internal address of a relay, empty where no relay has this id; raises `ArcbridgeError`."""
        ...

    async def tell_failed(self, relay_id: str, token: str) -> None:
        """Tell a relay that the agent to which it gave `token` cannot be passed on to it."""
        ...


class Fleet(ABC):
    """What a relay asks of its fleet; the module's docstring has the rules. `JoinRefused` has a `net.join.JoinCode`."""

    on_lost: Callable[[Lost], None] = staticmethod(_ignore)
    """Called with what another process of the fleet has told."""

    on_question: Callable[[Mapping[str, Any]], list[dict[str, Any]]] = staticmethod(_no_rows)
    """Answers an operator's question for this relay (`relay.operations`), where another relay of the fleet asks."""

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

    @abstractmethod
    def add_metrics(self, metrics: Metrics) -> None:
        """Register what this fleet counts."""

    @abstractmethod
    async def start(self) -> None: ...

    @abstractmethod
    async def close(self) -> None:
        """Disconnect from the engine; links are closed by their owners."""

    @abstractmethod
    async def drain(self) -> None:
        """Take no dial from other relays any more, because this relay goes away. Its own dials still go out.

        Called before the agents are told, so that no client is sent to an agent that is about to leave.
        """

    @abstractmethod
    async def register(self, link: AgentLink) -> None:
        """Let `link` take dials of its cluster from now on; an older one of the same instance here is replaced."""

    @abstractmethod
    async def unregister(self, link: AgentLink) -> None:
        """Send `link` no more dials; a link that is not registered is passed over."""

    @abstractmethod
    async def dial(self, cluster: str, dial: Dial, timeout: float) -> Status:
        """Ask an agent of `cluster` to join and return its consent; `dial.instance` alone where that is given.

        `timeout` in seconds bounds both attempts. Raises `JoinRefused`: NO_AGENT, NO_INSTANCE, AGENT_REFUSED,
        AGENT_TIMEOUT; of two failures the second is told, which is the more recent truth. INTERNAL, with a time to
        come back, when no agent is at this relay and the others cannot be asked: within two seconds.
        """

    @abstractmethod
    def tell_lost(self, lost: Lost) -> None:
        """Tell the other processes of the fleet. Does not wait, and leaves out a process that cannot be reached.

        The process that holds the sessions cuts them all the same, and the agent ends a session whose client does not
        come back.
        """

    @abstractmethod
    async def agents(self, cluster: str) -> list[AgentInfo]:
        """Return the connections of one cluster in the whole fleet, oldest first."""

    @abstractmethod
    async def count(self, clusters: Sequence[str]) -> Mapping[str, int]:
        """Return how many agents each of these clusters has connected; those with none may be left out."""

    @abstractmethod
    def links(self) -> list[AgentLink]:
        """Return all links registered at *this* relay."""

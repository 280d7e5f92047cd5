"""The places for agents of one relay: which connections hold one, and which gives its place to a newcomer.

It ends no connection and sends nothing: `relay.control` does. Invariant: a connection leaves for a newcomer only where
its cluster keeps at least as many as the newcomer's has then. So an enrolled cluster, however many instances its agents
say they are, keeps no other cluster out, and two clusters do not push each other out in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class OfCluster(Protocol):
    """A connection, as far as its place is concerned."""

    cluster: str


Link = TypeVar("Link", bound=OfCluster)


class AgentSlots(Generic[Link]):
    """The connections that hold a place, by cluster, each cluster's in the order in which they came."""

    def __init__(self) -> None:
        self._held: dict[str, dict[Link, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Link]:
        """Iterate over a copy: connections may end meanwhile."""
        return iter([link for held in self._held.values() for link in held])

    def add(self, link: Link) -> None:
        """Give a connection a place."""
        held = self._held.setdefault(link.cluster, {})
        self._count += link not in held
        held[link] = None

    def discard(self, link: Link) -> None:
        """Take a connection's place, if it holds one."""
        held = self._held.get(link.cluster, {})
        if link in held:
            del held[link]
            self._count -= 1
            if not held:
                del self._held[link.cluster]

    def giving_way(self, cluster: str) -> Link | None:
        """Return the connection that makes room for another one of `cluster`; None where the newcomer has to wait.

        It is the newest of the cluster that holds most: an older one has more sessions to lose.
        """
        most = max(self._held.values(), key=len, default={})
        return next(reversed(most)) if len(most) > len(self._held.get(cluster, ())) + 1 else None

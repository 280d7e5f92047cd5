"""Bytes that wait towards peers: what streams hold, and what was sent and is not confirmed.

A `Backlog` counts for one session, for all sessions of a user, or for the process; each counts for its parent too. It
holds no byte and stops no stream: who reads for a stream asks whether it is `full` and then reads in small portions,
and only while the stream holds nothing. Invariant: `held` is the sum of what was added and not removed, here and below.
"""

from __future__ import annotations


class Backlog:
    """A count of waiting bytes, with a bound."""

    __slots__ = ("held", "most", "parent")

    def __init__(self, most: int, parent: Backlog | None = None) -> None:
        self.most = most
        """Bytes at which this backlog is full."""
        self.held = 0
        """Bytes that wait."""
        self.parent = parent
        """Whose backlog this one is a part of."""

    def __repr__(self) -> str:
        return f"<Backlog {self.held} of {self.most}>"

    @property
    def full(self) -> bool:
        """Whether as much waits as may: here, or in any backlog of which this one is a part."""
        backlog: Backlog | None = self
        while backlog is not None:
            if backlog.held >= backlog.most:
                return True
            backlog = backlog.parent
        return False

    @property
    def spent(self) -> bool:
        """Whether a backlog of which this one is a part is full."""
        return self.parent is not None and self.parent.full

    def add(self, count: int) -> None:
        """`count` bytes more wait."""
        backlog: Backlog | None = self
        while backlog is not None:
            backlog.held += count
            backlog = backlog.parent

    def remove(self, count: int) -> None:
        """`count` bytes wait no more."""
        self.add(-count)

    def move(self, parent: Backlog | None) -> None:
        """Belong to `parent` from now on, with all that waits."""
        if self.parent is not None:
            self.parent.remove(self.held)
        self.parent = parent
        if parent is not None:
            parent.add(self.held)

"""What a scenario is: one kind of load on one system, some numbers back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from bench.load.generator import Generator
from bench.peers.base import Peer

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long each measurement is, seconds."""

    seconds: float
    warmup: float


class Way(Protocol):
    """A way between client and relay that is longer or narrower than loopback: bench.path.link.Path."""

    @property
    def name(self) -> str: ...

    @property
    def round_trip_ms(self) -> float: ...

    @property
    def mbit_per_s(self) -> float: ...


class Scenario(ABC):
    """One scenario; `measure` is called once per system and round."""

    name: str
    title: str
    """What is done, one line for the report."""
    primary: tuple[str, ...]
    """The metrics that are compared, in the report's order."""

    peers: tuple[str, ...] = ()
    """The systems that are measured; empty: all that are not for one scenario alone."""
    turns: int = 1
    """How often each is measured in a round, one after the other."""
    path: Way | None = None
    """The way between client and relay; None: straight. Systems are started once for all scenarios of one path."""
    seconds: float | None = None
    """Seconds per measurement in a full run, where the run's own are not what it needs."""
    rounds: int | None = None
    """Rounds in a full run, where fewer than the run's own must do."""

    def takes(self, peer: Peer) -> bool:
        """Whether a system is measured."""
        return peer.name in self.peers if self.peers else not peer.special

    def expected_s(self, effort: Effort) -> float:
        """About how long one measurement takes, for the plan."""
        return effort.warmup + effort.seconds

    @abstractmethod
    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        """Measure one system once. Raises bench.load.generator.LoadFailed."""

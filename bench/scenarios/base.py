"""What a scenario is: one kind of load on one system, some numbers back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from bench.load.generator import Generator
from bench.peers.base import Peer

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long each measurement is, seconds."""

    seconds: float
    warmup: float


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

    def takes(self, peer: Peer) -> bool:
        """Whether a system is measured."""
        return peer.name in self.peers if self.peers else not peer.special

    @abstractmethod
    def measure(self, load: Generator, peer: Peer, effort: Effort) -> Metrics:
        """One run. Raises bench.load.generator.LoadFailed."""


def higher_is_better(metric: str) -> bool:
    """Which way a metric goes; told by its unit."""
    return metric.endswith("per_s")

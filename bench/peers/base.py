"""What the runner needs of a system under test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from bench.address import Address
from bench.usage import with_descendants


class Unavailable(Exception):
    """The machine lacks the system; the message says what to install. The report names it as left out."""


Standing = Literal["ours", "peer", "chain", "yardstick"]


def straight(address: Address) -> Address:
    """No detour between client and relay."""
    return address


class Peer(ABC):
    """One system: `load → client → relay → agent → target`, each its own process, all on loopback.

    Life: `check()`, `start()`, `prove_encryption()`, measurements at `endpoint`, `stop()` (also after a failure).
    """

    name: str
    encrypts: str
    """What is encrypted, and who can read: one line for the report."""
    tuned: str
    """How it is configured and why that is its best: one line for the report."""

    standing: Standing = "peer"
    """`peer`: three roles and a relay that multiplexes; what the goals compare with. `chain`: multiplexes nothing.
    `yardstick`: shows what machine and parts can do, and counts as no peer."""

    multiplexes: bool = True
    """Whether client and agent keep one connection each to the relay, whatever the number of streams."""

    special: bool = False
    """Measured only in scenarios that name it."""

    through: Callable[[Address], Address]
    """Given the relay's address, the address that the client dials instead. Set by the runner before `start`, so that a
    scenario can lengthen or shape the way between client and relay; the same for every system."""

    endpoint: Address
    """Where the load generator connects; valid after `start`."""

    def __init__(self) -> None:
        self.through = straight

    def check(self) -> str:
        """The version of what would run. Raises Unavailable."""
        return ""

    @abstractmethod
    def start(self, target: Address, directory: Path) -> None:
        """Start everything, leading to `target`; return when `endpoint` accepts connections.

        `directory` is empty and private. Raises NotReady.
        """

    @abstractmethod
    def stop(self) -> None:
        """End everything that `start` began."""

    @abstractmethod
    def roots(self) -> dict[str, int]:
        """Return the first process of each role: `client`, `relay`, `agent`."""

    def prove_encryption(self, target: Address) -> str:
        """Show that the bytes on the wire cannot be read, and return how that was shown. Raises bench.tap.Readable."""
        return "nothing to show: it encrypts nothing"

    def pids(self, *roles: str) -> list[int]:
        """Return all processes of the named roles, or of all roles; a role may fork as connections come."""
        return [
            pid for role, root in self.roots().items() if not roles or role in roles for pid in with_descendants(root)
        ]

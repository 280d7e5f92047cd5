"""No proxy at all: what the machine and the load generator can do."""

from __future__ import annotations

from pathlib import Path

from bench.address import Address
from bench.peers.base import Peer


class Direct(Peer):
    """The load generator connects to the target itself."""

    name = "direct"
    encrypts = "nothing"
    standing = "yardstick"
    tuned = "TCP_NODELAY at both ends"

    def start(self, target: Address, directory: Path) -> None:
        self.endpoint = self.through(target)

    def stop(self) -> None:
        pass

    def roots(self) -> dict[str, int]:
        return {}

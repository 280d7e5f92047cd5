"""arcbridge itself."""

from __future__ import annotations

from pathlib import Path

from bench.address import Address
from bench.peers.base import Peer, Unavailable


class Arcbridge(Peer):
    name = "arcbridge"
    encrypts = ""
    tuned = ""

    def check(self) -> str:
        raise Unavailable("the roles are not all there yet")

    def start(self, target: Address, directory: Path) -> None: ...

    def stop(self) -> None: ...

    def roots(self) -> dict[str, int]:
        return {}

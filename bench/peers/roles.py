"""A system whose every role is one process, which is what most are."""

from __future__ import annotations

from collections.abc import Callable

from bench.address import Address, free_ports, listens
from bench.peers.base import Peer
from bench.process import Role, stop_all
from bench.tap import Tap, send_canary


class OfRoles(Peer):
    """A peer of which each role is one process. Subclasses append each `Role` that they start to `_roles`."""

    def __init__(self) -> None:
        super().__init__()
        self._roles: list[Role] = []

    def stop(self) -> None:
        stop_all(self._roles)
        self._roles.clear()

    def roots(self) -> dict[str, int]:
        return {role.name: role.pid for role in self._roles}

    def _prove(self, relay: Address, client: Callable[[Address, Address], Role]) -> str:
        """Send the known text with another client, through a recording relay before `relay`; see `prove_encryption`.

        `client(connect, listen)` starts one that is among `_roles`.
        """
        (listen,) = free_ports(1)
        with Tap(relay) as tap:
            role = client(tap.address, listen)
            try:
                role.wait_until(lambda: listens(listen), "listening")
                send_canary(listen)
            finally:
                self._roles.remove(role)
                role.stop()
            return tap.require_unreadable()

"""rathole in clear between two stunnels: a tunnel that multiplexes nothing, encrypted end to end."""

from __future__ import annotations

from pathlib import Path

from bench.address import Address, free_ports
from bench.peers import stunnel
from bench.peers.rathole import Rathole
from bench.process import Role
from bench.tap import Tap, send_canary
from bench.usage import with_descendants

SECOND = "agent-tls"
"""The agent's other process."""


class RatholeStunnel(Rathole):
    """stunnel → rathole's server → rathole's client → stunnel; the last two are the agent."""

    name = "rathole-stunnel"
    encrypts = "end to end, client to agent, TLS 1.2; the relay moves what it cannot read"
    tuned = (
        "rathole with TCP_NODELAY on its own leg, which is all that it can set: towards both stunnels a small write "
        "after another waits 40 ms for a delayed ACK, which TLS 1.2 without resumption avoids while a connection is "
        f"opened; {stunnel.TUNED}"
    )
    tls = False

    def check(self) -> str:
        self._stunnel, version = stunnel.find()
        return f"{super().check()}, {version}"

    def start(self, target: Address, directory: Path) -> None:
        far, self.endpoint = free_ports(2)
        stunnel.write_identity(directory)
        self._directory = directory
        self._run(SECOND, stunnel.server_configuration(far, target, directory, resume=False), far)
        self._service = self._start(far, directory)
        self._client("client", self.endpoint, self.through(self._service))

    def prove_encryption(self, target: Address) -> str:
        """Send the known text with another client, through a recording relay before rathole's server."""
        (listen,) = free_ports(1)
        with Tap(self._service) as tap:
            probe = self._client("probe", listen, tap.address)
            try:
                send_canary(listen)
            finally:
                self._end(probe)
            return tap.require_unreadable()

    def roots(self) -> dict[str, int]:
        return {name: pid for name, pid in super().roots().items() if name != SECOND}

    def pids(self, *roles: str) -> list[int]:
        """The agent is two processes: rathole's client, and the stunnel behind it."""
        found = super().pids(*roles)
        for role in self._roles:
            if role.name == SECOND and (not roles or "agent" in roles):
                found += with_descendants(role.pid)
        return found

    def _client(self, name: str, listen: Address, connect: Address) -> Role:
        return self._run(name, stunnel.client_configuration(listen, connect, self._directory, resume=False), listen)

    def _run(self, name: str, configuration: str, listening: Address) -> Role:
        role = stunnel.start(name, self._stunnel, configuration, listening, self._directory)
        self._roles.append(role)
        return role

"""arcbridge's hot path alone (bench/micro/mux_chain.py); the difference to arcbridge is what the roles add."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bench.address import Address, free_ports, listens
from bench.machine import REPOSITORY
from bench.micro.mux_chain import CLUSTER
from bench.peers.roles import OfRoles
from bench.process import Role


class MuxChain(OfRoles):
    """Three processes: the ends run mux and splice, the middle runs the pump."""

    name = "mux-chain"
    encrypts = "end to end; the relay moves what it cannot read"
    tuned = "arcbridge's wire, mux, pump and splices without join, policy and audit; not a product, a microscope"

    standing = "yardstick"

    def start(self, target: Address, directory: Path) -> None:
        from arcbridge.pki.authority import Authority
        from arcbridge.pki.names import cluster_server_name

        authority = Authority.create("bench")
        issued = authority.issue_server([cluster_server_name(CLUSTER)])
        (directory / "ca.pem").write_text(authority.certificate_pem)
        (directory / "cert.pem").write_text(issued.certificate_pem)
        (directory / "key.pem").write_text(issued.key_pem)
        agents, clients, self.endpoint = free_ports(3)
        self._role("relay", directory, str(agents.port), str(clients.port))
        agent = self._role("agent", directory, str(agents.port), str(target.port), str(directory), wait=False)
        client = self._role("client", directory, str(clients.port), str(self.endpoint.port), str(directory))
        agent.wait_until(lambda: agent.said("READY"), "ready")
        client.wait_until(lambda: listens(self.endpoint), "listening")

    def _role(self, name: str, directory: Path, *arguments: str, wait: bool = True) -> Role:
        profile = os.environ.get("BENCH_PROFILE")  # a directory: each role leaves its cProfile there
        more = ("--profile", f"{profile}/{name}.prof") if profile else ()
        role = Role(
            name,
            [sys.executable, "-m", "bench.micro.mux_chain", name, *arguments, *more],
            directory,
            env={"PYTHONPATH": str(REPOSITORY)},
        )
        self._roles.append(role)
        if wait:
            role.wait_until(lambda: role.said("READY"), "ready")
        return role

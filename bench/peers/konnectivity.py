"""Konnectivity (apiserver-network-proxy) in the same topology: proxy-server is the relay and proxy-agent the agent; a
small client of our own stands for the API server, which would send each CONNECT itself."""

from __future__ import annotations

import signal
from pathlib import Path

from bench.address import Address, free_ports, listens
from bench.peers.go import ENVIRONMENT, GOGC_TOLD, build
from bench.peers.go.certificates import SERVER_NAME, Certificates, issue
from bench.peers.go.ready import carries
from bench.peers.roles import OfRoles
from bench.process import Role, stop_all

MODULE = "sigs.k8s.io/apiserver-network-proxy"
CHANNEL = 150
"""Packets that may wait in each of the relay's and the agent's queues."""


def server_arguments(
    frontend: Address, agents: Address, admin: Address, health: Address, files: Certificates
) -> list[str]:
    """Return the flags of proxy-server: CONNECT at `frontend`, agents at `agents`, both with certificates of our CA."""
    server = (files.server.certificate, files.server.key, files.authority)
    return [
        "--mode=http-connect",
        "--uds-name=",
        *(f"--server-{what}={file}" for what, file in zip(("cert", "key", "ca-cert"), server, strict=True)),
        *(f"--cluster-{what}={file}" for what, file in zip(("cert", "key", "ca-cert"), server, strict=True)),
        f"--server-bind-address={frontend.host}",
        f"--server-port={frontend.port}",
        f"--agent-bind-address={agents.host}",
        f"--agent-port={agents.port}",
        f"--admin-bind-address={admin.host}",
        f"--admin-port={admin.port}",
        f"--health-bind-address={health.host}",
        f"--health-port={health.port}",
        f"--xfr-channel-size={CHANNEL}",
        "--v=0",
    ]


def agent_arguments(agents: Address, admin: Address, health: Address, files: Certificates) -> list[str]:
    """Return the flags of proxy-agent."""
    return [
        f"--ca-cert={files.authority}",
        f"--agent-cert={files.agent.certificate}",
        f"--agent-key={files.agent.key}",
        f"--proxy-server-host={agents.host}",
        f"--proxy-server-port={agents.port}",
        f"--admin-bind-address={admin.host}",
        f"--admin-server-port={admin.port}",
        f"--health-server-host={health.host}",
        f"--health-server-port={health.port}",
        f"--xfr-channel-size={CHANNEL}",
        "--v=0",
    ]


def client_arguments(endpoint: Address, frontend: Address, target: Address, files: Certificates) -> list[str]:
    """Return the flags of our client."""
    return [
        f"-listen={endpoint}",
        f"-proxy={frontend}",
        f"-target={target}",
        f"-cert={files.client.certificate}",
        f"-key={files.client.key}",
        f"-ca={files.authority}",
        f"-server-name={SERVER_NAME}",
    ]


class Konnectivity(OfRoles):
    """Konnectivity: http-connect in front, gRPC behind, mutual TLS on both."""

    name = "konnectivity"
    encrypts = (
        "client to relay (mutual TLS 1.3, one connection for each stream), and relay to agent (mutual TLS 1.3, gRPC); "
        "the relay reads everything"
    )
    tuned = (
        f"--xfr-channel-size={CHANNEL} at relay and agent (10 costs a sixth more CPU downwards, 1000 saves none), "
        f"logs at level 0, {GOGC_TOLD}; our client resumes TLS sessions and writes records together"
    )

    def check(self) -> str:
        self._programs = build.programs("konnectivity", ("server", "agent", "client"), packages=("tool", "./client"))
        return f"apiserver-network-proxy {build.required_version('konnectivity', MODULE)}"

    def start(self, target: Address, directory: Path) -> None:
        self._directory = directory
        self._files = issue(directory)
        self._relay, agents, *others, self.endpoint = free_ports(7)
        relay = self._role("relay", "server", server_arguments(self._relay, agents, others[0], others[1], self._files))
        relay.wait_until(lambda: listens(self._relay) and listens(agents), "listening")
        self._role("agent", "agent", agent_arguments(agents, others[2], others[3], self._files))
        client = self._client("client", self.endpoint, self.through(self._relay), target)
        client.wait_until(lambda: carries(self.endpoint), "carrying")

    def _client(self, name: str, endpoint: Address, relay: Address, target: Address) -> Role:
        return self._role(name, "client", client_arguments(endpoint, relay, target, self._files))

    def _role(self, name: str, program: str, arguments: list[str]) -> Role:
        role = Role(name, [self._programs / program, *arguments], self._directory, env=ENVIRONMENT)
        self._roles.append(role)
        return role

    def prove_encryption(self, target: Address) -> str:
        """Send the known text with another client, through a recording relay before proxy-server."""
        return self._prove(self._relay, lambda relay, listen: self._client("probe", listen, relay, target))

    def stop(self) -> None:
        for role in self._roles:
            if role.name == "agent":
                role.signal(signal.SIGTERM)  # the first one makes it drain, and only the second ends it
        stop_all(self._roles)
        self._roles.clear()

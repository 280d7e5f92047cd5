"""A chain without multiplexing: stunnel, HAProxy in TCP mode, stunnel.

The agent's end listens, which is what an agent behind a firewall cannot do: the chain shows what moving encrypted
bytes over three processes costs in C, not what a tunnel costs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from bench.address import Address, free_ports, listens
from bench.peers import stunnel
from bench.peers.base import Unavailable
from bench.peers.roles import OfRoles
from bench.process import Role

BUFFER = 65536
PIPE = 1 << 20


def haproxy_configuration(listen: Address, to: Address, threads: int) -> str:
    """TCP from `listen` to `to`, moved within the kernel where it can be."""
    return f"""\
global
    nbthread {threads}
    tune.bufsize {BUFFER}
    tune.pipesize {PIPE}
defaults
    mode tcp
    option splice-auto
    no log
    timeout connect 10s
    timeout client 1h
    timeout server 1h
listen relay
    bind {listen} backlog 4096
    server agent {to}
"""


class StunnelHaproxy(OfRoles):
    """stunnel → HAProxy → stunnel: one connection of each leg for each of the load's."""

    name = "stunnel-haproxy"
    standing = "chain"
    multiplexes = False
    encrypts = "end to end, client to agent, TLS 1.2; the relay moves what it cannot read; the agent's end listens"
    tuned = f"HAProxy in TCP mode with splice-auto, one thread per core; {stunnel.TUNED}"

    def check(self) -> str:
        path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
        haproxy = shutil.which("haproxy", path=path)
        if haproxy is None:
            raise Unavailable("needs haproxy and stunnel (Debian, Ubuntu: apt-get install haproxy stunnel4)")
        self._haproxy = haproxy
        self._stunnel, version = stunnel.find()
        said = subprocess.run([haproxy, "-v"], capture_output=True, text=True, check=True, timeout=20).stdout
        return f"HAProxy {said.split()[2]}, {version}"

    def start(self, target: Address, directory: Path) -> None:
        self._directory = directory
        stunnel.write_identity(directory)
        far, self._relay, self.endpoint = free_ports(3)
        self._stunnels("agent", stunnel.server_configuration(far, target, directory), far)
        file = directory / "haproxy.cfg"
        file.write_text(haproxy_configuration(self._relay, far, len(os.sched_getaffinity(0))))
        relay = Role("relay", [self._haproxy, "-db", "-f", file], directory)
        self._roles.append(relay)
        relay.wait_until(lambda: listens(self._relay), "listening")
        self._client("client", self.endpoint, self.through(self._relay))

    def prove_encryption(self, target: Address) -> str:
        """Send the known text with another client, through a recording relay before HAProxy."""
        return self._prove(self._relay, lambda relay, listen: self._client("probe", listen, relay))

    def _client(self, name: str, listen: Address, connect: Address) -> Role:
        return self._stunnels(name, stunnel.client_configuration(listen, connect, self._directory), listen)

    def _stunnels(self, name: str, configuration: str, listening: Address) -> Role:
        role = stunnel.start(name, self._stunnel, configuration, listening, self._directory)
        self._roles.append(role)
        return role

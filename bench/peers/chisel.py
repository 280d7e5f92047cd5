"""chisel in the same topology: `chisel server` is the relay, a client with a reverse remote the agent, a client with a
plain remote the client.

The agent's remote makes the relay listen on its own loopback, and the client's leads there: one SSH session each way.
"""

from __future__ import annotations

import re
import secrets
import subprocess
from collections.abc import Mapping
from pathlib import Path

from bench.address import Address, free_ports, listens
from bench.peers import go
from bench.peers.go import GOGC_TOLD, build
from bench.peers.go.certificates import Certificates, issue
from bench.peers.go.ready import carries
from bench.peers.roles import OfRoles
from bench.process import NotReady, Role

MODULE = "github.com/jpillora/chisel"
BUFFER = 65536
"""Bytes, of a WebSocket's reading and of its writing buffer: above the largest SSH packet, so that one is one write."""

ENVIRONMENT = {**go.ENVIRONMENT, "CHISEL_WS_BUFF_SIZE": str(BUFFER)}
_FINGERPRINT = re.compile(r"Fingerprint (\S{43}=)")


def server_arguments(relay: Address, key: Path, certificates: Certificates | None) -> list[str]:
    """Return the relay's arguments of `chisel`."""
    arguments = ["server", "--host", relay.host, "--port", str(relay.port), "--keyfile", str(key), "--reverse"]
    if certificates is not None:
        files = certificates.server
        arguments += ["--tls-cert", str(files.certificate), "--tls-key", str(files.key)]
    return arguments


def client_arguments(relay: Address, fingerprint: str, remote: str, certificates: Certificates | None) -> list[str]:
    """Return the arguments of `chisel` for client and agent; `fingerprint` is of the relay's SSH key."""
    scheme, tls = "http", []
    if certificates is not None:
        scheme, tls = "https", ["--tls-ca", str(certificates.authority)]
    return ["client", "--fingerprint", fingerprint, *tls, f"{scheme}://{relay}", remote]


class Chisel(OfRoles):
    """chisel as it is: SSH in a WebSocket, the WebSocket in clear."""

    name = "chisel"
    encrypts = (
        "client to relay, and relay to agent, by SSH inside a WebSocket; HTTP around it is in clear; the relay reads "
        "everything"
    )
    tuned = (
        f"AES-128-GCM (what its SSH prefers), WebSocket buffers of {BUFFER // 1024} KiB (a quarter of the "
        f"default's system calls), {GOGC_TOLD}"
    )
    tls = False

    def __init__(self) -> None:
        super().__init__()
        self._certificates: Certificates | None = None

    def check(self) -> str:
        version = build.required_version("chisel", MODULE)
        flags = f"-X {MODULE}/share.BuildVersion={version.removeprefix('v')}"
        self._chisel = build.programs("chisel", ("chisel",), ldflags=flags) / "chisel"
        return f"chisel {version}"

    def start(self, target: Address, directory: Path) -> None:
        self._directory = directory
        self._relay, self._middle, self.endpoint = free_ports(3)
        if self.tls:
            self._certificates = issue(directory)
        self._environment = {**ENVIRONMENT, "AUTH": f"bench:{secrets.token_hex(16)}"}
        self._fingerprint = self._start_relay()
        agent = self._role("agent", self._relay, f"R:{self._middle}:{target}")
        agent.wait_until(lambda: listens(self._middle), "forwarding")
        client = self._role("client", self.through(self._relay), f"{self.endpoint}:{self._middle}")
        client.wait_until(lambda: carries(self.endpoint), "carrying")

    def _start_relay(self) -> str:
        """Start the server with a new key and return the key's fingerprint."""
        key = self._directory / "ssh_key"
        subprocess.run([self._chisel, "server", "--keygen", key], check=True, timeout=20)
        relay = self._run("relay", server_arguments(self._relay, key, self._certificates), self._environment)
        relay.wait_until(lambda: listens(self._relay), "listening")
        found = _FINGERPRINT.search(relay.log.read_text())
        if found is None:
            raise NotReady(f"chisel said no fingerprint of its key\n{relay.tail()}")
        return found[1]

    def _role(self, name: str, relay: Address, remote: str) -> Role:
        return self._run(
            name, client_arguments(relay, self._fingerprint, remote, self._certificates), self._environment
        )

    def _run(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> Role:
        role = Role(name, [self._chisel, *arguments], self._directory, env=environment)
        self._roles.append(role)
        return role

    def prove_encryption(self, target: Address) -> str:
        """A client of its own with a recording relay in front of the relay. A WebSocket masks what its client sends, so
        that it is the way back, which it leaves as it is, that tells."""
        return self._prove(self._relay, lambda relay, listen: self._role("probe", relay, f"{listen}:{self._middle}"))


class ChiselTls(Chisel):
    """chisel over TLS, as its documentation advises where the network is not trusted."""

    name = "chisel-tls"
    encrypts = "client to relay, and relay to agent, twice: SSH inside TLS 1.3; the relay reads everything"
    tls = True

"""frp in the same topology: frps is the relay, a frpc with a secret TCP proxy (stcp) the agent, a frpc with its visitor
the client."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from bench.address import Address, free_ports, listens
from bench.peers.go import ENVIRONMENT, GOGC_TOLD, build, carries
from bench.peers.go.certificates import SERVER_NAME, Certificates, Pair, issue
from bench.peers.roles import OfRoles
from bench.process import Role

MODULE = "github.com/fatedier/frp"
PROXY = "bench"
POOL = 10
"""Work connections that the agent opens ahead: more than `open` wants at once. With mux each is a stream."""


def relay_config(relay: Address, certificates: Certificates, token: str, *, mux: bool = True) -> dict[str, Any]:
    """Return the settings of frps, which takes only TLS from clients with a certificate of our CA."""
    return {
        "bindAddr": relay.host,
        "bindPort": relay.port,
        "auth": {"method": "token", "token": token},
        "log": {"to": "console", "level": "warn", "disablePrintColor": True},
        "transport": {
            "tcpMux": mux,
            "maxPoolCount": POOL,
            "tls": {"force": True, **_tls(certificates, certificates.server)},
        },
    }


def agent_config(
    relay: Address, certificates: Certificates, token: str, secret: str, target: Address, *, mux: bool = True
) -> dict[str, Any]:
    """Return the settings of the frpc that offers `target`."""
    proxy = {
        "name": PROXY,
        "type": "stcp",
        "secretKey": secret,
        "localIP": target.host,
        "localPort": target.port,
        "transport": {"useEncryption": False, "useCompression": False},
    }
    return {**_common(relay, certificates, certificates.agent, token, pool=POOL, mux=mux), "proxies": [proxy]}


def client_config(
    relay: Address, certificates: Certificates, token: str, secret: str, endpoint: Address, *, mux: bool = True
) -> dict[str, Any]:
    """Return the settings of the frpc that leads from `endpoint` to what the agent offers."""
    visitor = {
        "name": f"{PROXY}-visitor",
        "type": "stcp",
        "serverName": PROXY,
        "secretKey": secret,
        "bindAddr": endpoint.host,
        "bindPort": endpoint.port,
        "transport": {"useEncryption": False, "useCompression": False},
    }
    return {**_common(relay, certificates, certificates.client, token, pool=0, mux=mux), "visitors": [visitor]}


def _common(
    relay: Address, certificates: Certificates, own: Pair, token: str, *, pool: int, mux: bool
) -> dict[str, Any]:
    return {
        "serverAddr": relay.host,
        "serverPort": relay.port,
        "auth": {"method": "token", "token": token},
        "log": {"to": "console", "level": "warn", "disablePrintColor": True},
        "transport": {
            "protocol": "tcp",
            "tcpMux": mux,
            "poolCount": pool,
            "tls": {"enable": True, "serverName": SERVER_NAME, **_tls(certificates, own)},
        },
    }


def _tls(certificates: Certificates, own: Pair) -> dict[str, str]:
    return {"certFile": str(own.certificate), "keyFile": str(own.key), "trustedCaFile": str(certificates.authority)}


class Frp(OfRoles):
    """frp: stcp over TLS and tcp mux."""

    name = "frp"
    encrypts = (
        "client to relay, and relay to agent, by mutual TLS 1.3 around everything; the relay reads everything "
        "(stcp's own `useEncryption` ends at the relay as well, and would only encrypt a second time)"
    )
    tuned = (
        f"tcp mux, {POOL} work connections ready at the agent (50 are no faster), no compression, logs at level warn, "
        f"{GOGC_TOLD}; QUIC instead of TLS over TCP costs more than twice the CPU per byte"
    )

    def check(self) -> str:
        self._programs = build.programs("frp", ("frps", "frpc"))
        return f"frp {build.required_version('frp', MODULE)}"

    def start(self, target: Address, directory: Path) -> None:
        self._directory = directory
        self._certificates = issue(directory)
        self._token, self._secret = secrets.token_hex(16), secrets.token_hex(16)
        self._relay, self.endpoint = free_ports(2)
        relay = self._role(
            "relay", "frps", relay_config(self._relay, self._certificates, self._token, mux=self.multiplexes)
        )
        relay.wait_until(lambda: listens(self._relay), "listening")
        shared = (self._certificates, self._token, self._secret)
        self._role("agent", "frpc", agent_config(self._relay, *shared, target, mux=self.multiplexes))
        config = client_config(self.through(self._relay), *shared, self.endpoint, mux=self.multiplexes)
        client = self._role("client", "frpc", config)
        client.wait_until(lambda: carries(self.endpoint), "carrying")

    def _role(self, name: str, program: str, config: dict[str, Any]) -> Role:
        file = self._directory / f"{name}.json"
        file.touch(mode=0o600)
        file.write_text(json.dumps(config, indent=1))
        role = Role(name, [self._programs / program, "-c", file], self._directory, env=ENVIRONMENT)
        self._roles.append(role)
        return role

    def prove_encryption(self, target: Address) -> str:
        """Send the known text with another client, through a recording relay before frps."""
        shared = (self._certificates, self._token, self._secret)

        def client(relay: Address, listen: Address) -> Role:
            return self._role("probe", "frpc", client_config(relay, *shared, listen, mux=self.multiplexes))

        return self._prove(self._relay, client)


class FrpWithoutMux(Frp):
    """frp with a TLS connection of its own per stream on both legs: cheaper per byte, dear to open."""

    name = "frp-no-mux"
    multiplexes = False
    tuned = (
        f"as frp, but `transport.tcpMux = false`: half the CPU per byte, but four times as long to "
        f"open a stream; {POOL} work connections ready at the agent"
    )

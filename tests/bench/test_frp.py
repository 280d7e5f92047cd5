"""How frp, the peer written in Go, is pinned and configured; nothing is built or started here."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.address import Address
from bench.peers.frp import MODULE, Frp, FrpWithoutMux, agent_config, client_config, relay_config
from bench.peers.go import build
from bench.peers.go.certificates import Certificates, Pair

RELAY, TARGET, ENDPOINT, OTHER = (Address("127.0.0.1", port) for port in (1001, 1002, 1003, 1004))
FILES = Certificates(
    Path("/c/ca"), *(Pair(Path(f"/c/{name}"), Path(f"/c/{name}-key")) for name in ("server", "client", "agent"))
)


def test_the_version_is_pinned_with_its_checksum() -> None:
    version = build.required_version("frp", MODULE)
    assert f"{MODULE} {version} h1:" in (build.MODULES / "frp" / "go.sum").read_text()
    with pytest.raises(LookupError, match="frp/go"):
        build.required_version("frp", "github.com/fatedier")


def test_frp_without_mux_is_without_it_everywhere() -> None:
    shared = (FILES, "token", "secret")
    configs = [
        relay_config(RELAY, FILES, "token", mux=False),
        agent_config(RELAY, *shared, TARGET, mux=False),
        client_config(OTHER, *shared, ENDPOINT, mux=False),
    ]
    assert [config["transport"]["tcpMux"] for config in configs] == [False] * 3
    assert (Frp.multiplexes, FrpWithoutMux.multiplexes) == (True, False)


def test_frp_leads_from_the_clients_port_to_the_target() -> None:
    (proxy,) = agent_config(RELAY, FILES, "token", "secret", TARGET)["proxies"]
    client = client_config(OTHER, FILES, "token", "secret", ENDPOINT)
    (visitor,) = client["visitors"]
    assert (proxy["localIP"], proxy["localPort"]) == TARGET
    assert (visitor["bindAddr"], visitor["bindPort"]) == ENDPOINT
    assert (client["serverAddr"], client["serverPort"]) == OTHER
    assert (visitor["serverName"], visitor["secretKey"]) == (proxy["name"], proxy["secretKey"])

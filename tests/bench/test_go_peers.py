"""How the peers written in Go are pinned, built and configured; nothing is built or started here."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from bench.address import Address
from bench.peers import PEERS
from bench.peers.base import Unavailable
from bench.peers.chisel import MODULE as CHISEL
from bench.peers.chisel import Chisel, ChiselTls
from bench.peers.chisel import client_arguments as chisel_client
from bench.peers.chisel import server_arguments as chisel_server
from bench.peers.frp import MODULE as FRP
from bench.peers.frp import Frp, FrpWithoutMux
from bench.peers.frp import agent_config as frp_agent
from bench.peers.frp import client_config as frp_client
from bench.peers.frp import relay_config as frp_relay
from bench.peers.go import build
from bench.peers.go.certificates import SERVER_NAME, Certificates, Pair, issue
from bench.peers.konnectivity import MODULE as KONNECTIVITY
from bench.peers.konnectivity import Konnectivity
from bench.peers.konnectivity import agent_arguments as konnectivity_agent
from bench.peers.konnectivity import client_arguments as konnectivity_client
from bench.peers.konnectivity import server_arguments as konnectivity_server

RELAY, TARGET, ENDPOINT, OTHER = (Address("127.0.0.1", port) for port in (1001, 1002, 1003, 1004))
FILES = Certificates(
    Path("/c/ca"), *(Pair(Path(f"/c/{name}"), Path(f"/c/{name}-key")) for name in ("server", "client", "agent"))
)
FINGERPRINT = "x" * 43 + "="

PINNED = [("chisel", CHISEL, "v1.11.3"), ("frp", FRP, "v0.61.0"), ("konnectivity", KONNECTIVITY, "v0.36.0")]


@pytest.mark.parametrize(("module", "path", "version"), PINNED)
def test_versions_are_pinned_with_their_checksums(module: str, path: str, version: str) -> None:
    assert build.required_version(module, path) == version
    assert f"{path} {version} h1:" in (build.MODULES / module / "go.sum").read_text()


def test_a_version_is_of_the_module_itself() -> None:
    with pytest.raises(LookupError, match="frp/go"):
        build.required_version("frp", "github.com/fatedier")


def test_what_is_built_and_how_is_part_of_the_key() -> None:
    keys = {
        build.key(*one)
        for one in (
            ("chisel", ("tool",), "", "go1.26.0"),
            ("frp", ("tool",), "", "go1.26.0"),
            ("chisel", ("tool", "./client"), "", "go1.26.0"),
            ("chisel", ("tool",), "-s", "go1.26.0"),
            ("chisel", ("tool",), "", "go1.26.1"),
        )
    }
    assert len(keys) == 5
    assert build.key("chisel", ["tool"], "", "go1.26.0") in keys


@pytest.mark.parametrize("peer", [Chisel, ChiselTls, Frp, FrpWithoutMux, Konnectivity])
def test_without_go_it_says_what_to_install(
    peer: type[Chisel | Frp | Konnectivity], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"Go 1\.26 or later"):
        peer().check()


def _go(directory: Path, build: str) -> None:
    """A `go` that says a version, and for `go build` does what the text says; `$out` is where to."""
    program = directory / "go"
    program.write_text(
        "#!/bin/sh\n"
        f'case $1 in env) echo go1.26.0; exit;; list) exit;; esac\necho "$@" >> {directory}/built\n'
        f'while [ "$1" != -o ]; do shift; done; out=$2\n{build}\n'
    )
    program.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a `go`, which comes first, and an empty cache."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_it_is_built_once_and_only_from_what_is_pinned(machine: Path) -> None:
    _go(machine, "mkdir $out; touch $out/frps $out/frpc")
    first = build.programs("frp", ("frps", "frpc"))
    assert first == build.programs("frp", ("frps", "frpc"))
    assert sorted(path.name for path in first.iterdir()) == ["frpc", "frps"]
    (built,) = (machine / "built").read_text().splitlines()
    assert built.startswith("build -v -mod=readonly ")
    assert built.endswith(" tool")


def test_a_build_that_fails_says_why(machine: Path) -> None:
    _go(machine, "echo verifying module: checksum mismatch >&2; exit 1")
    with pytest.raises(Unavailable, match="checksum mismatch"):
        build.programs("frp", ("frps", "frpc"))
    _go(machine, "mkdir $out; touch $out/frps")
    with pytest.raises(Unavailable, match="without frps, frpc"):
        build.programs("frp", ("frps", "frpc"))


def test_certificates_are_checked_by_name(tmp_path: Path) -> None:
    files = issue(tmp_path)
    assert files.server.key.stat().st_mode & 0o077 == 0
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=files.authority)
    server.load_cert_chain(files.server.certificate, files.server.key)
    server.load_verify_locations(files.authority)
    server.verify_mode = ssl.CERT_REQUIRED
    client.load_cert_chain(files.client.certificate, files.client.key)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=SERVER_NAME)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for side in (near, far):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass  # it goes on with the other's answer
    assert far.getpeercert()
    assert near.version() == "TLSv1.3"


def test_chisel_checks_the_relays_key_on_both_legs() -> None:
    server = chisel_server(RELAY, Path("/k"), None)
    assert server == ["server", "--host", "127.0.0.1", "--port", "1001", "--keyfile", "/k", "--reverse"]
    assert chisel_client(RELAY, FINGERPRINT, f"{ENDPOINT}:{OTHER}", None) == [
        *("client", "--fingerprint", FINGERPRINT, "http://127.0.0.1:1001", "127.0.0.1:1003:127.0.0.1:1004")
    ]


def test_chisel_in_tls_trusts_our_ca_alone() -> None:
    server = chisel_server(RELAY, Path("/k"), FILES)
    assert server[-4:] == ["--tls-cert", "/c/server", "--tls-key", "/c/server-key"]
    client = chisel_client(RELAY, FINGERPRINT, f"R:{OTHER}:{TARGET}", FILES)
    assert client[-4:] == ["--tls-ca", "/c/ca", "https://127.0.0.1:1001", "R:127.0.0.1:1004:127.0.0.1:1002"]
    assert "--tls-skip-verify" not in client


def test_frp_encrypts_both_legs_once_and_compresses_nothing() -> None:
    relay = frp_relay(RELAY, FILES, "token")
    assert relay["transport"]["tls"] == {
        "force": True,
        "certFile": "/c/server",
        "keyFile": "/c/server-key",
        "trustedCaFile": "/c/ca",
    }
    agent = frp_agent(RELAY, FILES, "token", "secret", TARGET)
    client = frp_client(OTHER, FILES, "token", "secret", ENDPOINT)
    for config, own in ((agent, "agent"), (client, "client")):
        assert config["transport"]["tls"] == {
            "enable": True,
            "serverName": SERVER_NAME,
            "certFile": f"/c/{own}",
            "keyFile": f"/c/{own}-key",
            "trustedCaFile": "/c/ca",
        }
    for config in (relay, agent, client):
        assert config["transport"]["tcpMux"] is True
        assert config["auth"] == {"method": "token", "token": "token"}
        assert config["log"]["level"] == "warn"
    for one in (*agent["proxies"], *client["visitors"]):
        assert one["type"] == "stcp"
        assert one["transport"] == {"useEncryption": False, "useCompression": False}


def test_frp_without_mux_is_without_it_everywhere() -> None:
    shared = (FILES, "token", "secret")
    configs = [
        frp_relay(RELAY, FILES, "token", mux=False),
        frp_agent(RELAY, *shared, TARGET, mux=False),
        frp_client(OTHER, *shared, ENDPOINT, mux=False),
    ]
    assert [config["transport"]["tcpMux"] for config in configs] == [False] * 3
    assert (Frp.multiplexes, FrpWithoutMux.multiplexes) == (True, False)


def test_frp_leads_from_the_clients_port_to_the_target() -> None:
    (proxy,) = frp_agent(RELAY, FILES, "token", "secret", TARGET)["proxies"]
    client = frp_client(OTHER, FILES, "token", "secret", ENDPOINT)
    (visitor,) = client["visitors"]
    assert (proxy["localIP"], proxy["localPort"]) == TARGET
    assert (visitor["bindAddr"], visitor["bindPort"]) == ENDPOINT
    assert (client["serverAddr"], client["serverPort"]) == OTHER
    assert (visitor["serverName"], visitor["secretKey"]) == (proxy["name"], proxy["secretKey"])


def test_konnectivity_asks_clients_and_agents_for_certificates() -> None:
    server = konnectivity_server(RELAY, OTHER, ENDPOINT, TARGET, FILES)
    for leg in ("server", "cluster"):
        assert f"--{leg}-cert=/c/server" in server
        assert f"--{leg}-key=/c/server-key" in server
        assert f"--{leg}-ca-cert=/c/ca" in server
    assert {"--mode=http-connect", "--uds-name=", "--server-port=1001", "--agent-port=1004"} <= set(server)
    agent = konnectivity_agent(OTHER, ENDPOINT, TARGET, FILES)
    assert {"--ca-cert=/c/ca", "--agent-cert=/c/agent", "--agent-key=/c/agent-key", "--proxy-server-port=1004"} <= set(
        agent
    )
    for arguments in (server, agent):
        assert "--v=0" in arguments
        addresses = [one for one in arguments if "address" in one or "host" in one]
        assert len(addresses) >= 3
        assert all(one.endswith("=127.0.0.1") for one in addresses)


def test_konnectivitys_client_checks_the_name_whatever_it_dials() -> None:
    assert konnectivity_client(ENDPOINT, RELAY, TARGET, FILES) == [
        "-listen=127.0.0.1:1003",
        "-proxy=127.0.0.1:1001",
        "-target=127.0.0.1:1002",
        "-cert=/c/client",
        "-key=/c/client-key",
        "-ca=/c/ca",
        f"-server-name={SERVER_NAME}",
    ]


@pytest.mark.parametrize("peer", [Chisel, ChiselTls, Frp, FrpWithoutMux, Konnectivity])
def test_they_are_peers_that_say_who_can_read(peer: type[Chisel | Frp | Konnectivity]) -> None:
    assert PEERS[peer.name] is peer
    assert peer.standing == "peer"
    assert "the relay reads everything" in peer.encrypts
    assert peer.tuned

"""How frp, the peer written in Go, is pinned, built and configured; nothing is built or started here."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.address import Address
from bench.peers.base import Unavailable
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


def test_what_is_built_and_how_is_part_of_the_key() -> None:
    first = ("frp", ("tool",), "", "go1.26.0")
    others = [("kubernetes", *first[1:]), ("frp", ("tool", "./x"), *first[2:]), (*first[:2], "-s", first[3])]
    keys = {build.key(*one) for one in (first, *others, (*first[:3], "go1.26.1"))}
    assert len(keys) == 5
    assert build.key("frp", ["tool"], "", "go1.26.0") in keys


def test_without_go_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"Go 1\.26 or later"):
        Frp().check()


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

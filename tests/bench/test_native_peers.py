"""How rathole, stunnel and HAProxy are had and configured: nothing is compiled, and nothing started but stand-ins."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import pkcs12

from bench.address import Address
from bench.peers import PEERS, rathole, stunnel, stunnel_haproxy
from bench.peers.base import Unavailable
from bench.peers.rathole_stunnel import RatholeStunnel
from bench.process import Role

RELAY, OPENED, PROBED, TARGET = (Address("127.0.0.1", port) for port in (1001, 1002, 1003, 1004))

CARGO = """#!/bin/sh
echo "$@" >> "$CALLS"
for word; do last=$word; done
mkdir -p "$last/bin" && printf '#!/bin/sh\\n' > "$last/bin/rathole" && chmod +x "$last/bin/rathole"
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is the whole PATH but for the shell, and a cache that is empty."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("mkdir", "chmod"):
        (directory / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return directory


def write_program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def test_rathole_is_compiled_once_and_kept(programs: Path, tmp_path: Path) -> None:
    write_program(programs / "cargo", CARGO)
    program = rathole.find()
    assert Path(program).is_relative_to(tmp_path / "cache" / "arcbridge-bench")
    assert rathole.find() == program
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert f"install rathole --version ={rathole.VERSION}" in call
    assert "server,client,tls" in call


def test_without_cargo_it_says_what_to_install(programs: Path) -> None:
    with pytest.raises(Unavailable, match="apt-get install cargo"):
        rathole.find()


def test_what_does_not_compile_is_told(programs: Path) -> None:
    write_program(programs / "cargo", "#!/bin/sh\necho 'error: no such header' >&2\nexit 101\n")
    with pytest.raises(Unavailable, match="no such header"):
        rathole.find()


def test_a_compiler_that_does_not_end_is_ended(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(programs / "cargo", "#!/bin/sh\nexec /bin/sleep 60\n")
    monkeypatch.setattr(rathole, "COMPILE_TIMEOUT", 0.1)
    with pytest.raises(Unavailable, match="run the benchmark again"):
        rathole.find()


@pytest.mark.parametrize("encrypted", [True, False])
def test_both_ends_of_rathole_fit_together(tmp_path: Path, encrypted: bool) -> None:
    files = tmp_path if encrypted else None
    services = {rathole.SERVICE: OPENED, rathole.PROBE: PROBED}
    server = tomllib.loads(rathole.server_configuration(RELAY, services, "token", files))["server"]
    client = tomllib.loads(rathole.client_configuration(RELAY, rathole.SERVICE, TARGET, "token", files))["client"]
    assert server["bind_addr"] == client["remote_addr"] == str(RELAY)
    assert server["default_token"] == client["default_token"] == "token"
    assert {name: one["bind_addr"] for name, one in server["services"].items()} == {
        "load": str(OPENED),
        "probe": str(PROBED),
    }
    assert client["services"] == {"load": {"local_addr": str(TARGET), "nodelay": True}}
    for end in (server, client):
        assert end["transport"]["type"] == ("tls" if encrypted else "tcp")
        assert ("tls" in end["transport"]) == encrypted
        assert end["transport"]["tcp"]["nodelay"] is True
        assert all(service["nodelay"] is True for service in end["services"].values())


def test_ratholes_identity_is_the_one_that_its_client_trusts(tmp_path: Path) -> None:
    stunnel.write_identity(tmp_path)
    rathole.write_pkcs12(tmp_path)
    file = tmp_path / "identity.p12"
    assert file.stat().st_mode & 0o777 == 0o600
    key, certificate, _ = pkcs12.load_key_and_certificates(file.read_bytes(), rathole.PASSWORD.encode())
    assert key is not None
    assert certificate is not None
    assert key.public_key() == certificate.public_key()
    client = tomllib.loads(rathole.client_configuration(RELAY, "load", TARGET, "token", tmp_path))["client"]
    assert client["transport"]["tls"] == {"trusted_root": f"{tmp_path}/ca.pem", "hostname": stunnel.NAME}
    server = tomllib.loads(rathole.server_configuration(RELAY, {}, "token", tmp_path))["server"]
    assert server["transport"]["tls"] == {"pkcs12": str(file), "pkcs12_password": rathole.PASSWORD}


def options(configuration: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in configuration.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            found.setdefault(name.strip(), []).append(value.strip())
    return found


def test_stunnel_encrypts_on_one_side_and_checks_whom_it_talks_to(tmp_path: Path) -> None:
    client = options(stunnel.client_configuration(OPENED, RELAY, tmp_path))
    server = options(stunnel.server_configuration(RELAY, TARGET, tmp_path))
    assert client["client"] == ["yes"]
    assert "client" not in server
    assert client["checkHost"] == [stunnel.NAME]
    assert client["verifyChain"] == ["yes"]
    assert client["connect"] == server["accept"] == [str(RELAY)]
    for end in (client, server):
        assert end["sslVersion"] == ["TLSv1.2"]
        assert end["ciphers"] == ["ECDHE-ECDSA-AES128-GCM-SHA256"]
        assert end["socket"] == ["l:TCP_NODELAY=1", "r:TCP_NODELAY=1"]
        assert end["foreground"] == ["yes"], "a process that goes to the background cannot be stopped"


def test_haproxy_moves_bytes_and_nothing_else() -> None:
    lines = [line.strip() for line in stunnel_haproxy.haproxy_configuration(RELAY, TARGET, 3).splitlines()]
    assert {"nbthread 3", "mode tcp", f"server agent {TARGET}"} <= set(lines)
    assert any(line.startswith(f"bind {RELAY}") for line in lines)
    assert not any(line.startswith("maxconn") for line in lines), "it takes what the limit of descriptors allows"


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[list[Role]]:
    names = ("agent-tls", "relay", "agent", "client")
    roles = [Role(name, [sys.executable, "-c", "input()"], tmp_path, stdin=-1) for name in names]
    yield roles
    for role in roles:
        role.stop()


def test_what_ratholes_agent_costs_is_what_both_its_processes_cost(sleepers: list[Role]) -> None:
    peer = RatholeStunnel()
    assert peer.pids() == []
    peer._roles = sleepers
    far, relay, agent, client = (role.pid for role in sleepers)
    assert peer.roots() == {"relay": relay, "agent": agent, "client": client}
    assert sorted(peer.pids("agent")) == sorted((agent, far))
    assert peer.pids("client") == [client]
    assert sorted(peer.pids()) == sorted((far, relay, agent, client))
    peer.stop()
    assert peer.pids() == []
    assert not any(os.path.exists(f"/proc/{role.pid}") for role in sleepers)


def test_only_the_chain_is_no_peer() -> None:
    standings = {name: PEERS[name].standing for name in ("rathole-tls", "rathole-stunnel", "stunnel-haproxy")}
    assert standings == {"rathole-tls": "peer", "rathole-stunnel": "peer", "stunnel-haproxy": "chain"}


@pytest.mark.parametrize("name", ["rathole-tls", "rathole-stunnel", "stunnel-haproxy"])
def test_what_is_not_there_is_named(name: str, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(Unavailable, match="needs "):
        PEERS[name]().check()

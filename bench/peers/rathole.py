"""rathole with TLS, as it is meant to be used: the server is the relay, its client the agent, and a user of the
tunnel connects to the port that the server opens for it.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from bench.address import Address, free_ports, listens
from bench.load.build import cache_directory
from bench.peers import stunnel
from bench.peers.base import Peer, Unavailable
from bench.process import Role, stop_all
from bench.tap import Tap, send_canary

VERSION = "0.5.0"
FEATURES = "server,client,tls,noise"
COMPILE_TIMEOUT = 1800
"""Seconds; it takes 70 on two cores that have nothing else to do."""
SERVICE, PROBE = "load", "probe"
PASSWORD = "bench"
"""Of the file with the key, which lies in a directory that is private and lives for one run."""


def install_command(root: Path) -> list[str]:
    """How rathole is had.

    Not `--locked`: the dependencies that its release names do not compile with a Rust of today.
    """
    return [
        *("cargo", "install", "rathole", "--version", f"={VERSION}", "--no-default-features"),
        *("--features", FEATURES, "--root", str(root)),
    ]


def find() -> str:
    """The program; compiled into the cache when it is first wanted, which takes some minutes. Raises Unavailable."""
    root = cache_directory() / f"rathole-{VERSION}"
    program = root / "bin" / "rathole"
    root.parent.mkdir(parents=True, exist_ok=True)
    # Another run may be compiling it now: wait, and take what it made.
    with FileLock(root.parent / f"rathole-{VERSION}.lock"):
        if program.exists():
            return str(program)
        if shutil.which("cargo") is None:
            raise Unavailable(
                "needs cargo, which compiles rathole, OpenSSL's headers and pkg-config "
                "(Debian, Ubuntu: apt-get install cargo libssl-dev pkg-config; or https://rustup.rs)"
            )
        print(f"compiling rathole {VERSION} (once; some minutes)", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                install_command(root), capture_output=True, text=True, check=False, timeout=COMPILE_TIMEOUT
            )
        except subprocess.TimeoutExpired as error:
            raise Unavailable(
                f"rathole was not compiled within {COMPILE_TIMEOUT} s: run the benchmark again"
            ) from error
        if done.returncode or not program.exists():
            raise Unavailable(f"rathole does not compile:\n{done.stderr[-1500:].strip()}")
    return str(program)


def server_configuration(listen: Address, services: dict[str, Address], token: str, directory: Path | None) -> str:
    """Return the relay's file: `services` by name, with their ports. With `directory`: TLS with its files."""
    tls = f'[server.transport.tls]\npkcs12 = "{directory}/identity.p12"\npkcs12_password = "{PASSWORD}"\n'
    return (
        f'[server]\nbind_addr = "{listen}"\ndefault_token = "{token}"\n'
        + _transport("server", tls if directory else "")
        + "".join(
            f'[server.services.{name}]\nbind_addr = "{address}"\nnodelay = true\n' for name, address in services.items()
        )
    )


def client_configuration(relay: Address, service: str, to: Address, token: str, directory: Path | None) -> str:
    """Return the agent's file: one service, which leads to `to`."""
    tls = f'[client.transport.tls]\ntrusted_root = "{directory}/ca.pem"\nhostname = "{stunnel.NAME}"\n'
    return (
        f'[client]\nremote_addr = "{relay}"\ndefault_token = "{token}"\nretry_interval = 1\n'
        + _transport("client", tls if directory else "")
        + f'[client.services.{service}]\nlocal_addr = "{to}"\nnodelay = true\n'
    )


def _transport(end: str, tls: str) -> str:
    kind = "tls" if tls else "tcp"
    return f'[{end}.transport]\ntype = "{kind}"\n[{end}.transport.tcp]\nnodelay = true\n{tls}'


def write_pkcs12(directory: Path) -> None:
    """The certificate and key that stand in `directory` as the one file that rathole reads.

    Without legacy algorithms (RC2, SHA-1), which OpenSSL 3 no longer takes.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, load_pem_private_key, pkcs12

    key = load_pem_private_key((directory / "key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    certificate = x509.load_pem_x509_certificate((directory / "cert.pem").read_bytes())
    file = directory / "identity.p12"
    file.touch(mode=0o600)
    file.write_bytes(
        pkcs12.serialize_key_and_certificates(
            b"bench", key, certificate, None, BestAvailableEncryption(PASSWORD.encode())
        )
    )


class Rathole(Peer):
    """Server and agent of rathole; what is common to both ways of having it encrypted."""

    multiplexes = False
    tls: bool
    """Whether rathole encrypts between its server and its client."""

    def __init__(self) -> None:
        super().__init__()
        self._roles: list[Role] = []

    def check(self) -> str:
        self._program = find()
        return f"rathole {VERSION}"

    def stop(self) -> None:
        stop_all(self._roles)
        self._roles.clear()

    def roots(self) -> dict[str, int]:
        return {role.name: role.pid for role in self._roles}

    def _start(self, to: Address, directory: Path) -> Address:
        """Start relay and agent, leading to `to`, and return the port that the relay opens."""
        self._directory = directory
        self._token = secrets.token_hex(16)
        self._relay, service, self._probe = free_ports(3)
        services = {SERVICE: service, PROBE: self._probe}
        configuration = server_configuration(self._relay, services, self._token, directory if self.tls else None)
        self._rathole("relay", "--server", configuration, self._relay)
        self._agent("agent", self._relay, SERVICE, to, service)
        return service

    def _agent(self, name: str, relay: Address, service: str, to: Address, opened: Address) -> Role:
        """Start an agent that offers a service; return when the server has `opened` its port."""
        files = self._directory if self.tls else None
        return self._rathole(name, "--client", client_configuration(relay, service, to, self._token, files), opened)

    def _rathole(self, name: str, mode: str, configuration: str, listening: Address) -> Role:
        file = self._directory / f"{name}.toml"
        file.write_text(configuration)
        role = Role(name, [self._program, mode, file], self._directory, env={"RUST_LOG": "warn"})
        self._roles.append(role)
        role.wait_until(lambda: listens(listening), "listening")
        return role

    def _end(self, role: Role) -> None:
        self._roles.remove(role)
        role.stop()


class RatholeTls(Rathole):
    """Two processes; the load generator itself is the client."""

    name = "rathole-tls"
    encrypts = "relay to agent only; the client leg is in clear, and one process fewer than in the others"
    tuned = (
        "TCP_NODELAY; a P-256 certificate and X25519, the cheapest to open a connection with. Its TLS library prefers "
        "TLS 1.2 with ChaCha20, and no setting of rathole changes that: AES-128-GCM came only when OpenSSL was told to "
        "use no curve, which made opening six times slower for about a tenth less CPU per byte"
    )
    tls = True

    def start(self, target: Address, directory: Path) -> None:
        stunnel.write_identity(directory)
        write_pkcs12(directory)
        self.endpoint = self.through(self._start(target, directory))

    def prove_encryption(self, target: Address) -> str:
        """Send the known text to a second agent's service, with a recording relay between that agent and the server."""
        with Tap(self._relay) as tap:
            probe = self._agent("probe", tap.address, PROBE, target, self._probe)
            try:
                send_canary(self._probe)
            finally:
                self._end(probe)
            return f"relay to agent: {tap.require_unreadable()}; client to relay is in clear"

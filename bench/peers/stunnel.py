"""stunnel at both ends of a chain: what encrypts where the middle does not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from bench.address import Address, listens
from bench.peers.base import Unavailable
from bench.process import NotReady, Role

NAME = "bench.invalid"
"""The name in the server's certificate, which the client checks."""

TUNED = (
    "stunnel with AES-128-GCM, X25519 and a P-256 certificate, TCP_NODELAY, no log, malloc's thresholds raised (its "
    "own choice maps and unmaps memory for each message), and TLS 1.2, which opened a connection in less time and CPU "
    "than 1.3"
)

ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 27)}
"""stunnel asks malloc to map whatever is above 4 KiB, and OpenSSL to give its buffers back whenever they are empty:
two system calls that stop all its threads for each message. It cannot be configured otherwise; malloc can."""

_BOTH = """\
foreground = yes
pid =
syslog = no
debug = err
[load]
sslVersion = TLSv1.2
ciphers = ECDHE-ECDSA-AES128-GCM-SHA256
curves = X25519:P-256
libwrap = no
renegotiation = no
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
"""


def find() -> tuple[str, str]:
    """Return the program and its version. Raises Unavailable."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
    program = shutil.which("stunnel4", path=path) or shutil.which("stunnel", path=path)
    if program is None:
        raise Unavailable("needs stunnel (Debian, Ubuntu: apt-get install stunnel4)")
    said = subprocess.run([program, "-version"], capture_output=True, text=True, check=False, timeout=20)
    lines = (said.stderr + said.stdout).splitlines()
    return program, " ".join(next((line for line in lines if line.startswith("stunnel ")), "stunnel").split()[:2])


def write_identity(directory: Path) -> None:
    """An authority and a server's certificate and key (P-256): ca.pem, cert.pem, key.pem."""
    from arcbridge.pki.authority import Authority

    authority = Authority.create("bench")
    issued = authority.issue_server([NAME])
    (directory / "ca.pem").write_text(authority.certificate_pem)
    (directory / "cert.pem").write_text(issued.certificate_pem)
    key = directory / "key.pem"
    key.touch(mode=0o600)
    key.write_text(issued.key_pem)


def client_configuration(listen: Address, connect: Address, directory: Path, *, resume: bool = True) -> str:
    """Clear text from `listen`, TLS to `connect`; only the certificate of this run is taken.

    With `resume` a new connection takes over the keys of one before it.
    """
    return (
        _BOTH + f"sessionResume = {'yes' if resume else 'no'}\n"
        f"client = yes\naccept = {listen}\nconnect = {connect}\n"
        f"CAfile = {directory}/ca.pem\nverifyChain = yes\ncheckHost = {NAME}\n"
    )


def server_configuration(listen: Address, connect: Address, directory: Path, *, resume: bool = True) -> str:
    """TLS from `listen`, clear text to `connect`."""
    return (
        _BOTH + f"sessionResume = {'yes' if resume else 'no'}\n"
        f"accept = {listen}\nconnect = {connect}\ncert = {directory}/cert.pem\nkey = {directory}/key.pem\n"
    )


def start(name: str, program: str, configuration: str, listening: Address, directory: Path) -> Role:
    """Start a stunnel and return it once it listens."""
    file = directory / f"{name}.conf"
    file.write_text(configuration)
    role = Role(name, [program, file], directory, env=ENVIRONMENT)
    try:
        role.wait_until(lambda: listens(listening), "listening")
    except NotReady:
        role.stop()
        raise
    return role

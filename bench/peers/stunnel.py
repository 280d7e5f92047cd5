"""stunnel at both ends of a chain: what encrypts where the middle does not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from bench.address import Address
from bench.peers.base import Unavailable

NAME = "bench.invalid"
"""The name in the server's certificate, which the client checks."""

TUNED = "stunnel with TLS 1.3, AES-128-GCM, X25519 and a P-256 certificate, TCP_NODELAY, no log"

_BOTH = """\
foreground = yes
pid =
syslog = no
debug = err
[load]
sslVersion = TLSv1.3
ciphersuites = TLS_AES_128_GCM_SHA256
curves = X25519
libwrap = no
renegotiation = no
socket = l:TCP_NODELAY=1
socket = r:TCP_NODELAY=1
"""


def find() -> tuple[str, str]:
    """The program and its version. Raises Unavailable."""
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


def client_configuration(listen: Address, connect: Address, directory: Path) -> str:
    """Clear text from `listen`, TLS to `connect`; only the certificate of this run is taken."""
    return (
        _BOTH + f"client = yes\naccept = {listen}\nconnect = {connect}\n"
        f"CAfile = {directory}/ca.pem\nverifyChain = yes\ncheckHost = {NAME}\n"
    )


def server_configuration(listen: Address, connect: Address, directory: Path) -> str:
    """TLS from `listen`, clear text to `connect`."""
    return _BOTH + f"accept = {listen}\nconnect = {connect}\ncert = {directory}/cert.pem\nkey = {directory}/key.pem\n"

"""Certificates for peers that speak TLS: one CA, a server on loopback, a client and an agent; ECDSA P-256 all of them,
the cheapest for a handshake."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme

SERVER_NAME = "relay.bench.invalid"
"""What clients check, whichever address they dial."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The files of a certificate and its key, PEM."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files, all PEM."""

    authority: Path
    server: Pair
    client: Pair
    agent: Pair


def issue(directory: Path) -> Certificates:
    """Issue them into `directory`, which must be private."""
    ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
    authority = directory / "ca.pem"
    ca.cert_pem.write_to_path(authority)

    def pair(name: str, *identities: str) -> Pair:
        issued = ca.issue_cert(*identities, common_name=name, key_type=trustme.KeyType.ECDSA)
        files = Pair(directory / f"{name}.pem", directory / f"{name}-key.pem")
        files.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(files.key)
        files.key.chmod(0o600)
        return files

    return Certificates(
        authority,
        pair("server", SERVER_NAME, "localhost", "127.0.0.1"),
        pair("client", "client.bench.invalid"),
        pair("agent", "agent.bench.invalid"),
    )

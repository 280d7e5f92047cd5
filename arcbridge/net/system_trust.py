"""Contexts that trust the CAs of the system: those of a file that SSL_CERT_FILE names, else what the system keeps.

With the extra `truststore` the system itself judges certificates, as browsers let it on Windows and macOS, where
OpenSSL knows no store; on Linux it makes no difference. A single-file client brings its OpenSSL along, which looks
where the machine that built it keeps its CAs, so that other places are tried, too.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

from arcbridge.errors import ConfigError, StateError

BUNDLES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Arch, Alpine
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL 6 and newer
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # CentOS, RHEL 7 and newer
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine, BSD, macOS
)
"""Where systems keep their CAs in one file, as Go's crypto/x509 looks for them."""


def system_context() -> ssl.SSLContext:
    """Return a client's context that verifies names and certificates by the system's CAs."""
    try:
        import truststore
    except ImportError:
        pass
    else:
        return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    paths = ssl.get_default_verify_paths()
    if not (paths.cafile or paths.capath or context.cert_store_stats()["x509_ca"]):
        for bundle in BUNDLES:
            if Path(bundle).is_file():
                context.load_verify_locations(bundle)
                break
    return context


def trusting_context(ca_pem: str | None = None) -> ssl.SSLContext:
    """Return a client's context that trusts the CA `ca_pem`, or without one the system's CAs."""
    if not ca_pem:
        return system_context()
    context = ssl.create_default_context(cadata=ca_pem)
    take_plain_cas(context)
    return context


def take_plain_cas(context: ssl.SSLContext) -> None:
    """Take CAs without identifiers of keys, as Go and curl do: Amazon EKS makes such a CA for each cluster, and Python
    3.13 and later refuse it by default, as "Missing Authority Key Identifier"."""
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT


def read_cas(path: Path, setting: str) -> str:
    """Return the CAs in a PEM file that `setting` names; comments may be in UTF-8, and are cut to their ASCII.

    Raises ConfigError for a file without any CA, StateError.
    """
    try:
        pem = path.read_text("ascii", "ignore")
        trusting_context(pem or "none")
    except ssl.SSLError as error:
        raise ConfigError(f"{setting}: {path} holds no PEM certificate") from error
    except OSError as error:
        raise StateError(f"{setting}: cannot read {path}: {error.strerror}") from error
    return pem

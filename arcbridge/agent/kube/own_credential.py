"""Reads the files with which the agent comes to the API server: the CA that it trusts there, and its own credential.

The credential is a ServiceAccount's token, a client certificate with its key, or a credential bundle: key and chain in
one file, as the kubelet writes them for a `podCertificate` volume and renews them. It decides nothing about when files
are read. Invariants: a bundle is opened once in a reading, so that one which is replaced meanwhile is wholly the old
one or the new one (of other files that are, a reading may have both, and the next one mends it); with a bundle there is
no token; no error quotes what a file holds.

Source: Kubernetes, PodCertificateProjection (core/v1), `credentialBundlePath`.
"""

from __future__ import annotations

import base64
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from arcbridge.errors import ConfigError, StateError
from arcbridge.net.system_trust import take_plain_cas
from arcbridge.pki.authority import certificate_validity
from arcbridge.pki.chain import load_chain
from arcbridge.untrusted_json import read_json

MAX_BUNDLE: Final = 1 << 20
"""Bytes of a bundle that are read; an API server takes chains of 64 KiB at most."""
MAX_CLAIMS: Final = 64 * 1024
"""Bytes of a token's claims that are read for its files."""

TOKEN: Final = "a ServiceAccount token"
CERTIFICATE: Final = "a client certificate"
POD_CERTIFICATE: Final = "a pod certificate"


@dataclass(frozen=True, slots=True)
class CredentialFiles:
    """The files that are configured."""

    ca_file: Path | None
    token_file: Path | None
    certificate_file: Path | None
    key_file: Path | None
    bundle_file: Path | None
    """Key and chain of the pod in one file; with it there is no other credential."""


@dataclass(frozen=True, slots=True)
class OwnCredential:
    """What one reading of the files gave."""

    own: ssl.SSLContext
    """TLS of connections on which the agent is itself."""
    bare: ssl.SSLContext
    """TLS of connections that carry a caller's token, without a certificate of the agent's."""
    authorization: str
    """The agent's Authorization value; empty where a certificate says who it is."""
    kind: str
    """TOKEN, CERTIFICATE or POD_CERTIFICATE: what self-checks call it."""
    validity: tuple[float, float] | None
    """From when until when it is valid, in seconds of the epoch; None where its form does not say."""


def stamps(files: CredentialFiles) -> list[tuple[int, int, int]]:
    """Return what tells one state of the files from another. Raises ConfigError."""
    found = []
    for path in (files.ca_file, files.token_file, files.certificate_file, files.key_file, files.bundle_file):
        if path is not None:
            try:
                stat = os.stat(path)
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
            found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return found


def read_credential(files: CredentialFiles) -> OwnCredential:
    """Read all files. Raises ConfigError that names the setting."""
    try:
        own = ssl.create_default_context(cafile=files.ca_file)
        bare = ssl.create_default_context(cafile=files.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"kubernetes.ca_file: {files.ca_file} is not a CA certificate") from error
    for context in (own, bare):
        take_plain_cas(context)
    if files.bundle_file is not None:
        return OwnCredential(own, bare, "", POD_CERTIFICATE, _load_bundle(own, files.bundle_file))
    token = "" if files.token_file is None else _read_token(files.token_file)
    kind = CERTIFICATE
    validity: tuple[float, float] | None = None
    if files.certificate_file is not None and files.key_file is not None:
        try:
            own.load_cert_chain(files.certificate_file, files.key_file)
            validity = _certificate_validity(files.certificate_file.read_text("ascii", "ignore"))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError("kubernetes.client_certificate_file and client_key_file do not fit") from error
    if token and validity is None:
        kind, validity = TOKEN, _token_validity(token)
    return OwnCredential(own, bare, f"Bearer {token}" if token else "", kind, validity)


def _load_bundle(context: ssl.SSLContext, path: Path) -> tuple[float, float] | None:
    setting = f"kubernetes.credential_bundle_file: {path}"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BUNDLE + 1)
    except OSError as error:
        raise ConfigError(f"{setting} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BUNDLE:
        raise ConfigError(f"{setting} has more than {MAX_BUNDLE} bytes")
    text = data.decode("ascii", "ignore")
    try:
        load_chain(context, text, "")
    except ConfigError as error:
        raise ConfigError(f"{setting} holds no private key with its certificates: {error.message}") from error
    return _certificate_validity(text)


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"kubernetes.token_file: {path} cannot be read") from error
    if not token or any(c.isspace() for c in token):
        raise ConfigError(f"kubernetes.token_file: {path} holds no token")
    return token


def _certificate_validity(pem: str) -> tuple[float, float] | None:
    try:
        return certificate_validity(pem)
    except StateError:
        return None  # a form that OpenSSL takes and `cryptography` does not read


def _token_validity(token: str) -> tuple[float, float] | None:
    """Return `iat` and `exp` of the agent's own token, which the API server verifies; None for one that is no JWT."""
    try:
        claims = token.split(".")[1]
        found = read_json(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)), MAX_CLAIMS)
        return float(found["iat"]), float(found["exp"])
    except (IndexError, KeyError, TypeError, ValueError):
        return None

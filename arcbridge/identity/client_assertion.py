"""Makes the form by which an application authenticates at a token endpoint: a signed assertion, a secret, or a token of
another issuer (RFC 7523 §2.2, RFC 6749 §2.3.1).

It makes the fields of a form and sends nothing. Files are read for each form, because other programs renew what they
hold. An assertion that is made here is for one endpoint and one minute. With a certificate its header has `x5t#S256`
(RFC 7515 §4.1.8) and the algorithm is PS256, which is what Entra ID wants; otherwise `kid`, where one is given, and
RS256. Invariant: a secret, a key or an assertion is in no error.
"""

from __future__ import annotations

import base64
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcbridge.errors import ConfigError, StateError, Unauthenticated

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_LIFE = 60.0
"""Seconds from `iat` to `exp` of an assertion that is made here: Keycloak and others refuse more."""
FILE_LIMIT = 64 * 1024
"""Bytes of a file with a secret, a key, a certificate or a token."""

_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


def asserted(client_id: str, assertion: str) -> dict[str, str]:
    """Return the fields of a form by which `client_id` proves itself with an assertion."""
    return {"client_id": client_id, "client_assertion_type": ASSERTION_TYPE, "client_assertion": assertion}


def sign_assertion(
    client_id: str,
    audience: str,
    now: float,
    *,
    key: tuple[Path, str],
    certificate: tuple[Path, str] | None = None,
    key_id: str = "",
) -> str:
    """Sign an assertion for `audience`, an endpoint or an issuer. `key` and `certificate`: a PEM file, and the setting
    that names it; `now`: unix seconds. Raises ConfigError, StateError, Unauthenticated."""
    import jwt

    private, algorithm = _private_key(*key)
    headers = {"kid": key_id} if key_id else {}
    issued = int(now)
    if certificate is not None:
        headers["x5t#S256"] = _thumbprint(*certificate, private, key[1])
        algorithm = "PS256" if algorithm == "RS256" else algorithm
    claims = {
        "iss": client_id,
        "sub": client_id,
        "aud": audience,
        "jti": secrets.token_urlsafe(16),
        "iat": issued,
        "exp": issued + int(ASSERTION_LIFE),
    }
    return jwt.encode(claims, private, algorithm, headers or None)


def read_word(path: Path, setting: str) -> str:
    """Return the one line of text in a file. Raises Unauthenticated, StateError."""
    return one_word(_read(path, setting), f"{setting}: {path}")


def one_word(data: bytes, source: str) -> str:
    """Return the one line of text in `data`, without the line's end. Raises Unauthenticated."""
    try:
        text = data.decode().strip("\r\n")
    except UnicodeDecodeError:
        text = ""
    if not text or "\n" in text or "\r" in text or "\0" in text:
        raise Unauthenticated(f"{source} does not give one line of text")
    return text


def _private_key(path: Path, setting: str) -> tuple[Any, str]:
    """Read the key in a PEM file and the algorithm that fits it."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path, setting)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        # Not chained: the cause could quote the key.
        raise ConfigError(f"{setting}: {path} holds no private key in PEM without a password") from None
    except UnsupportedAlgorithm:
        key = None
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        return key, "RS256"
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        return key, _CURVES[key.curve.name]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key, "EdDSA"
    raise ConfigError(
        f"{setting}: the key in {path} cannot sign for an issuer; it has to be RSA of 2048 bits or more, "
        "P-256, P-384, P-521 or Ed25519"
    )


def _thumbprint(path: Path, setting: str, private: Any, key_setting: str) -> str:
    """`x5t#S256` of the certificate in a PEM file, which must be that of the key."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.x509 import load_pem_x509_certificate

    try:
        certificate: Certificate = load_pem_x509_certificate(_read(path, setting))
    except ValueError:
        raise ConfigError(f"{setting}: {path} holds no certificate in PEM") from None
    if certificate.public_key() != private.public_key():
        raise ConfigError(f"{setting}: the certificate in {path} belongs to another key than that of {key_setting}")
    return base64.urlsafe_b64encode(certificate.fingerprint(SHA256())).rstrip(b"=").decode()


def _read(path: Path, setting: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT + 1)
    except FileNotFoundError as error:
        raise Unauthenticated(f"{setting}: {path} does not exist") from error
    except OSError as error:
        raise StateError(f"{setting}: cannot read {path}: {error.strerror}") from error
    if len(data) > FILE_LIMIT:
        raise StateError(f"{setting}: {path} holds more than {FILE_LIMIT // 1024} KiB")
    return data

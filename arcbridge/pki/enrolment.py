"""Makes and reads the messages of an enrolment between agent and relay: keys, certificate requests, join tokens.

Of a certificate request (PKCS #10, RFC 2986) the relay takes the public key and nothing else: subject, SANs and
wanted extensions are never read (docs/threats.md#E4). The request's own signature proves that the sender holds the key.

A join token is `<id>.<secret>`: the id (64 bits, hex) is a name that may be shown and logged; the secret is 256
random bits. The relay keeps only the SHA-256 of the secret; for a random secret of that size a slow password hash
would add nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import NamedTuple, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from arcbridge.errors import EnrolmentRefused, StateError

CSR_LIMIT = 16 * 1024
"""Bytes. A request over an RSA key of 8192 bits takes 3 KiB; more is no request but an attempt."""

AgentPublicKey: TypeAlias = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

_TOKEN = re.compile(r"([0-9a-f]{16})\.([A-Za-z0-9_-]{43})", re.ASCII)


def make_key() -> str:
    """Return a new private key, P-256, PKCS #8 PEM without a passphrase."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def make_csr(key_pem: str) -> str:
    """Make a certificate request over `key_pem` (PEM), with an empty subject; raises `StateError` for an unusable
    key."""
    try:
        key = load_pem_private_key(key_pem.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StateError(
            "the agent's private key is not readable: remove it and enrol with a new join token"
        ) from error
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise StateError("the agent's private key is neither RSA, ECDSA nor Ed25519: remove it and enrol again")
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, algorithm)
    return request.public_bytes(Encoding.PEM).decode()


def read_csr(csr_pem: str) -> AgentPublicKey:
    """Return the public key that a certificate request proves possession of; raises `EnrolmentRefused`.

    Accepted: RSA of 2048 to 8192 bits with an exponent from 65537 to 2^32 - 1, ECDSA on P-256 or P-384, Ed25519.
    """
    # Characters are at least as few as bytes, so this bounds both before anything is parsed.
    if len(csr_pem) > CSR_LIMIT or len(encoded := csr_pem.encode("utf-8", "replace")) > CSR_LIMIT:
        raise EnrolmentRefused(f"the certificate request is larger than {CSR_LIMIT // 1024} KiB")
    try:
        request = x509.load_pem_x509_csr(encoded)
        key = request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise EnrolmentRefused("the certificate request is not a readable PKCS #10 PEM") from error
    # The key is judged before its signature is: verifying under a hostile key of any size costs us time.
    if isinstance(key, rsa.RSAPublicKey):
        # An exponent as long as the key makes a stranger's request cost 60 times as much (docs/threats.md#J24).
        if not 2048 <= key.key_size <= 8192 or not 65537 <= key.public_numbers().e < 1 << 32:
            raise EnrolmentRefused(
                "the RSA key of the certificate request is unfit: use 2048 to 8192 bits and 65537 as exponent, or P-256"
            )
    elif isinstance(key, ec.EllipticCurvePublicKey):
        if not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
            raise EnrolmentRefused("the curve of the certificate request's key is not supported: use P-256 or P-384")
    elif not isinstance(key, ed25519.Ed25519PublicKey):
        raise EnrolmentRefused("the certificate request's key is not supported: use P-256, P-384, Ed25519 or RSA")
    try:
        valid = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise EnrolmentRefused("the certificate request is signed with an algorithm that is not accepted") from error
    if not valid:
        raise EnrolmentRefused("the signature of the certificate request does not match its key")
    return key


def key_hash(csr_pem: str) -> str:
    """Return the SHA-256 (hex) of the request's public key in DER: a second try comes from the same key or it does not
    (docs/threats.md#E2)."""
    spki = read_csr(csr_pem).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def request_hash(csr_pem: str) -> str:
    """Return the SHA-256 (hex) of a request's text: whether the same request comes again. It is not checked here."""
    return hashlib.sha256(csr_pem.strip().encode()).hexdigest()


class JoinToken(NamedTuple):
    """A join token: `text` (`id.secret`) goes to the agent, `id` and `secret_hash` (hex) are what the relay keeps."""

    text: str
    id: str
    secret_hash: str

    @classmethod
    def create(cls) -> JoinToken:
        """Return a new token with a fresh id and secret."""
        return cls.parse(f"{secrets.token_hex(8)}.{secrets.token_urlsafe(32)}")

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Read `id.secret`, surrounding white space aside; raises `EnrolmentRefused`, which quotes nothing of it."""
        match = _TOKEN.fullmatch(text.strip()) if len(text) <= 256 else None
        if match is None:
            raise EnrolmentRefused(
                "not a join token: it has the form id.secret, as 'arcbridge --role relay token create' prints it"
            )
        return cls(match.group(), match.group(1), hashlib.sha256(match.group(2).encode()).hexdigest())

    def matches(self, secret_hash: str) -> bool:
        """Return whether this token's secret has that hash (hex), in constant time."""
        return hmac.compare_digest(self.secret_hash.encode(), secret_hash.encode())

    def __repr__(self) -> str:
        # The generated one would put the secret into every log and traceback.
        return f"JoinToken(id={self.id!r})"

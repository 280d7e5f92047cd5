"""Encrypts a file's key to a recipient and decrypts it with the identity that belongs to it: X25519, and ML-KEM-768
with X25519.

Both are age's own (https://c2sp.org/age). A stanza names no recipient, so an identity tries each of its kind. The
second one withstands a quantum computer as long as the file has no recipient of the first kind beside it. Invariant: an
identity returns None for what is not for it, and raises `SealingError` for what no version of age has written.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from arcbridge.errors import SealingError
from arcbridge.sealing.header import Stanza, encoded

FILE_KEY: Final = 16
"""Bytes of a file's key."""
POINT: Final = 32
"""Bytes of a point, and of a secret, of X25519."""
_WRAPPED: Final = FILE_KEY + 16
"""Bytes of a file's key that ChaCha20-Poly1305 has encrypted."""
_X25519: Final = b"X25519"
_X25519_LABEL: Final = b"age-encryption.org/v1/X25519"
_HYBRID: Final = b"mlkem768x25519"
_HYBRID_LABEL: Final = b"age-encryption.org/mlkem768x25519"
_ENCAPSULATED: Final = 1120
"""Bytes of an encapsulated key: 1 088 of ML-KEM-768 and a point."""
_MLKEM_PUBLIC: Final = 1184


class Recipient(ABC):
    """A public key that files are sealed to."""

    @abstractmethod
    def wrap(self, file_key: bytes) -> Stanza:
        """Return the stanza from which this recipient reads a file's key. Raises `SealingError` for a weak key."""


class AgeIdentity(ABC):
    """A private key that opens what was sealed to its recipient; age's word for it is identity."""

    @abstractmethod
    def unwrap(self, stanza: Stanza) -> bytes | None:
        """Return the file's key, or None where the stanza is not for this identity. Raises `SealingError` where it is
        malformed."""


def derived(key: bytes, salt: bytes, info: bytes) -> bytes:
    """Return 32 bytes of HKDF-SHA-256 (RFC 5869)."""
    return HKDF(SHA256(), 32, salt, info).derive(key)


def agreed(secret: X25519PrivateKey, point: bytes) -> bytes:
    """Return the secret that both ends share (RFC 7748 §6.1). Raises `SealingError` for a point of low order, with
    which it would be zero, and for what has another length."""
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(point))
    except ValueError as error:
        raise SealingError("a public key of this file or of a recipient is none that X25519 allows") from error


def encrypted_key(secret: bytes, share: bytes, public: bytes, info: bytes, file_key: bytes) -> bytes:
    """Return a file's key, encrypted by what an ephemeral key (of which `share` is public) and a recipient share."""
    return ChaCha20Poly1305(derived(secret, share + public, info)).encrypt(bytes(12), file_key, None)


def decrypted_key(secret: bytes, share: bytes, public: bytes, info: bytes, body: bytes) -> bytes | None:
    """Return a file's key from a stanza's body; None where another secret has encrypted it. Raises `SealingError` for
    a body of another size: one could be made that several keys open."""
    if len(body) != _WRAPPED:
        raise SealingError("a stanza of this file holds no key of a file: it is damaged")
    try:
        return ChaCha20Poly1305(derived(secret, share + public, info)).decrypt(bytes(12), body, None)
    except InvalidTag:
        return None


class X25519Recipient(Recipient):
    """`age1…`."""

    def __init__(self, data: bytes) -> None:
        """Raises `ValueError` for another length than that of a point."""
        X25519PublicKey.from_public_bytes(data)
        self._public = data

    def wrap(self, file_key: bytes) -> Stanza:
        ephemeral = X25519PrivateKey.generate()
        share = ephemeral.public_key().public_bytes_raw()
        body = encrypted_key(agreed(ephemeral, self._public), share, self._public, _X25519_LABEL, file_key)
        return Stanza(_X25519, (encoded(share),), body)


class X25519Identity(AgeIdentity):
    """`AGE-SECRET-KEY-1…`."""

    def __init__(self, data: bytes) -> None:
        """Raises `ValueError` for another length than that of a secret."""
        self._secret = X25519PrivateKey.from_private_bytes(data)
        self._public = self._secret.public_key().public_bytes_raw()

    def unwrap(self, stanza: Stanza) -> bytes | None:
        if stanza.kind != _X25519:
            return None
        share = stanza.argument_bytes(0, 1, POINT)
        return decrypted_key(agreed(self._secret, share), share, self._public, _X25519_LABEL, stanza.body)


def _suite() -> Suite:
    """Return that of `mlkem768x25519`: HPKE (RFC 9180) with MLKEM768-X25519 of draft-ietf-hpke-pq."""
    return Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


class HybridRecipient(Recipient):
    """`age1pq1…`."""

    def __init__(self, data: bytes) -> None:
        """Raises `ValueError` for what is no key, and `UnsupportedAlgorithm` where OpenSSL has no ML-KEM."""
        mlkem = MLKEM768PublicKey.from_public_bytes(data[:_MLKEM_PUBLIC])
        self._public = MLKEM768X25519PublicKey(mlkem, X25519PublicKey.from_public_bytes(data[_MLKEM_PUBLIC:]))

    def wrap(self, file_key: bytes) -> Stanza:
        try:
            sealed = _suite().encrypt(file_key, self._public, _HYBRID_LABEL)
        except ValueError as error:
            raise SealingError("the X25519 half of a post-quantum recipient is no key: make a new one") from error
        return Stanza(_HYBRID, (encoded(sealed[:_ENCAPSULATED]),), sealed[_ENCAPSULATED:])


class HybridIdentity(AgeIdentity):
    """`AGE-SECRET-KEY-PQ-1…`."""

    def __init__(self, seed: bytes) -> None:
        """Raises `ValueError` for another length than that of a seed, and `UnsupportedAlgorithm` where OpenSSL has no
        ML-KEM. Both keys are derived from the seed as draft-ietf-hpke-pq says."""
        if len(seed) != POINT:
            raise ValueError("it has another length than a key")
        expanded = hashlib.shake_256(seed).digest(64 + POINT)
        mlkem = MLKEM768PrivateKey.from_seed_bytes(expanded[:64])
        self._x25519 = X25519PrivateKey.from_private_bytes(expanded[64:])
        self._secret = MLKEM768X25519PrivateKey(mlkem, self._x25519)

    def unwrap(self, stanza: Stanza) -> bytes | None:
        if stanza.kind != _HYBRID:
            return None
        encapsulated = stanza.argument_bytes(0, 1, _ENCAPSULATED)
        if len(stanza.body) != _WRAPPED:
            raise SealingError("a stanza of this file holds no key of a file: it is damaged")
        agreed(self._x25519, encapsulated[-POINT:])  # raises for a point of low order: HPKE below only fails with it
        try:
            return _suite().decrypt(encapsulated + stanza.body, self._secret, _HYBRID_LABEL)
        except InvalidTag:
            return None

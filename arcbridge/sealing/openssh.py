"""Makes recipients and identities of OpenSSH's keys, Ed25519 and RSA, as age does (https://age-encryption.org/v1).

A stanza names the key by four bytes of its hash. An Ed25519 key is used with X25519 by the map between both curves
(RFC 7748 §4.1), and mixed with the whole OpenSSH key, so that it makes no other secret than as a key of OpenSSH.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from arcbridge.errors import SealingError
from arcbridge.sealing.header import Stanza, encoded
from arcbridge.sealing.recipients import (
    FILE_KEY,
    POINT,
    AgeIdentity,
    Recipient,
    agreed,
    decrypted_key,
    derived,
    encrypted_key,
)

_ED25519: Final = b"ssh-ed25519"
_ED25519_LABEL: Final = b"age-encryption.org/v1/ssh-ed25519"
_RSA: Final = b"ssh-rsa"
_OAEP: Final = OAEP(MGF1(SHA256()), SHA256(), b"age-encryption.org/v1/ssh-rsa")
_LEAST_RSA: Final = 2048
_FIELD: Final = 2**255 - 19


def parse_openssh_recipient(text: str) -> Recipient:
    """Read a line as in `id_ed25519.pub`. Raises `ValueError`."""
    try:
        key = load_ssh_public_key(text.encode())
    except UnsupportedAlgorithm as error:
        raise ValueError("it is of a kind that cannot be used here") from error
    if isinstance(key, Ed25519PublicKey):
        return _Ed25519Recipient(key)
    if isinstance(key, RSAPublicKey) and key.key_size >= _LEAST_RSA:
        return _RsaRecipient(key)
    raise ValueError(f"it is neither an Ed25519 key nor an RSA key of at least {_LEAST_RSA} bits")


def parse_openssh_identity(data: bytes) -> AgeIdentity:
    """Read a private key file of OpenSSH, or RSA in PEM. Raises `SealingError`."""
    load = load_ssh_private_key if data.startswith(b"-----BEGIN OPENSSH") else load_pem_private_key
    try:
        key = load(data, None)
    except TypeError as error:
        raise SealingError("it is a key with a passphrase: give a copy without one "
                           "(`ssh-keygen -p -N '' -f COPY`)") from error  # fmt: skip
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SealingError("it is no private key of OpenSSH that can be read") from error
    if isinstance(key, Ed25519PrivateKey):
        return _Ed25519Identity(key)
    if isinstance(key, RSAPrivateKey):
        return _RsaIdentity(key)
    raise SealingError("it is neither an Ed25519 key nor an RSA key")


def _wire_form(key: Ed25519PublicKey | RSAPublicKey) -> bytes:
    """Return a public key as SSH sends it (RFC 4253 §6.6)."""
    return base64.b64decode(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1])


def _tag(wire_form: bytes) -> bytes:
    return encoded(hashlib.sha256(wire_form).digest()[:4])


def _mixed(secret: bytes, wire_form: bytes) -> bytes:
    """Mix a shared secret with the OpenSSH key."""
    return agreed(X25519PrivateKey.from_private_bytes(derived(b"", wire_form, _ED25519_LABEL)), secret)


class _Ed25519Recipient(Recipient):
    def __init__(self, key: Ed25519PublicKey) -> None:
        """Raises `ValueError` for the one point that has no other on Curve25519."""
        self._wire_form = _wire_form(key)
        y = int.from_bytes(key.public_bytes_raw(), "little") & (1 << 255) - 1
        self._public = ((1 + y) * pow(1 - y, -1, _FIELD) % _FIELD).to_bytes(POINT, "little")

    def wrap(self, file_key: bytes) -> Stanza:
        ephemeral = X25519PrivateKey.generate()
        share = ephemeral.public_key().public_bytes_raw()
        secret = _mixed(agreed(ephemeral, self._public), self._wire_form)
        body = encrypted_key(secret, share, self._public, _ED25519_LABEL, file_key)
        return Stanza(_ED25519, (_tag(self._wire_form), encoded(share)), body)


class _Ed25519Identity(AgeIdentity):
    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._wire_form = _wire_form(key.public_key())
        self._secret = X25519PrivateKey.from_private_bytes(hashlib.sha512(key.private_bytes_raw()).digest()[:POINT])

    def unwrap(self, stanza: Stanza) -> bytes | None:
        if stanza.kind != _ED25519:
            return None
        share = stanza.argument_bytes(1, 2, POINT)
        if stanza.arguments[0] != _tag(self._wire_form):
            return None
        public = self._secret.public_key().public_bytes_raw()
        secret = _mixed(agreed(self._secret, share), self._wire_form)
        return decrypted_key(secret, share, public, _ED25519_LABEL, stanza.body)


class _RsaRecipient(Recipient):
    def __init__(self, key: RSAPublicKey) -> None:
        self._key = key

    def wrap(self, file_key: bytes) -> Stanza:
        return Stanza(_RSA, (_tag(_wire_form(self._key)),), self._key.encrypt(file_key, _OAEP))


class _RsaIdentity(AgeIdentity):
    def __init__(self, key: RSAPrivateKey) -> None:
        self._key = key

    def unwrap(self, stanza: Stanza) -> bytes | None:
        if stanza.kind != _RSA or stanza.arguments != (_tag(_wire_form(self._key.public_key())),):
            return None
        try:
            file_key = self._key.decrypt(stanza.body, _OAEP)
        except ValueError:
            return None
        return file_key if len(file_key) == FILE_KEY else None

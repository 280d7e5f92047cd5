"""ES256 (RFC 7518 §3.4) with `cryptography`: keys and signatures as bytes, and nothing of JWS.

It decides nothing about who may sign what. It is apart from `identity.proof` because `cryptography` takes a while to
import, and a client without bound tokens never needs it.
"""

from __future__ import annotations

from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

SIZE: Final = 32
"""Bytes of a coordinate, of a private key, and of each half of a signature."""
_CURVE: Final = ec.SECP256R1()
_ALGORITHM: Final = ec.ECDSA(hashes.SHA256())


class PrivateKey:
    """A private key."""

    __slots__ = ("_key",)

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> PrivateKey:
        """Make a new key."""
        return cls(ec.generate_private_key(_CURVE))

    @classmethod
    def load(cls, x: bytes, y: bytes, d: bytes) -> PrivateKey:
        """Return the key of these numbers. Raises ValueError where they do not belong together."""
        public = ec.EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), _CURVE)
        return cls(ec.EllipticCurvePrivateNumbers(int.from_bytes(d, "big"), public).private_key())

    def numbers(self) -> tuple[bytes, bytes, bytes]:
        """Return what `load` takes."""
        numbers = self._key.private_numbers()
        public = numbers.public_numbers
        x, y, d = (number.to_bytes(SIZE, "big") for number in (public.x, public.y, numbers.private_value))
        return x, y, d

    def sign(self, data: bytes) -> bytes:
        """Return the signature, `r` and `s` of 32 bytes each."""
        r, s = decode_dss_signature(self._key.sign(data, _ALGORITHM))
        return r.to_bytes(SIZE, "big") + s.to_bytes(SIZE, "big")


def is_signed(x: bytes, y: bytes, signature: bytes, data: bytes) -> bool:
    """Return whether the holder of the public key (x, y) signed `data`; False for what is no point of the curve."""
    r, s = int.from_bytes(signature[:SIZE], "big"), int.from_bytes(signature[SIZE:], "big")
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, b"\x04" + x + y)
        key.verify(encode_dss_signature(r, s), data, _ALGORITHM)
    except (ValueError, InvalidSignature):
        return False
    return True


def spki_of(certificate: bytes) -> bytes:
    """Return the SubjectPublicKeyInfo (DER) of a certificate (DER) with a key of any kind. Raises ValueError."""
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except (x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise ValueError("a certificate of a version, or with a key, that is not known here") from error
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def spki_of_key(pem: str) -> bytes:
    """Return the SubjectPublicKeyInfo (DER) of the first private key, of any kind and without a passphrase, in a PEM
    text. Raises ValueError."""
    try:
        key = load_pem_private_key(pem.encode(), None).public_key()
    except (TypeError, UnsupportedAlgorithm) as error:
        raise ValueError("a key with a passphrase, or of a kind that is not known here") from error
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

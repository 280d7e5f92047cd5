"""ES256 as bytes, against another implementation and against numbers that are none."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm

from arcbridge.identity.p256 import PrivateKey, is_signed, spki_of
from arcbridge.pki.authority import Authority

KEY = PrivateKey.generate()
X, Y, D = KEY.numbers()
DATA = b"what is signed"
SIGNATURE = KEY.sign(DATA)
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def test_another_implementation_takes_what_is_signed_here_and_the_other_way_round() -> None:
    theirs = ECAlgorithm(ECAlgorithm.SHA256)
    key = ec.derive_private_key(int.from_bytes(D, "big"), ec.SECP256R1())
    assert theirs.verify(DATA, key.public_key(), SIGNATURE)
    assert is_signed(X, Y, theirs.sign(DATA, key), DATA)
    assert len(SIGNATURE) == 64


def test_a_key_is_read_from_its_numbers() -> None:
    again = PrivateKey.load(X, Y, D)
    assert again.numbers() == (X, Y, D)
    assert is_signed(X, Y, again.sign(DATA), DATA)


@pytest.mark.parametrize(
    ("x", "y", "d"),
    [(Y, X, D), (X, Y, bytes(32)), (X, Y, ORDER.to_bytes(32, "big")), (X, Y, b"\xff" * 32), (X, Y, D[::-1])],
    ids=["no point", "0", "order", "too large", "another"],
)
def test_numbers_that_do_not_belong_together(x: bytes, y: bytes, d: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (the words are the library's)
        PrivateKey.load(x, y, d)


@pytest.mark.parametrize(
    ("r", "s"), [(0, 0), (0, 1), (1, 0), (1, 1), (ORDER, ORDER), (2**256 - 1, 2**256 - 1), (ORDER - 1, 1)]
)
def test_numbers_at_the_edges_are_no_signature(r: int, s: int) -> None:
    """CVE-2022-21449 took r = s = 0 for a signature of everything."""
    assert not is_signed(X, Y, r.to_bytes(32, "big") + s.to_bytes(32, "big"), DATA)


@pytest.mark.parametrize(
    ("x", "y"),
    [(bytes(32), bytes(32)), (Y, X), (b"\xff" * 32, b"\xff" * 32), (X, Y[::-1]), (b"", b""), (X + X, Y)],
    ids=["zero", "swapped", "too large", "another y", "empty", "too long"],
)
def test_what_is_no_point_signs_nothing(x: bytes, y: bytes) -> None:
    assert not is_signed(x, y, SIGNATURE, DATA)


@given(st.integers(0, 511))
def test_each_bit_of_a_signature_counts(bit: int) -> None:
    changed = bytearray(SIGNATURE)
    changed[bit // 8] ^= 1 << bit % 8
    assert not is_signed(X, Y, bytes(changed), DATA)


def test_the_key_of_a_certificate() -> None:
    certificate = x509.load_pem_x509_certificate(Authority.create("test").certificate_pem.encode())
    expected = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert spki_of(certificate.public_bytes(Encoding.DER)) == expected
    with pytest.raises(ValueError, match="asn1"):
        spki_of(b"none")


def test_a_certificate_that_is_not_known_here_has_no_key() -> None:
    """`cryptography` has exceptions for these that are no ValueError."""
    pem = Authority.create("test").certificate_pem.encode()
    der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    version, algorithm = bytes.fromhex("a003020102"), bytes.fromhex("06072a8648ce3d0201")
    assert version in der
    assert algorithm in der
    for changed in (der.replace(version, version[:-1] + b"\x07"), der.replace(algorithm, algorithm[:-1] + b"\x63")):
        with pytest.raises(ValueError, match="not known here"):
            spki_of(changed)

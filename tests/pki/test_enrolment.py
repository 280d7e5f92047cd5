import base64
import hashlib
import math
import traceback

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.errors import EnrolmentRefused, StateError
from arcbridge.pki.enrolment import CSR_LIMIT, JoinToken, key_hash, make_csr, make_key, read_csr


def long_exponent() -> rsa.RSAPrivateKey:
    """Return a key whose public exponent is as long as its modulus."""
    small = rsa.generate_private_key(65537, 2048).private_numbers()
    phi = (small.p - 1) * (small.q - 1)
    d = next(d for d in range(65539, 70_000, 2) if math.gcd(d, phi) == 1)
    public = rsa.RSAPublicNumbers(pow(d, -1, phi), small.public_numbers.n)
    parts = rsa.rsa_crt_dmp1(d, small.p), rsa.rsa_crt_dmq1(d, small.q), small.iqmp
    return rsa.RSAPrivateNumbers(small.p, small.q, d, *parts, public).private_key(unsafe_skip_rsa_key_validation=True)


ACCEPTED = {
    "rsa-2048": lambda: rsa.generate_private_key(65537, 2048),
    "rsa-3072": lambda: rsa.generate_private_key(65537, 3072),
    "p-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}
WEAK = {
    "rsa-1024": lambda: rsa.generate_private_key(65537, 1024),
    "rsa-2047": lambda: rsa.generate_private_key(65537, 2047),
    "rsa-exponent-3": lambda: rsa.generate_private_key(3, 2048),
    "rsa-long-exponent": long_exponent,
    "p-224": lambda: ec.generate_private_key(ec.SECP224R1()),
    "p-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    "ed448": ed448.Ed448PrivateKey.generate,
    "dsa-2048": lambda: dsa.generate_private_key(2048),
}


def csr_over(key, builder=None, algorithm=hashes.SHA256) -> str:
    builder = builder or x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    unhashed = isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    return builder.sign(key, None if unhashed else algorithm()).public_bytes(Encoding.PEM).decode()


@pytest.mark.parametrize("kind", ACCEPTED)
def test_accepted_keys(kind: str) -> None:
    key = ACCEPTED[kind]()
    assert read_csr(csr_over(key)) == key.public_key()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    assert read_csr(make_csr(pem)) == key.public_key()


@pytest.mark.parametrize("kind", WEAK)
def test_weak_and_unsupported_keys_are_refused(kind: str) -> None:
    """docs/threats.md#E4, docs/threats.md#J24."""
    with pytest.raises(EnrolmentRefused):
        read_csr(csr_over(WEAK[kind]()))


def test_a_broken_signature_is_refused() -> None:
    request = x509.load_pem_x509_csr(make_csr(make_key()).encode())
    der = bytearray(request.public_bytes(Encoding.DER))
    der[-1] ^= 1
    broken = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM).decode()
    with pytest.raises(EnrolmentRefused, match="signature"):
        read_csr(broken)


def test_a_key_that_the_requester_does_not_hold_is_refused() -> None:
    """The victim's public key is put into a request that the attacker signed."""

    def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
        return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    attacker, victim = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    der = x509.load_pem_x509_csr(csr_over(attacker).encode()).public_bytes(Encoding.DER)
    swapped = der.replace(spki(attacker), spki(victim))
    assert swapped != der
    with pytest.raises(EnrolmentRefused, match="signature"):
        read_csr(x509.load_der_x509_csr(swapped).public_bytes(Encoding.PEM).decode())


def test_an_oversize_request_is_refused_before_it_is_parsed() -> None:
    names = [x509.DNSName(f"n{n}.example.org") for n in range(10_000)]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    with pytest.raises(EnrolmentRefused, match="larger than 16 KiB"):
        read_csr(csr_over(ec.generate_private_key(ec.SECP256R1()), builder))
    with pytest.raises(EnrolmentRefused, match="larger"):
        read_csr("ü" * (CSR_LIMIT // 2 + 1))
    with pytest.raises(EnrolmentRefused, match="larger"):
        read_csr(make_csr(make_key()) + " " * CSR_LIMIT)


@given(st.one_of(st.text(max_size=300), st.binary(max_size=300).map(lambda b: b.decode("latin-1"))))
def test_garbage_gives_a_typed_error_that_quotes_nothing(text: str) -> None:
    body = f"-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n"
    for csr in (text, body):
        with pytest.raises(EnrolmentRefused) as caught:
            read_csr(csr)
        assert len(caught.value.message) < 200


def test_a_request_of_another_version_is_refused() -> None:
    """cryptography's error for it is no ValueError."""
    der = x509.load_pem_x509_csr(_CSR.encode()).public_bytes(Encoding.DER)
    version = der.index(b"\x02\x01\x00")  # INTEGER 0, the first of the request
    other = der[:version] + b"\x02\x01\x01" + der[version + 3 :]
    pem = "-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(other).decode()
    with pytest.raises(EnrolmentRefused, match="not a readable"):
        read_csr(pem + "-----END CERTIFICATE REQUEST-----\n")


@given(st.data())
def test_a_mutated_request_never_raises_anything_else(data: st.DataObject) -> None:
    der = bytearray(x509.load_pem_x509_csr(_CSR.encode()).public_bytes(Encoding.DER))
    for _ in range(data.draw(st.integers(1, 3))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    pem = "-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(bytes(der)).decode()
    try:
        read_csr(pem + "-----END CERTIFICATE REQUEST-----\n")
    except EnrolmentRefused:
        pass


_CSR = make_csr(make_key())


def test_the_key_hash_tells_keys_and_not_requests() -> None:
    key = make_key()
    assert key_hash(make_csr(key)) == key_hash(make_csr(key))
    assert key_hash(make_csr(key)) != key_hash(make_csr(make_key()))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "system:masters")])
    own = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    assert key_hash(csr_over(own, builder)) == key_hash(csr_over(own))


@pytest.mark.parametrize("key", ["", "no key", _CSR])
def test_an_unusable_own_key_says_what_to_do(key: str) -> None:
    with pytest.raises(StateError, match="enrol"):
        make_csr(key)


class TestJoinToken:
    def test_round_trip(self) -> None:
        made = JoinToken.create()
        text, token_id, secret_hash = made
        assert JoinToken.parse(f" {text}\n") == made
        assert text == f"{token_id}.{text.partition('.')[2]}"
        assert secret_hash == hashlib.sha256(text.partition(".")[2].encode()).hexdigest()
        assert made.matches(secret_hash)
        assert not made.matches(JoinToken.create().secret_hash)
        assert not made.matches("")

    def test_secrets_have_256_bits_and_differ(self) -> None:
        texts = {JoinToken.create().text for _ in range(100)}
        assert len(texts) == 100
        assert {len(text) for text in texts} == {16 + 1 + 43}

    def test_the_secret_is_in_no_representation(self) -> None:
        made = JoinToken.create()
        secret = made.text.partition(".")[2]
        assert secret not in f"{made} {made!r} {[made]} { ({'token': made}) }"

    @pytest.mark.parametrize(
        "change", ["", ".", "x", "{id}", "{id}.", "{id}.{secret}a", "{secret}.{id}", "{id} {secret}"]
    )
    def test_malformed_tokens_are_refused_without_quoting_them(self, change: str) -> None:
        made = JoinToken.create()
        text = change.format(id=made.id, secret=made.text.partition(".")[2])
        with pytest.raises(EnrolmentRefused) as caught:
            JoinToken.parse(text)
        shown = "".join(traceback.format_exception(caught.value))
        assert made.text.partition(".")[2][:12] not in shown

    def test_a_huge_one_is_refused(self) -> None:
        with pytest.raises(EnrolmentRefused):
            JoinToken.parse(" " * 1_000_000)

import base64
import hashlib
import os
import ssl
import stat
import subprocess
import textwrap
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from arcbridge.errors import ConfigError, PinMismatch, StateError
from arcbridge.pki.authority import Authority
from arcbridge.pki.pins import PinStore, _p256_key, check_pin, pin_of, require_pin, same_pin

A = "sha256:" + "a" * 64
B = "sha256:" + "b" * 64
PLAIN = Authority.create("CA").certificate_pem


def test_a_pin_follows_the_key_and_not_the_certificate(tmp_path: Path) -> None:
    one = Authority.load_or_create(tmp_path, "one")
    (tmp_path / "ca.crt").unlink()  # made again over the same key
    again = Authority.load_or_create(tmp_path, "another name")
    assert again.certificate_pem != one.certificate_pem
    assert pin_of(again.certificate_pem) == one.pin == check_pin(one.pin)
    assert pin_of(Authority.create("one").certificate_pem) != one.pin


def test_openssl_agrees(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text((ca := Authority.create("x")).certificate_pem)
    key = subprocess.run(
        ["openssl", "x509", "-in", tmp_path / "ca.crt", "-noout", "-pubkey"], capture_output=True, check=True
    ).stdout
    der = subprocess.run(["openssl", "pkey", "-pubin", "-outform", "DER"], input=key, capture_output=True, check=True)
    assert ca.pin == "sha256:" + hashlib.sha256(der.stdout).hexdigest()


def certificate(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CA")])
    now = datetime.now(UTC)
    built = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1))
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return built.sign(key, algorithm).public_bytes(Encoding.PEM).decode()


def by_cryptography(pem: str) -> str:
    key = x509.load_pem_x509_certificate(pem.encode()).public_key()
    return "sha256:" + hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        (ec.generate_private_key(ec.SECP256R1()), True),
        (ec.generate_private_key(ec.SECP384R1()), False),
        (rsa.generate_private_key(65537, 2048), False),
        (ed25519.Ed25519PrivateKey.generate(), False),
    ],
    ids=["P-256", "P-384", "RSA", "Ed25519"],
)
def test_cryptography_agrees(key: ec.EllipticCurvePrivateKey, plain: bool) -> None:
    pem = certificate(key)
    assert (_p256_key(pem) is not None) is plain
    assert pin_of(pem) == by_cryptography(pem)


@given(data=st.data())
@settings(max_examples=300)
def test_a_damaged_certificate_has_the_pin_that_cryptography_finds_or_is_left_to_it(data: st.DataObject) -> None:
    """Bytes changed, cut out or put in anywhere: what is read by the boundaries of the fields is the key itself."""
    der = bytearray(ssl.PEM_cert_to_DER_cert(PLAIN))
    at = data.draw(st.integers(0, len(der) - 1))
    der[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    lines = textwrap.wrap(base64.b64encode(der).decode(), 64)
    pem = "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])
    found = _p256_key(pem)
    if found is None:
        return
    try:
        read = by_cryptography(pem)
    except ValueError:
        return  # OpenSSL trusts no such certificate either
    assert "sha256:" + hashlib.sha256(found).hexdigest() == read


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("\n", "\r\n", id="lines of another system"),
        pytest.param("-----END", " -----END", id="a space"),
        pytest.param("-----BEGIN", "words\n-----BEGIN", id="words before"),
        pytest.param("-----BEGIN CERTIFICATE", "-----BEGIN X509 CERTIFICATE", id="another label"),
    ],
)
def test_another_spelling_is_left_to_cryptography(before: str, after: str) -> None:
    assert _p256_key(PLAIN) is not None
    assert _p256_key(PLAIN.replace(before, after)) is None


def test_a_length_in_another_spelling_is_left_to_cryptography() -> None:
    """BER may say a length with more bytes than it takes; DER may not, and a certificate is DER."""
    der = ssl.PEM_cert_to_DER_cert(PLAIN)
    assert der[:2] == b"\x30\x82", "a SEQUENCE whose length takes two bytes"
    longer = b"\x30\x83\x00" + der[2:]
    assert _p256_key(ssl.DER_cert_to_PEM_cert(der)) is not None
    assert _p256_key(ssl.DER_cert_to_PEM_cert(longer)) is None


@pytest.mark.parametrize("text", ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "\x00", "ü"])
def test_what_is_no_certificate_has_no_pin(text: str) -> None:
    with pytest.raises(ConfigError):
        pin_of(text)


@pytest.mark.parametrize("label", ["CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_second_certificate_cannot_hide_behind_a_pinned_one(label: str, order: int) -> None:
    """docs/threats.md#E6: `ssl` would trust both."""
    ours, theirs = Authority.create("CA"), Authority.create("CA")
    smuggled = theirs.certificate_pem.replace(" CERTIFICATE", f" {label}")
    bundle = "".join([ours.certificate_pem, smuggled][::order])
    with pytest.raises(ConfigError, match="exactly one"):
        pin_of(bundle)
    with pytest.raises(ConfigError):
        require_pin("the relay's CA", ours.pin, bundle)


def test_what_is_trusted_is_the_certificate_alone() -> None:
    ca = Authority.create("CA")
    assert require_pin("the relay's CA", ca.pin, f"words\n{ca.certificate_pem}more words") == ca.certificate_pem


def test_pins_are_normalised() -> None:
    assert check_pin(f"  {A.upper()}\n") == A
    assert same_pin(A, A.upper())
    assert not same_pin(A, B)


@pytest.mark.parametrize(
    "pin", ["", "a" * 64, A[:-1], A + "a", "sha1:" + "a" * 40, "sha512:" + "a" * 128, "sha256:" + "g" * 64, A * 1000]
)
def test_short_pins_and_other_hashes_are_refused(pin: str) -> None:
    """docs/threats.md#E6."""
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        check_pin(pin)
    with pytest.raises(ConfigError):
        same_pin(A, pin)


def test_a_mismatch_names_both() -> None:
    ca = Authority.create("x")
    require_pin("the relay's CA", ca.pin.upper(), ca.certificate_pem)
    with pytest.raises(PinMismatch) as caught:
        require_pin("the relay's CA", A, ca.certificate_pem)
    assert A in caught.value.message
    assert ca.pin in caught.value.message


class TestPinStore:
    def test_remembers_between_runs_in_a_private_file(self, tmp_path: Path) -> None:
        path = tmp_path / "state" / "pins.toml"
        store = PinStore(path)
        assert store.get("prod") is None
        store.remember("prod", A.upper())
        store.remember("prod", A)
        store.remember("a.b-c", B)
        assert PinStore(path).get("prod") == A
        assert PinStore(path).get("a.b-c") == B
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_another_pin_is_an_error_that_names_both_and_changes_nothing(self, tmp_path: Path) -> None:
        store = PinStore(tmp_path / "pins.toml")
        store.remember("prod", A)
        before = store.path.read_bytes()
        with pytest.raises(PinMismatch) as caught:
            store.remember("prod", B)
        assert A in caught.value.message
        assert B in caught.value.message
        assert store.path.read_bytes() == before

    def test_relays_are_kept_apart_and_pins_for_all_count_first(self, tmp_path: Path) -> None:
        path = tmp_path / "pins.toml"
        one, two = PinStore(path, relay="one.example:443"), PinStore(path, relay="[::1]:8443")
        one.remember("prod", A)
        two.remember("prod", B)
        assert (one.get("prod"), two.get("prod"), PinStore(path).get("prod")) == (A, B, None)
        PinStore(path).remember("prod", B)
        with pytest.raises(PinMismatch):
            one.remember("prod", A)

    def test_a_relay_address_cannot_break_out_of_the_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError):
            PinStore(tmp_path / "pins.toml", relay='x"]\n[clusters')

    def test_an_organisations_file(self, tmp_path: Path) -> None:
        path = tmp_path / "pins.toml"
        path.write_text(f'# ours\n[clusters]\nprod-eu = "{A.upper()}"\n"prod.us" = "{B}"\n')
        assert PinStore(path).get("prod-eu") == A
        assert PinStore(path).get("prod.us") == B

    @pytest.mark.parametrize(
        "text",
        [
            "x",
            "pins = 1",
            "clusters = 1",
            f'[clusters]\nProd = "{A}"',
            '[clusters]\nprod = "sha256:1"',
            "[clusters]\nprod = 1",
            "relays = 1",
            "relays.x = 1",
            f'[clusters]\n"../x" = "{A}"',
            pytest.param("clusters = " + "1" * 5000, id="digits"),
            pytest.param("clusters = " + "[" * 5000, id="nested"),
        ],
    )
    def test_a_malformed_file_is_named_and_never_overwritten(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "pins.toml"
        path.write_text(text)
        for action in (lambda: PinStore(path).get("prod"), lambda: PinStore(path).remember("prod", A)):
            with pytest.raises(StateError, match=r"pins\.toml"):
                action()
        assert path.read_text() == text

    def test_two_writers_lose_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "pins.toml"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: PinStore(path).remember(f"c{n}", A), range(40)))
        assert all(PinStore(path).get(f"c{n}") == A for n in range(40))
        assert sorted(os.listdir(tmp_path)) == [".pins.toml.lock", "pins.toml"]

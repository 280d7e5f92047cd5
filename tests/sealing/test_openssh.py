"""OpenSSH's keys seal and open as age and rage let them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pyrage
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from arcbridge.errors import SealingError
from arcbridge.sealing.age import parse_identities, parse_recipient
from arcbridge.sealing.header import encoded
from tests.sealing.keys import X25519_IDENTITY, opened, sealed
from tests.support.processes import run

KINDS: dict[str, Callable[[], ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey]] = {
    "ssh-ed25519": ed25519.Ed25519PrivateKey.generate,
    "ssh-rsa": lambda: rsa.generate_private_key(65537, 2048),
}


@cache
def keys(kind: str, number: int = 0) -> tuple[str, bytes]:
    """Return a public key and its private key file, as ssh-keygen writes them."""
    key = KINDS[kind]()
    return public(key), key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def public(key: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_it_opens_what_it_seals_and_what_rage_seals_and_rage_opens_it(kind: str) -> None:
    text, file = keys(kind)
    for recipient in (text, f"{text} alice@example.com"):
        assert opened(sealed(b"content", recipient), parse_identities(file)) == b"content"
        assert pyrage.decrypt(sealed(b"content", recipient), [pyrage.ssh.Identity.from_buffer(file)]) == b"content"
        theirs = pyrage.encrypt(b"content", [pyrage.ssh.Recipient.from_str(recipient)])
        assert opened(theirs, parse_identities(file)) == b"content"


def test_age_opens_it_and_it_opens_what_age_seals(kind: str, programs: Path, tmp_path: Path) -> None:
    text, file = keys(kind)
    (tmp_path / "key").write_bytes(file)
    made = run([programs / "age", "-d", "-i", tmp_path / "key"], input=sealed(b"content", text)).stdout
    assert made == b"content"
    assert opened(run([programs / "age", "-r", text], input=made).stdout, parse_identities(file)) == b"content"


def test_another_key_does_not_open_it(kind: str) -> None:
    text, _ = keys(kind)
    _, other = keys(kind, 1)
    for identities in (parse_identities(other), parse_identities(X25519_IDENTITY.encode())):
        with pytest.raises(SealingError, match="not sealed to the key"):
            opened(sealed(b"content", text), identities)


def test_a_stanza_under_its_name_that_it_does_not_open_is_not_for_it(kind: str) -> None:
    text, file = keys(kind)
    (identity,) = parse_identities(file)
    stanza = parse_recipient(text).wrap(bytes(16))
    assert identity.unwrap(stanza) == bytes(16)
    assert identity.unwrap(replace(stanza, body=bytes([stanza.body[0] ^ 1]) + stanza.body[1:])) is None
    assert identity.unwrap(replace(stanza, arguments=(b"AAAAAA", *stanza.arguments[1:]))) is None
    assert identity.unwrap(parse_recipient(keys("ssh-rsa")[0]).wrap(bytes(15))) is None, "no key of a file"


def test_a_malformed_stanza_is_refused() -> None:
    text, file = keys("ssh-ed25519")
    (identity,) = parse_identities(file)
    stanza = parse_recipient(text).wrap(bytes(16))
    for arguments in (stanza.arguments[:1], (*stanza.arguments, b"x"), (stanza.arguments[0], encoded(bytes(31)))):
        with pytest.raises(SealingError, match="damaged"):
            identity.unwrap(replace(stanza, arguments=arguments))


def test_rsa_in_pem_opens_too() -> None:
    key = rsa.generate_private_key(65537, 2048)
    file = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    assert opened(sealed(b"content", public(key)), parse_identities(file)) == b"content"


def test_keys_that_do_not_serve_are_named() -> None:
    curve = ec.generate_private_key(ec.SECP256R1())
    for text, why in (
        (public(curve), "neither an Ed25519 key nor an RSA key"),
        (public(rsa.generate_private_key(65537, 1024)), "at least 2048 bits"),
        ("ssh-ed25519 AAAA", "public key of age"),
        ("ssh-dss AAAAB3NzaC1kc3M= x", "public key of age"),
        ("ssh-ed25519", "public key of age"),
        # y = 1, which has no other point on Curve25519
        (public_of(b"\1" + bytes(31)), "public key of age"),
    ):
        with pytest.raises(SealingError, match=why):
            parse_recipient(text)
    private = curve.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    locked = KINDS["ssh-rsa"]().private_bytes(
        Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"secret")
    )
    for file, why in (
        (private, "neither an Ed25519 key nor an RSA key"),
        (locked, "passphrase"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n", "that can be read"),
        (b"-----BEGIN AGE ENCRYPTED FILE-----\n", "that can be read"),
    ):
        with pytest.raises(SealingError, match=why):
            parse_identities(file)


def public_of(point: bytes) -> str:
    key = ed25519.Ed25519PublicKey.from_public_bytes(point)
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

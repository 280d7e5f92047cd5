"""Assertions of an application: what Entra ID wants of one by certificate, and what others want."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from arcbridge.errors import ArcbridgeError, ConfigError, StateError, Unauthenticated
from arcbridge.identity.client_assertion import ASSERTION_LIFE, FILE_LIMIT, asserted, read_word, sign_assertion
from tests.support.entra import Certificate

AUDIENCE = "https://login.example.org/token"
CERTIFICATE = Certificate.make("arcbridge")
OTHER = Certificate.make("another")


def signed(directory: Path, certificate: Path | None, key: Path, **more: Any) -> str:
    named = None if certificate is None else (certificate, "certificate_file")
    return sign_assertion("app", AUDIENCE, 1000.9, key=(key, "key_file"), certificate=named, **more)


def test_with_a_certificate_it_is_what_entra_id_wants(tmp_path: Path) -> None:
    certificate, key = CERTIFICATE.write(tmp_path, "app")
    text = signed(tmp_path, certificate, key)
    header = jwt.get_unverified_header(text)
    assert header == {"typ": "JWT", "alg": "PS256", "x5t#S256": CERTIFICATE.x5t_s256}
    options: Any = {"verify_exp": False, "verify_iat": False}
    claims = jwt.decode(text, CERTIFICATE.key.public_key(), ["PS256"], audience=AUDIENCE, options=options)
    assert (claims["iss"], claims["sub"], claims["iat"], claims["exp"]) == ("app", "app", 1000, 1000 + ASSERTION_LIFE)
    assert signed(tmp_path, certificate, key) != text, "`jti` is new each time"


def test_without_one_it_is_the_usual_kind(tmp_path: Path) -> None:
    _, key = CERTIFICATE.write(tmp_path, "app")
    assert jwt.get_unverified_header(signed(tmp_path, None, key, key_id="k")) == {
        "typ": "JWT",
        "alg": "RS256",
        "kid": "k",
    }


def test_a_certificate_of_another_kind_of_key(tmp_path: Path) -> None:
    certificate, _ = CERTIFICATE.write(tmp_path, "app")
    key = tmp_path / "ec.key"
    private = serialization.PrivateFormat.PKCS8
    key.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, private, serialization.NoEncryption()
        )
    )
    with pytest.raises(ConfigError, match=r"certificate_file: the certificate in .* belongs to another key"):
        signed(tmp_path, certificate, key)
    with pytest.raises(ConfigError, match="belongs to another key than that of key_file"):
        signed(tmp_path, OTHER.write(tmp_path, "other")[0], CERTIFICATE.write(tmp_path, "app")[1])


def test_files_that_cannot_be_used_are_named_and_not_quoted(tmp_path: Path) -> None:
    certificate, key = CERTIFICATE.write(tmp_path, "app")
    broken = tmp_path / "broken"
    broken.write_text("s3cret")
    cases: list[tuple[Path, Path, type[ArcbridgeError], str]] = [
        (broken, key, ConfigError, "certificate_file: .* holds no certificate in PEM"),
        (certificate, broken, ConfigError, "key_file: .* holds no private key in PEM"),
        (certificate, tmp_path / "none", Unauthenticated, "key_file: .*none does not exist"),
        (tmp_path, key, StateError, "certificate_file: cannot read"),
    ]
    for one, other, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            signed(tmp_path, one, other)
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"a\nb", b"\xff", b"a\0b"], ids=["empty", "two", "bytes", "nul"])
def test_a_secret_is_one_line(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(data)
    with pytest.raises(Unauthenticated, match=r"client_secret_file: .* does not give one line of text"):
        read_word(file, "client_secret_file")
    file.write_bytes(b"x" * (FILE_LIMIT + 1))
    with pytest.raises(StateError, match="more than 64 KiB"):
        read_word(file, "client_secret_file")
    file.write_bytes(b"s3cret\r\n")
    assert read_word(file, "client_secret_file") == "s3cret"


def test_the_fields_of_a_form() -> None:
    assert asserted("app", "a.b.c") == {
        "client_id": "app",
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
        "client_assertion": "a.b.c",
    }

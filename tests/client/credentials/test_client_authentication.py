"""How a client proves to its issuer who it is: each way, and what no error says."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa

from arcbridge.client.credentials.client_authentication import ClientAuthentication, IssuerEndpoints
from arcbridge.errors import ConfigError
from arcbridge.identity.client_assertion import ASSERTION_TYPE
from arcbridge.settings.config import LoginConfig
from tests.support.issuer import Issuer
from tests.support.issuer_server import ACTIONS_SECRET

TOKEN = "https://login.example.org/token"
ISSUER = "https://login.example.org"
ENDPOINTS = IssuerEndpoints(TOKEN, ISSUER)


def client(**settings: Any) -> ClientAuthentication:
    return ClientAuthentication(LoginConfig(client_id="our:ci", **settings), clock=lambda: 1000.5)


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def pem(key: Any) -> bytes:
    private = serialization.PrivateFormat.PKCS8
    data: bytes = key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption())
    return data


def with_unknown_curve() -> bytes:
    """A P-256 key that says it is of prime239v2, which cryptography does not know."""
    lines = pem(ec.generate_private_key(ec.SECP256R1())).decode().splitlines()
    data = base64.b64decode("".join(lines[1:-1]))
    data = data.replace(bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d030105"))
    return f"{lines[0]}\n{base64.encodebytes(data).decode()}{lines[-1]}\n".encode()


async def test_a_public_client_has_its_id_alone() -> None:
    assert await client().proof(ENDPOINTS, TOKEN) == ({"client_id": "our:ci"}, {})
    assert not client().confidential


async def test_a_secret_goes_by_basic(tmp_path: Path) -> None:
    file = write(tmp_path / "secret", "s%c:r t\n")
    fields, headers = await client(client_secret_file=file).proof(ENDPOINTS, TOKEN)
    assert fields == {}
    scheme, _, pair = headers["Authorization"].partition(" ")
    assert (scheme, base64.b64decode(pair)) == ("Basic", b"our%3Aci:s%25c%3Ar+t"), "RFC 6749, appendix B"


async def test_a_secret_goes_into_the_form_where_the_issuer_takes_no_basic(tmp_path: Path) -> None:
    file = write(tmp_path / "secret", "s%c:r t")
    proof = await client(client_secret_file=file).proof(IssuerEndpoints(TOKEN, secret_in_form=True), TOKEN)
    assert proof == ({"client_id": "our:ci", "client_secret": "s%c:r t"}, {})


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (ec.generate_private_key(ec.SECP256R1()), "ES256"),
        (ec.generate_private_key(ec.SECP384R1()), "ES384"),
        (rsa.generate_private_key(65537, 2048), "RS256"),
        (ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
    ],
)
async def test_an_assertion_of_our_own(tmp_path: Path, key: Any, algorithm: str) -> None:
    file = write(tmp_path / "key.pem", pem(key))
    one, headers = await client(client_key_file=file, client_key_id="2026").proof(ENDPOINTS, TOKEN)
    two, _ = await client(client_key_file=file).proof(ENDPOINTS, TOKEN)
    assert (one["client_assertion_type"], headers) == (ASSERTION_TYPE, {})
    assertion = one["client_assertion"]
    assert jwt.get_unverified_header(assertion) == {"alg": algorithm, "typ": "JWT", "kid": "2026"}
    options: Any = {"verify_exp": False, "verify_iat": False}
    claims = jwt.decode(assertion, key.public_key(), [algorithm], options=options, audience=TOKEN)
    assert claims.pop("jti")
    assert claims == {"iss": "our:ci", "sub": "our:ci", "aud": TOKEN, "iat": 1000, "exp": 1060}
    assert "kid" not in jwt.get_unverified_header(two["client_assertion"])
    assert two["client_assertion"] != assertion, "each is for one request"


async def test_an_assertion_from_a_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "assertion"
    found = client(client_assertion_file=file)
    for text in ("one", "two"):
        write(file, text + "\n")
        assert (await found.proof(ENDPOINTS, TOKEN))[0]["client_assertion"] == text


async def test_an_assertion_from_a_command() -> None:
    proof = await client(client_assertion_command=(sys.executable, "-c", "print('one')")).proof(ENDPOINTS, TOKEN)
    assert proof[0] == {"client_id": "our:ci", "client_assertion_type": ASSERTION_TYPE, "client_assertion": "one"}


async def test_a_secret_that_others_may_read_is_warned_of_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "secret", "SECRET")
    file.chmod(0o600)
    await client(client_secret_file=file).proof(ENDPOINTS, TOKEN)
    assert "other users may read" not in "".join(capsys.readouterr())
    file.chmod(0o644)
    found = client(client_secret_file=file)
    for _ in range(2):
        assert (await found.proof(ENDPOINTS, TOKEN))[1]
    said = "".join(capsys.readouterr())
    assert said.count("other users may read") == 1
    assert "SECRET" not in said


@pytest.mark.parametrize(
    "data",
    [
        b"-----BEGIN PRIVATE KEY-----\nSECRET\n-----END PRIVATE KEY-----\n",
        pem(dsa.generate_private_key(1024)),
        pem(rsa.generate_private_key(65537, 1024)),
        pem(ec.generate_private_key(ec.SECP256K1())),
        with_unknown_curve(),
    ],
)
async def test_keys_that_cannot_sign(tmp_path: Path, data: bytes) -> None:
    file = write(tmp_path / "key.pem", data)
    with pytest.raises(ConfigError, match=r"login\.client_key_file: ") as caught:
        await client(client_key_file=file).proof(ENDPOINTS, TOKEN)
    assert "SECRET" not in str(caught.value)


def test_only_one_way(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"client_secret_file: given together with login\.client_assertion_file"):
        client(client_secret_file=tmp_path / "a", client_assertion_file=tmp_path / "b")
    with pytest.raises(ConfigError, match=r"login\.client_id: required with login\.issuer"):
        ClientAuthentication(LoginConfig())
    with pytest.raises(ConfigError, match="client_key_id"):
        client(client_key_id="2026")
    with pytest.raises(ConfigError, match=r"login\.client_certificate_file: belongs to a key"):
        client(client_certificate_file=tmp_path / "a")


async def test_b33_an_assertion_is_for_the_token_endpoint_that_it_goes_to_or_for_the_issuer(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = client(client_key_file=write(tmp_path / "key.pem", pem(key)))
    for url, audience in (
        (TOKEN, TOKEN),
        (f"{ISSUER}/device", ISSUER),
        (f"{ISSUER}/revoke", ISSUER),
        ("https://login.example.net/token", ISSUER),
    ):
        assertion = (await subject.proof(ENDPOINTS, url))[0]["client_assertion"]
        assert jwt.decode(assertion, options={"verify_signature": False})["aud"] == audience


async def test_a_workload_s_own_token_is_asked_for_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"login\.client_assertion_workload: must be one of github, github-actions"):
        client(client_assertion_workload="jenkins")
    with pytest.raises(ConfigError, match=r"given together with login\.client_assertion_workload"):
        client(client_assertion_workload="kubernetes", client_secret_file=tmp_path / "secret")
    with Issuer(tmp_path / "issuer") as issuer:
        monkeypatch.setenv("SSL_CERT_FILE", str(issuer.ca_file))
        subject = ClientAuthentication(
            LoginConfig(client_id="our:ci", client_assertion_workload="github-actions"),
            environment={
                "ACTIONS_ID_TOKEN_REQUEST_URL": f"{issuer.url}/actions",
                "ACTIONS_ID_TOKEN_REQUEST_TOKEN": ACTIONS_SECRET,
            },
        )
        assert subject.confidential
        for _ in range(2):
            form = (await subject.proof(ENDPOINTS, TOKEN))[0]
            assert (form["client_id"], form["client_assertion_type"]) == ("our:ci", ASSERTION_TYPE)
        assert issuer.requests("/actions") == 2

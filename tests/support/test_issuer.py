"""What the issuer of the tests refuses, so that a client that passes there is not refused by a real one for that."""

from __future__ import annotations

import base64
import hashlib
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.issuer import Issuer, main
from tests.support.issuer_server import DEVICE_GRANT

VERIFIER = "v" * 43
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with Issuer(tmp_path_factory.mktemp("issuer")) as issuer:
        yield issuer


@pytest.fixture
def issuer(shared: Issuer) -> Iterator[Issuer]:
    yield shared
    shared.settings(clock_skew=0, device_interval=1, dpop="off", dpop_nonce=False)


def verify(issuer: Issuer, token: str, audience: str) -> dict[str, Any]:
    """Verify a token by the published keys, as any relying party does."""
    _, jwks = issuer.request("GET", "/jwks")
    header = jwt.get_unverified_header(token)
    key = next(key for key in jwt.PyJWKSet.from_dict(jwks).keys if key.key_id == header["kid"])
    assert header["alg"] == key.algorithm_name
    return dict(jwt.decode(token, key, [key.algorithm_name], audience=audience, issuer=issuer.url))


def test_tokens_that_must_be_refused(issuer: Issuer) -> None:
    with pytest.raises(jwt.ExpiredSignatureError):
        verify(issuer, issuer.mint(aud="x", lifetime=-60), "x")
    with pytest.raises(jwt.InvalidAudienceError):
        verify(issuer, issuer.mint(aud="y"), "x")
    with pytest.raises(jwt.InvalidSignatureError):
        verify(issuer, issuer.mint(aud="x", foreign=True), "x")
    issuer.settings(clock_skew=7200)
    with pytest.raises(jwt.ImmatureSignatureError):
        verify(issuer, issuer.mint(aud="x"), "x")


def test_refresh_tokens_rotate_and_a_thief_ends_them(issuer: Issuer) -> None:
    first = login_by_code(issuer, scope="openid offline_access")["refresh_token"]
    refresh = {"grant_type": "refresh_token", "client_id": "cli", "refresh_token": first}
    second = issuer.request("POST", "/token", refresh)[1]["refresh_token"]
    assert issuer.request("POST", "/token", refresh)[1]["error"] == "invalid_grant"
    assert issuer.request("POST", "/token", {**refresh, "refresh_token": second})[1]["error"] == "invalid_grant"

    third = login_by_code(issuer, scope="openid offline_access")["refresh_token"]
    assert issuer.request("POST", "/revoke", {"client_id": "cli", "token": third})[0] == 200
    assert issuer.request("POST", "/token", {**refresh, "refresh_token": third})[0] == 400
    assert "refresh_token" not in login_by_code(issuer, scope="openid")


def test_authorization_code_needs_its_verifier(issuer: Issuer) -> None:
    tokens = login_by_code(issuer, scope="openid", nonce="n", audience="another")
    assert verify(issuer, tokens["id_token"], "cli")["nonce"] == "n"
    assert verify(issuer, tokens["access_token"], "another")["sub"] == "alice"
    code = authorize(issuer, scope="openid")["code"]
    redeem = {
        "grant_type": "authorization_code",
        "code": code,
        "client_id": "cli",
        "redirect_uri": "http://127.0.0.1:1/cb",
    }
    assert issuer.request("POST", "/token", {**redeem, "code_verifier": "w" * 43})[1]["error"] == "invalid_grant"
    assert authorize(issuer, scope="openid", code_challenge_method="plain")["error"] == "invalid_request"
    query = urllib.parse.urlencode(
        {"response_type": "code", "client_id": "cli", "redirect_uri": "https://evil.example"}
    )
    assert issuer.request("GET", f"/authorize?{query}")[0] == 400


def authorize(issuer: Issuer, **changes: str) -> dict[str, str]:
    """Log alice in with a browser that posts the page, and return what the redirect carries."""
    query = {
        "response_type": "code",
        "client_id": "cli",
        "redirect_uri": "http://127.0.0.1:1/cb",
        "state": "s",
        "code_challenge": CHALLENGE,
        "code_challenge_method": "S256",
        **changes,
    }
    answer = {"user": "alice", "action": "approve"}
    status, url = issuer.request("POST", f"/authorize?{urllib.parse.urlencode(query)}", answer)
    assert status == 303
    carried = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))
    assert carried["state"] == "s"
    return carried


def login_by_code(issuer: Issuer, **changes: str) -> dict[str, str]:
    """Return the tokens of a complete login."""
    form = {
        "grant_type": "authorization_code",
        "code": authorize(issuer, **changes)["code"],
        "client_id": "cli",
        "redirect_uri": "http://127.0.0.1:1/cb",
        "code_verifier": VERIFIER,
    }
    status, tokens = issuer.request("POST", "/token", form)
    assert status == 200, json.dumps(tokens)
    return dict(tokens)


class Prover:
    """A client with a key, as RFC 9449 has it; what it makes can be changed."""

    def __init__(self, issuer: Issuer) -> None:
        self.issuer = issuer
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.jwk = jwt.algorithms.ECAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
        members = {name: self.jwk[name] for name in ("crv", "kty", "x", "y")}
        canonical = json.dumps(members, separators=(",", ":"), sort_keys=True).encode()
        self.thumbprint = base64.urlsafe_b64encode(hashlib.sha256(canonical).digest()).rstrip(b"=").decode()
        self.serial = 0

    def proof(self, typ: str = "dpop+jwt", **changes: object) -> dict[str, str]:
        self.serial += 1
        claims = {
            "htm": "POST",
            "htu": f"{self.issuer.url}/token",
            "iat": int(time.time()),
            "jti": f"{self.thumbprint}{self.serial}",
        }
        header = {"typ": typ, "jwk": self.jwk}
        return {"DPoP": jwt.encode({**claims, **changes}, self.key, algorithm="ES256", headers=header)}


def refreshable(issuer: Issuer, headers: dict[str, str]) -> tuple[int, Any]:
    """Log in on another device, and redeem that with these headers."""
    issuer.settings(device_interval=0)
    begun = issuer.request("POST", "/device_authorization", {"client_id": "cli", "scope": "openid offline_access"})[1]
    issuer.approve(begun["user_code"])
    poll = {"grant_type": DEVICE_GRANT, "device_code": begun["device_code"], "client_id": "cli"}
    return issuer.request("POST", "/token", poll, headers)


@pytest.mark.parametrize(
    ("typ", "changes"),
    [
        ("JWT", {}),
        ("dpop+jwt", {"htm": "GET"}),
        ("dpop+jwt", {"htu": "https://elsewhere/token"}),
        ("dpop+jwt", {"iat": 1}),
        ("dpop+jwt", {"jti": ""}),
    ],
)
def test_a_wrong_dpop_proof(issuer: Issuer, typ: str, changes: dict[str, object]) -> None:
    issuer.settings(dpop="on")
    assert refreshable(issuer, Prover(issuer).proof(typ, **changes))[1]["error"] == "invalid_dpop_proof"


def test_dpop_proofs_and_nonces_are_used_once(issuer: Issuer) -> None:
    issuer.settings(dpop="on")
    prover = Prover(issuer)
    headers = prover.proof()
    assert refreshable(issuer, headers)[0] == 200
    assert refreshable(issuer, headers)[1]["error"] == "invalid_dpop_proof"
    issuer.settings(dpop_nonce=True)
    nonces = []
    for nonce in (None, "foreign"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            issuer._opener.open(
                urllib.request.Request(
                    f"{issuer.url}/token", b"client_id=cli", prover.proof(nonce=nonce) if nonce else prover.proof()
                )
            )
        with caught.value as answer:
            assert json.load(answer)["error"] == "use_dpop_nonce"
            nonces.append(answer.headers["DPoP-Nonce"])
    assert refreshable(issuer, prover.proof(nonce=nonces[0]))[1]["error"] == "use_dpop_nonce"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_it_signs_for_no_stranger(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--state", str(tmp_path / "issuer"), "--host", host])
    assert ended.value.code == 2
    assert "ssh -N -L" in capsys.readouterr().err

"""The issuer signs what it is asked to, serves the usual grants, and fails as it is told to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
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
from tests.support.issuer_server import ACTIONS_SECRET
from tests.support.world import fixed_port

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
VERIFIER = "v" * 43
CHALLENGE = base64.urlsafe_b64encode(hashlib.sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with Issuer(tmp_path_factory.mktemp("issuer")) as issuer:
        yield issuer


@pytest.fixture
def issuer(shared: Issuer) -> Iterator[Issuer]:
    yield shared
    shared.settings(
        slow=0,
        down=False,
        lifetime=3600,
        clock_skew=0,
        access_audience="arcbridge-relay",
        device_interval=1,
        device_lifetime=600,
        refresh_rotation=True,
        auto_login="",
        dpop="off",
        dpop_nonce=False,
        nonce_at_refresh=False,
        resources=None,
    )


def verify(issuer: Issuer, token: str, audience: str) -> dict[str, Any]:
    """Verify a token by the published keys, as any relying party does."""
    _, jwks = issuer.request("GET", "/jwks")
    header = jwt.get_unverified_header(token)
    key = next(key for key in jwt.PyJWKSet.from_dict(jwks).keys if key.key_id == header["kid"])
    assert header["alg"] == key.algorithm_name
    return dict(jwt.decode(token, key, [key.algorithm_name], audience=audience, issuer=issuer.url))


def test_discovery_names_its_own_urls(issuer: Issuer) -> None:
    status, document = issuer.request("GET", "/.well-known/openid-configuration")
    assert status == 200
    assert document["issuer"] == issuer.url
    assert issuer.url.startswith("https://127.0.0.1:")
    assert all(
        value.startswith(issuer.url + "/") for name, value in document.items() if name.endswith(("_uri", "point"))
    )


@pytest.mark.parametrize("alg", ["RS256", "ES256"])
def test_minted_tokens_verify(issuer: Issuer, alg: str) -> None:
    claims = verify(issuer, issuer.mint(sub="bob", aud="x", lifetime=60, alg=alg), "x")
    assert claims["sub"] == "bob"
    assert claims["email"] == "bob@example.com"
    assert claims["email_verified"] is True
    assert claims["groups"] == ["developers"]
    assert claims["exp"] - claims["iat"] == 60
    claims = verify(
        issuer, issuer.mint(aud=["x", "y"], groups=["g"], claims={"email": None, "tenant": 7}, alg=alg), "y"
    )
    assert claims["groups"] == ["g"]
    assert claims["tenant"] == 7
    assert "email" not in claims


def test_tokens_that_must_be_refused(issuer: Issuer) -> None:
    with pytest.raises(jwt.ExpiredSignatureError):
        verify(issuer, issuer.mint(aud="x", lifetime=-60), "x")
    with pytest.raises(jwt.InvalidAudienceError):
        verify(issuer, issuer.mint(aud="y"), "x")
    with pytest.raises(jwt.InvalidSignatureError):
        verify(issuer, issuer.mint(aud="x", key="foreign"), "x")
    issuer.settings(clock_skew=7200)
    with pytest.raises(jwt.ImmatureSignatureError):
        verify(issuer, issuer.mint(aud="x"), "x")
    for alg in ("none", "HS256"):
        token = issuer.mint(alg=alg)
        assert jwt.get_unverified_header(token)["alg"] == alg
        assert (token.rpartition(".")[2] == "") == (alg == "none")
    assert jwt.get_unverified_header(issuer.mint(headers={"kid": None, "jku": "https://x"})).keys() == {
        "typ",
        "alg",
        "jku",
    }


def test_rotation_keeps_or_withdraws_the_old_keys(issuer: Issuer) -> None:
    before = issuer.mint(aud="x")
    kid = issuer.rotate()
    assert jwt.get_unverified_header(issuer.mint())["kid"] == kid
    assert verify(issuer, before, "x")
    assert verify(issuer, issuer.mint(aud="x", key="old"), "x")
    issuer.rotate(keep_old=False)
    with pytest.raises(StopIteration):
        verify(issuer, before, "x")
    with pytest.raises(StopIteration):
        verify(issuer, issuer.mint(aud="x", key=kid), "x")
    assert verify(issuer, issuer.mint(aud="x"), "x")


def test_down_slow_and_counted(issuer: Issuer) -> None:
    count = issuer.requests("/jwks")
    issuer.down()
    assert issuer.request("GET", "/jwks")[0] == 503
    issuer.down(False)
    assert issuer.request("GET", "/jwks")[0] == 200
    assert issuer.requests("/jwks") == count + 2
    issuer.slow(3600)
    assert issuer.mint()  # what tests ask for is not slowed down
    with pytest.raises(OSError, match="timed out"):
        issuer._opener.open(f"{issuer.url}/jwks", timeout=0.2)
    issuer.slow(0)
    assert issuer.request("GET", "/jwks")[0] == 200


def test_device_login(issuer: Issuer) -> None:
    issuer.settings(device_interval=0)
    status, begun = issuer.request(
        "POST", "/device_authorization", {"client_id": "cli", "scope": "openid offline_access"}
    )
    assert status == 200
    assert re.fullmatch("[A-Z]{4}-[A-Z]{4}", begun["user_code"])
    poll = {"grant_type": DEVICE_GRANT, "device_code": begun["device_code"], "client_id": "cli"}
    assert issuer.request("POST", "/token", poll) == (400, {"error": "authorization_pending", "error_description": ""})
    # The person opens the page with the code filled in, and answers it.
    path = begun["verification_uri_complete"].removeprefix(issuer.url)
    assert begun["user_code"] in issuer.request("GET", path)[1]
    issuer.request("POST", "/device", {"user_code": begun["user_code"], "user": "alice", "action": "approve"})
    status, tokens = issuer.request("POST", "/token", poll)
    assert status == 200
    assert verify(issuer, tokens["id_token"], "cli")["sub"] == "alice"
    assert verify(issuer, tokens["access_token"], "arcbridge-relay")["groups"] == ["platform"]
    assert issuer.request("POST", "/token", poll)[1]["error"] == "invalid_grant"


def test_device_login_denied_hurried_and_expired(issuer: Issuer) -> None:
    def begin() -> tuple[str, dict[str, str]]:
        _, begun = issuer.request("POST", "/device_authorization", {"client_id": "cli", "scope": "openid"})
        return begun["user_code"], {
            "grant_type": DEVICE_GRANT,
            "device_code": begun["device_code"],
            "client_id": "cli",
        }

    issuer.settings(device_interval=60)
    code, poll = begin()
    assert issuer.request("POST", "/token", poll)[1]["error"] == "authorization_pending"
    assert issuer.request("POST", "/token", poll)[1]["error"] == "slow_down"
    issuer.deny(code)
    assert issuer.request("POST", "/token", poll)[1]["error"] == "access_denied"
    issuer.settings(device_lifetime=0)
    code, poll = begin()
    assert issuer.request("POST", "/token", poll)[1]["error"] == "expired_token"
    issuer.settings(device_lifetime=60)
    code, poll = begin()
    issuer.approve(code.lower(), "bob")
    assert verify(issuer, issuer.request("POST", "/token", poll)[1]["id_token"], "cli")["sub"] == "bob"


def test_refresh_tokens_rotate_and_a_thief_ends_them(issuer: Issuer) -> None:
    first = login_by_code(issuer, scope="openid offline_access")["refresh_token"]
    refresh = {"grant_type": "refresh_token", "client_id": "cli", "refresh_token": first}
    status, tokens = issuer.request("POST", "/token", refresh)
    assert status == 200
    assert verify(issuer, tokens["id_token"], "cli")["sub"] == "alice"
    second = tokens["refresh_token"]
    assert second != first
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


def test_client_credentials_need_the_secret(issuer: Issuer) -> None:
    form = {"grant_type": "client_credentials", "client_id": "ci"}
    assert issuer.request("POST", "/token", form)[0] == 401
    assert issuer.request("POST", "/token", {**form, "client_id": "cli"})[1]["error"] == "unauthorized_client"
    status, tokens = issuer.request("POST", "/token", {**form, "client_secret": "ci-secret"})
    assert status == 200
    assert verify(issuer, tokens["access_token"], "arcbridge-relay")["sub"] == "ci"
    assert "id_token" not in tokens
    basic = {"Authorization": "Basic " + base64.b64encode(b"ci:ci-secret").decode()}
    assert issuer.request("POST", "/token", {"grant_type": "client_credentials"}, basic)[0] == 200


def test_users_can_be_added_and_userinfo_asked(issuer: Issuer) -> None:
    issuer.set_user("dora", groups=["new"])
    token = issuer.mint(sub="dora")
    assert verify(issuer, token, "arcbridge-relay")["groups"] == ["new"]
    status, answer = issuer.request("GET", "/userinfo", headers={"Authorization": f"Bearer {token}"})
    assert (status, answer["sub"]) == (200, "dora")
    assert issuer.request("GET", "/userinfo", headers={"Authorization": "Bearer x.y.z"})[0] == 401


def test_restart_keeps_url_ca_and_keys(tmp_path: Path) -> None:
    with Issuer(tmp_path, port=fixed_port(), lifetime=5) as issuer:
        url, token = issuer.url, issuer.mint(aud="x")
        assert issuer.settings().lifetime == 5
        issuer.stop()
        with pytest.raises(urllib.error.URLError):
            issuer.request("GET", "/jwks")
        issuer.restart()
        assert issuer.url == url
        assert verify(issuer, token, "x")
        assert {path.stat().st_mode & 0o077 for path in tmp_path.glob("*key*.pem")} == {0}


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


def test_dpop_binds_access_and_refresh_token(issuer: Issuer) -> None:
    assert "dpop_signing_alg_values_supported" not in issuer.request("GET", "/.well-known/openid-configuration")[1]
    issuer.settings(dpop="on")
    document = issuer.request("GET", "/.well-known/openid-configuration")[1]
    assert "ES256" in document["dpop_signing_alg_values_supported"]
    own, other = Prover(issuer), Prover(issuer)
    status, tokens = refreshable(issuer, own.proof())
    assert (status, tokens["token_type"]) == (200, "DPoP")
    assert verify(issuer, tokens["access_token"], "arcbridge-relay")["cnf"] == {"jkt": own.thumbprint}
    assert "cnf" not in verify(issuer, tokens["id_token"], "cli")
    form = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"], "client_id": "cli"}
    for headers in ({}, other.proof()):
        assert issuer.request("POST", "/token", form, headers)[1]["error"] == "invalid_grant"
    status, tokens = issuer.request("POST", "/token", form, own.proof())
    assert status == 200
    assert verify(issuer, tokens["access_token"], "arcbridge-relay")["cnf"] == {"jkt": own.thumbprint}
    # Without a proof there is no binding, unless it is required.
    assert refreshable(issuer, {})[1]["token_type"] == "Bearer"
    issuer.settings(dpop="required")
    assert refreshable(issuer, {})[1]["error"] == "invalid_dpop_proof"


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


def test_audiences_at_a_refresh_and_by_exchange(issuer: Issuer) -> None:
    tokens = refreshable(issuer, {})[1]
    form = {"grant_type": "refresh_token", "client_id": "cli"}
    status, narrowed = issuer.request(
        "POST", "/token", {**form, "refresh_token": tokens["refresh_token"], "resource": "arcbridge-a"}
    )
    assert status == 200
    assert verify(issuer, narrowed["access_token"], "arcbridge-a")["sub"] == "alice"
    plain = issuer.request("POST", "/token", {**form, "refresh_token": narrowed["refresh_token"]})[1]
    assert verify(issuer, plain["access_token"], "arcbridge-relay")
    exchange = {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token_type": "urn:ietf:params:oauth:token-type:access_token",
        "subject_token": plain["access_token"],
        "client_id": "cli",
        "audience": "arcbridge-b",
    }
    status, exchanged = issuer.request("POST", "/token", exchange)
    assert (status, exchanged["issued_token_type"]) == (200, exchange["subject_token_type"])
    assert exchanged.keys() & {"id_token", "refresh_token"} == set()
    assert verify(issuer, exchanged["access_token"], "arcbridge-b")["groups"] == ["platform"]
    issuer.settings(resources=["arcbridge-a"])
    assert issuer.request("POST", "/token", exchange)[1]["error"] == "invalid_target"
    wrong = {**exchange, "audience": "arcbridge-a", "subject_token": "x"}
    assert issuer.request("POST", "/token", wrong)[1]["error"] == "invalid_request"


def test_a_job_of_a_pipeline_asks_for_its_audience(issuer: Issuer) -> None:
    asked = "/actions?api-version=2.0&audience=arcbridge-relay"
    assert issuer.request("GET", asked)[0] == 401
    status, answer = issuer.request("GET", asked, headers={"Authorization": f"bearer {ACTIONS_SECRET}"})
    assert status == 200
    assert verify(issuer, answer["value"], "arcbridge-relay")["sub"].startswith("repo:")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_it_signs_for_no_stranger(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--state", str(tmp_path / "issuer"), "--host", host])
    assert ended.value.code == 2
    assert "ssh -N -L" in capsys.readouterr().err

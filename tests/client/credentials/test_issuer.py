"""The issuer as a login sees it: what is refused before a form is sent."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.credentials.client_authentication import ClientAuthentication
from arcbridge.client.credentials.issuer import Issuer, IssuerError, page_of
from arcbridge.client.credentials.jwt_unverified import claims_unverified
from arcbridge.errors import ConfigError, StateError, Unreachable
from arcbridge.identity.proof import ProofKey
from arcbridge.settings.config import LoginConfig
from tests.client.login_station import TokenEndpoint
from tests.support.issuer import Issuer as RealIssuer

CLIENT = {"client_id": "cli"}


def of(config: LoginConfig, **more: Any) -> Issuer:
    return Issuer(config, ClientAuthentication(config), **more)


def at(url: str, ca_file: Path | None = None) -> Issuer:
    return of(LoginConfig(issuer=url, ca_file=ca_file, **CLIENT))


@asynccontextmanager
async def asking(
    endpoint: TokenEndpoint, directory: Path, settings: dict[str, Any] | None = None, **more: Any
) -> AsyncIterator[Issuer]:
    async with endpoint.serving(directory, **(settings or {})) as config, of(config, **more) as issuer:
        yield issuer


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealIssuer]:
    with RealIssuer(tmp_path_factory.mktemp("issuer")) as issuer:
        yield issuer


async def test_discovery(real: RealIssuer) -> None:
    async with at(real.url, real.ca_file) as issuer:
        found = await issuer.endpoints()
        assert found.token.startswith(real.url)
        assert found.authorization
        assert found.device_authorization
        asked = real.requests("/.well-known/openid-configuration")
        assert await issuer.endpoints() is found
        assert real.requests("/.well-known/openid-configuration") == asked


async def test_another_spelling_of_the_issuer(real: RealIssuer) -> None:
    async with at(real.url + "/", real.ca_file) as issuer:
        with pytest.raises(ConfigError, match="trailing slash"):
            await issuer.endpoints()


async def test_an_oauth_error_has_its_word(real: RealIssuer) -> None:
    async with at(real.url, real.ca_file) as issuer:
        with pytest.raises(IssuerError) as caught:
            await issuer.ask({"grant_type": "refresh_token"})
        assert caught.value.code in ("invalid_grant", "invalid_request")


async def test_untrusted(real: RealIssuer) -> None:
    async with at(real.url) as issuer:
        with pytest.raises(Unreachable, match="--oidc-ca-file"):
            await issuer.endpoints()


async def test_down(real: RealIssuer) -> None:
    real.down()
    try:
        async with at(real.url, real.ca_file) as issuer:
            with pytest.raises(Unreachable, match="status 503"):
                await issuer.endpoints()
    finally:
        real.down(False)


async def test_no_listener() -> None:
    async with at("https://127.0.0.1:1") as issuer:
        with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1 cannot be reached \(connection refused\); check its"):
            await issuer.endpoints()


@pytest.mark.parametrize("url", ["http://issuer.example", "issuer.example", "https://", "file:///etc/passwd"])
def test_only_https(url: str) -> None:
    with pytest.raises(ConfigError, match="https"):
        at(url)


@pytest.mark.parametrize("url", ["https://127.0.0.1:0040443", "https://localhost:", "https://-h.example"])
def test_b36_an_issuer_without_an_origin_is_none(url: str) -> None:
    """Its origin was the same empty text as that of another issuer's page in such a spelling."""
    with pytest.raises(ConfigError, match=r"^login\.issuer: .* is not an https:// URL of a host"):
        at(url)


@pytest.mark.parametrize("name", ["authorization", "token", "device_authorization", "revocation"])
async def test_b31_b36_nothing_is_sent_to_another_origin_or_to_none(name: str, tmp_path: Path) -> None:
    endpoint = TokenEndpoint()
    for where, words in (
        ("https://login.example.org", f"names its {name}_endpoint at https://login.example.org, and accepted are"),
        ("https://127.0.0.1:0040443", f"^the issuer's {name}_endpoint cannot be used: "),
    ):
        endpoint.metadata = {f"{name}_endpoint": f"{where}/{name}"}
        async with asking(endpoint, tmp_path) as issuer:
            with pytest.raises(ConfigError, match=words):
                await issuer.ask({})
    assert endpoint.forms == []


@pytest.mark.parametrize(
    "url",
    ["https://user:SECRET@idp", "https://idp/?x=SECRET", "https://idp#SECRET", "http://SECRET@x", "https://[SECRET"],
)
async def test_o1_no_credentials_in_the_url(url: str) -> None:
    with pytest.raises(ConfigError, match=r"login\.issuer: ") as caught:
        at(url)
    assert "SECRET" not in caught.value.message


async def test_ca_files(tmp_path: Path) -> None:
    with pytest.raises(StateError):
        at("https://issuer.example", tmp_path / "none")
    (tmp_path / "ca").write_text("no certificate")
    with pytest.raises(ConfigError):
        at("https://issuer.example", tmp_path / "ca")


async def test_an_answer_that_is_nested_too_deep(tmp_path: Path) -> None:
    endpoint = TokenEndpoint()
    endpoint.text = 100000 * "["
    async with asking(endpoint, tmp_path) as issuer:
        with pytest.raises(Unreachable, match="status 502"):
            await issuer.ask({})


# -- DPoP (RFC 9449) --------------------------------------------------------------------------------------------------


GOOD: tuple[int, dict[str, object], str] = (200, {"access_token": "a"}, "")


def wants(nonce: str) -> tuple[int, dict[str, object], str]:
    return 400, {"error": "use_dpop_nonce"}, nonce


def claims_of(header: str | None) -> dict[str, object]:
    assert header is not None
    return claims_unverified(header)


async def test_a_nonce_is_used_until_another_one_comes(tmp_path: Path) -> None:
    endpoint = TokenEndpoint(wants("one"), GOOD, (200, {}, "two"), GOOD, GOOD)
    async with asking(endpoint, tmp_path, key=ProofKey.generate, clock=lambda: 1000.0) as issuer:
        for _ in range(4):
            await issuer.ask({})
    found = [claims_of(header) for header in endpoint.seen]
    assert [one.get("nonce") for one in found] == [None, "one", "one", "two", "two"]
    assert {(one["htm"], one["htu"], one["iat"]) for one in found} == {("POST", f"{endpoint.url}/token_endpoint", 1000)}
    assert len({one["jti"] for one in found}) == 5


async def test_each_attempt_has_an_assertion_of_its_own(tmp_path: Path) -> None:
    endpoint, program = TokenEndpoint(wants("one"), GOOD), "import uuid; print(uuid.uuid4())"
    command = (sys.executable, "-c", program)
    async with asking(endpoint, tmp_path, {"client_assertion_command": command}, key=ProofKey.generate) as issuer:
        await issuer.ask({"a": "b"})
    one, two = endpoint.forms
    assert one.pop("client_assertion") != two.pop("client_assertion")
    assert one == two


async def test_a_nonce_that_is_wanted_again_and_again_ends_in_an_error(tmp_path: Path) -> None:
    endpoint = TokenEndpoint(wants("one"), wants("two"), GOOD)
    async with asking(endpoint, tmp_path, key=ProofKey.generate) as issuer:
        with pytest.raises(IssuerError, match="use_dpop_nonce"):
            await issuer.ask({})
        assert len(endpoint.seen) == 2


@pytest.mark.parametrize("nonce", ["", "x" * 2000])
async def test_a_nonce_that_cannot_be_used_is_none(tmp_path: Path, nonce: str) -> None:
    endpoint = TokenEndpoint(wants(nonce), GOOD)
    async with asking(endpoint, tmp_path, key=ProofKey.generate) as issuer:
        with pytest.raises(IssuerError, match="use_dpop_nonce"):
            await issuer.ask({})
        await issuer.ask({})
    assert "nonce" not in claims_of(endpoint.seen[1])


@pytest.mark.parametrize("listed", [None, [], ["RS256"], "ES256", {"ES256": 1}])
async def test_without_es256_there_is_no_dpop(tmp_path: Path, listed: object) -> None:
    endpoint = TokenEndpoint(GOOD)
    endpoint.metadata = {"dpop_signing_alg_values_supported": listed}

    def key() -> ProofKey:
        raise AssertionError("no key is needed, so none is made")

    async with asking(endpoint, tmp_path, key=key) as issuer:
        await issuer.ask({})
    assert endpoint.seen == [None]


async def test_only_the_token_endpoint_gets_proofs(tmp_path: Path) -> None:
    endpoint = TokenEndpoint(GOOD, GOOD, GOOD)
    async with endpoint.serving(tmp_path) as config:
        async with of(config, key=ProofKey.generate) as issuer:
            await issuer.post((await issuer.endpoints()).device_authorization, {})
            await issuer.ask({})
        async with of(config) as issuer:  # without a key
            await issuer.ask({})
    assert [header is not None for header in endpoint.seen] == [False, True, False]


async def test_tokens_in_the_way_of_entra_id_are_asked_for_at_the_token_endpoint_alone(tmp_path: Path) -> None:
    key, endpoint = ProofKey.generate(), TokenEndpoint(GOOD, GOOD)
    endpoint.metadata = {}
    async with asking(endpoint, tmp_path, {"pop": True}, key=lambda: key) as issuer:
        await issuer.ask({"grant_type": "x"})
        await issuer.post((await issuer.endpoints()).device_authorization, {})
    assert endpoint.forms == [{"grant_type": "x", "token_type": "pop", "req_cnf": key.req_cnf(), **CLIENT}, CLIENT]


# -- what an issuer says ----------------------------------------------------------------------------------------------


async def test_an_issuer_s_words_are_one_short_line_from_the_start(tmp_path: Path) -> None:
    hostile = {"error": "x\x1b[2J\ny", "error_description": "do\r\nthis\u202e " + "z" * 4096}
    endpoint = TokenEndpoint((400, hostile, ""))
    async with asking(endpoint, tmp_path) as issuer:
        with pytest.raises(IssuerError) as caught:
            await issuer.ask({})
    error = caught.value
    assert error.code == "x\\x1b[2J\\ny"
    assert error.description.startswith("do\\r\\nthis\\u202e")
    for text in (error.code, error.description, error.words, str(error)):
        assert text.isprintable()
    assert len(error.words.encode()) < 300


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            1,
            "",
            "javascript:alert(1)",
            "https://",
            "https://[x",
            "https://a/\x1b[2J",
            "https://a/ b",
            "https://ä",
        ),
        f"https://a/{'x' * 2048}",
    ],
)
def test_what_is_no_page_for_a_browser(value: object) -> None:
    assert page_of(value) == ""


def test_a_page_for_a_browser() -> None:
    assert page_of("https://login.example.org/device?user_code=AB-CD") == (
        "https://login.example.org/device?user_code=AB-CD"
    )

"""The issuer as a login sees it: what is refused before a form is sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from arcbridge.client.issuer import Issuer, IssuerError
from arcbridge.errors import ConfigError, StateError, Unreachable
from tests.support.issuer import Issuer as RealIssuer


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealIssuer]:
    with RealIssuer(tmp_path_factory.mktemp("issuer")) as issuer:
        yield issuer


async def test_discovery(real: RealIssuer) -> None:
    async with Issuer(real.url, real.ca_file) as issuer:
        found = await issuer.endpoints()
        assert found.token.startswith(real.url)
        assert found.authorization
        assert found.device_authorization
        asked = real.requests("/.well-known/openid-configuration")
        assert await issuer.endpoints() is found
        assert real.requests("/.well-known/openid-configuration") == asked


async def test_another_spelling_of_the_issuer(real: RealIssuer) -> None:
    async with Issuer(real.url + "/", real.ca_file) as issuer:
        with pytest.raises(ConfigError, match="trailing slash"):
            await issuer.endpoints()


async def test_an_oauth_error_has_its_word(real: RealIssuer) -> None:
    async with Issuer(real.url, real.ca_file) as issuer:
        with pytest.raises(IssuerError) as caught:
            await issuer.post((await issuer.endpoints()).token, {"grant_type": "refresh_token", "client_id": "cli"})
        assert caught.value.code in ("invalid_grant", "invalid_request")


async def test_untrusted(real: RealIssuer) -> None:
    async with Issuer(real.url) as issuer:
        with pytest.raises(Unreachable, match="--oidc-ca-file"):
            await issuer.endpoints()


async def test_down(real: RealIssuer) -> None:
    real.down()
    try:
        async with Issuer(real.url, real.ca_file) as issuer:
            with pytest.raises(Unreachable, match="status 503"):
                await issuer.endpoints()
    finally:
        real.down(False)


async def test_no_listener() -> None:
    async with Issuer("https://127.0.0.1:1") as issuer:
        with pytest.raises(Unreachable, match="cannot be reached"):
            await issuer.endpoints()


@pytest.mark.parametrize("url", ["http://issuer.example", "issuer.example", "https://", "file:///etc/passwd"])
async def test_only_https(url: str) -> None:
    with pytest.raises(ConfigError, match="https"):
        Issuer(url)


async def test_ca_files(tmp_path: Path) -> None:
    with pytest.raises(StateError):
        Issuer("https://issuer.example", tmp_path / "none")
    (tmp_path / "ca").write_text("no certificate")
    with pytest.raises(ConfigError):
        Issuer("https://issuer.example", tmp_path / "ca")

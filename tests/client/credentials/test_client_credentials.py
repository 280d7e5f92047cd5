"""Tokens of a program, from a real issuer: one for each audience, kept in memory, never for another end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.credentials.client_credentials import WRONG_KEPT, ClientCredentials
from arcbridge.client.credentials.jwt_unverified import claims_unverified, read_unverified
from arcbridge.errors import ConfigError, Unauthenticated
from arcbridge.identity.proof import binding
from arcbridge.settings.config import LoginConfig
from tests.support.issuer import Issuer


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with Issuer(tmp_path_factory.mktemp("issuer"), dpop="on") as issuer:
        yield issuer


def make(
    issuer: Issuer,
    directory: Path,
    *,
    secret: str = "ci-secret",
    clock: Callable[[], float] = time.time,
    **settings: Any,
) -> ClientCredentials:
    file = directory / "secret"
    file.write_text(secret)
    given: dict[str, Any] = {
        "client_id": "ci",
        "client_secret_file": file,
        "audience": "arcbridge-relay",
        "cluster_audience": "arcbridge-{cluster}",
        **settings,
    }
    config = LoginConfig(issuer=issuer.url, ca_file=issuer.ca_file, grant_type="client-credentials", **given)
    return ClientCredentials(config, clock=clock)


BY_SCOPE: dict[str, Any] = {
    "audience": "",
    "relay_scopes": ("audience:arcbridge-relay",),
    "cluster_audience_by": "scope",
    "cluster_scopes": ("audience:{audience}",),
}


@pytest.mark.parametrize("more", [{}, BY_SCOPE])
async def test_each_end_has_its_own_and_keeps_it(issuer: Issuer, tmp_path: Path, more: dict[str, Any]) -> None:
    pair = make(issuer, tmp_path, **more)
    asked = issuer.requests("/token")
    tokens = await pair.tokens(interactive=False)
    one = await pair.for_audience("arcbridge-a", interactive=False)
    assert read_unverified(tokens.access_token).audiences == ("arcbridge-relay",)
    assert read_unverified(one.access_token).audiences == ("arcbridge-a",)
    for token in (tokens.access_token, one.access_token):
        assert pair.key is not None
        assert binding(claims_unverified(token)).names(pair.key.thumbprint)
    assert issuer.requests("/token") == asked + 2
    assert not list(tmp_path.glob("*.json")), "nothing is written"


async def test_an_audience_that_was_not_asked_for_is_not_handed_out(issuer: Issuer, tmp_path: Path) -> None:
    pair = make(issuer, tmp_path, **{**BY_SCOPE, "cluster_scopes": ("audience:arcbridge-relay",)})
    asked = issuer.requests("/token")
    for _ in range(2):
        with pytest.raises(ConfigError, match="arcbridge-a has another audience"):
            await pair.for_audience("arcbridge-a", interactive=False)
    assert issuer.requests("/token") == asked + 1, "the same answer would come again"


async def test_an_issuer_that_was_set_up_for_the_audience_is_asked_within_a_minute(
    issuer: Issuer, tmp_path: Path
) -> None:
    wrong = {**BY_SCOPE, "cluster_scopes": ("audience:arcbridge-relay",), "dpop": False}
    now = time.time()
    pair = make(issuer, tmp_path, clock=lambda: now, **wrong)
    asked = issuer.requests("/token")
    for later in (0, 0, WRONG_KEPT):
        now += later
        with pytest.raises(ConfigError, match="arcbridge-a has another audience"):
            await pair.for_audience("arcbridge-a", interactive=False)
    assert issuer.requests("/token") == asked + 2


async def test_without_dpop_there_is_no_key(issuer: Issuer, tmp_path: Path) -> None:
    pair = make(issuer, tmp_path, dpop=False)
    assert (await pair.tokens(interactive=False)).access_token
    assert pair.key is None


async def test_a_wrong_secret(issuer: Issuer, tmp_path: Path) -> None:
    with pytest.raises(Unauthenticated, match=r"gives the client ci no token \(invalid_client") as caught:
        await make(issuer, tmp_path, secret="WRONG").tokens(interactive=False)
    assert "WRONG" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"client_secret_file": None}, "needs the credentials of the client"),
        ({"client_id": ""}, r"login\.client_id"),
        ({"cluster_audience_by": "exchange"}, "cluster_audience_by: must be one of resource, audience, scope"),
    ],
)
def test_settings_that_cannot_work(issuer: Issuer, tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make(issuer, tmp_path, **settings)

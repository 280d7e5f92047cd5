"""What each command of the client is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from arcbridge.client.credentials.client_credentials import ClientCredentials
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.errors import ConfigError, Unauthenticated
from arcbridge.settings.config import ClientConfig, LoginConfig


def test_clusters_are_canonical_and_named_once(tmp_path: Path) -> None:
    config = ClientConfig(cluster="prod", clusters=("test", "prod", ""))
    context = ClientContext(config, Terminal(), environment={"HOME": str(tmp_path)})
    assert context.clusters() == ["prod", "test"]
    for wrong, words in (
        (replace(config, cluster="UPPER"), "flag --cluster: 'UPPER'"),
        (ClientConfig(), "--cluster NAME"),
    ):
        with pytest.raises(ConfigError, match=words):
            ClientContext(wrong, Terminal(), environment={"HOME": str(tmp_path)}).clusters()


def test_a_programs_tokens_need_no_login(tmp_path: Path) -> None:
    login = LoginConfig(
        issuer="https://login.example.org",
        client_id="ci",
        client_secret_file=tmp_path / "secret",
        grant_type="client-credentials",
    )
    config = ClientConfig(relay="https://relay.example.org", relay_ca_pin=f"sha256:{64 * '0'}", login=login)
    context = ClientContext(config, Terminal(), environment={"HOME": str(tmp_path)})
    assert isinstance(context.tokens._pair, ClientCredentials)
    with pytest.raises(ConfigError, match="client-credentials has no login"):
        context.login()


@pytest.mark.parametrize(
    ("login", "token", "words"),
    [
        (LoginConfig(), "", "no login is configured; run `arcbridge login https://RELAY`"),
        (LoginConfig(), "t", "--token and --token-file are for the cluster"),
        (LoginConfig(issuer="https://i", client_id="c"), "", "run `arcbridge login"),
    ],
)
def test_a_login_that_is_missing_is_found_without_the_network(
    tmp_path: Path, login: LoginConfig, token: str, words: str
) -> None:
    relay = "https://relay.example.org" if login.issuer else ""
    context = ClientContext(
        ClientConfig(relay=relay, login=login), Terminal(), token=token, environment={"HOME": str(tmp_path)}
    )
    with pytest.raises(Unauthenticated) as caught:
        context.require_login()
    assert words in caught.value.message

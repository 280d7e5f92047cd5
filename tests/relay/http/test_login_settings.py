"""What a relay tells clients about where they log in."""

import json

import pytest

from arcbridge.client.credentials import audience_parameters
from arcbridge.errors import ConfigError
from arcbridge.relay.http.api import STRANGERS
from arcbridge.relay.http.login_settings import login_document
from arcbridge.settings.choices import AUDIENCE_BY
from arcbridge.settings.config import RelayLoginConfig
from tests.relay.api_station import Relay, error

LOGIN = RelayLoginConfig(
    issuer="https://login.example.org", client_id="arcbridge", cluster_audience="arcbridge-{cluster}"
)


def test_the_document() -> None:
    assert login_document(LOGIN) == {
        "issuer": "https://login.example.org",
        "client_id": "arcbridge",
        "scopes": ["openid", "profile", "email", "offline_access"],
        "audience": "",
        "cluster_audience": "arcbridge-{cluster}",
        "cluster_audience_by": "resource",
        "cluster_scopes": [],
        "relay_scopes": [],
        "issuer_origins": [],
        "grant_types": ["authcode", "device-code"],
        "dpop": True,
    }
    assert login_document(RelayLoginConfig()) is None


def test_the_words_are_those_of_the_client() -> None:
    assert {*audience_parameters.BY_PARAMETER, audience_parameters.BY_SCOPE, audience_parameters.BY_EXCHANGE} == set(
        AUDIENCE_BY
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"client_id": "x"}, "login.issuer: required"),
        (
            {"client_id": "x", "issuer": "https://login.example.org:"},
            "login.issuer: 'https://login.example.org:' is not",
        ),
        ({"issuer": "https://a.example"}, "login.client_id: required"),
        (
            {"issuer": "http://a.example", "client_id": "x"},
            "login.issuer: .* is not an https:// URL .*; clients refuse it",
        ),
        ({"issuer": "https://u:p@a.example", "client_id": "x"}, "login.issuer: an issuer's URL has no user info"),
        ({"issuer": "https://[a.example", "client_id": "x"}, "login.issuer: it is not an https:// URL; clients"),
        ({"issuer": "https://a.example", "client_id": "x", "grant_types": ("password",)}, "login.grant_types: each"),
        ({"issuer": "https://a.example", "client_id": "x", "grant_types": ()}, "login.grant_types: each"),
        (
            {"issuer": "https://a", "client_id": "x", "cluster_audience": "c"},
            "login.cluster_audience: must have {cluster}",
        ),
        ({"issuer": "https://a.example", "client_id": "x", "cluster_audience_by": "luck"}, "cluster_audience_by: must"),
        ({"issuer": "https://a.example", "client_id": "x", "cluster_scopes": ("a",)}, "cluster_scopes: needs"),
        (
            {
                "issuer": "https://a",
                "client_id": "x",
                "cluster_audience": "c-{cluster}",
                "cluster_audience_by": "scope",
            },
            "login.relay_scopes: required",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_settings(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        login_document(RelayLoginConfig(**settings))
    assert "u:p" not in caught.value.message


async def test_a_relay_tells_it_without_a_credential(login_relay: Relay) -> None:
    status, answer, headers = await login_relay.call("GET", "/v1/login")
    assert status == 200
    assert answer == json.loads(json.dumps(login_document(LOGIN)))
    assert headers["Cache-Control"] == "no-store"


async def test_a_relay_without_the_settings_says_what_to_do(relay: Relay) -> None:
    status, answer, _ = await relay.call("GET", "/v1/login")
    assert (status, error(answer)[0]) == (404, "not_found")
    assert "give --oidc-issuer-url" in error(answer)[1]


async def test_l6_it_is_limited_as_each_request_without_a_credential(login_relay: Relay) -> None:
    for _ in range(STRANGERS):
        assert (await login_relay.call("GET", "/v1/login"))[0] == 200
    status, answer, headers = await login_relay.call("GET", "/v1/login")
    assert (status, error(answer)[0]) == (429, "rate_limited")
    assert int(headers["Retry-After"]) >= 1

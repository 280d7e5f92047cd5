"""The lines that a person compares at a first login, and the flags with which a script says the same."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from arcbridge.client.credentials.login_question import Line, flags, layout, login_lines
from arcbridge.client.relay.relay_profile import SETTINGS, LoginOffer, RelayProfile
from arcbridge.settings.config import LoginConfig

PIN = "sha256:" + "a" * 64
DOCUMENT: dict[str, Any] = {"issuer": "https://login.example.org", "client_id": "arcbridge"}
HOSTILE: dict[str, Any] = {
    **DOCUMENT,
    "client_id": "corp-admin-cli",
    "issuer_origins": ["https://login.corp.example"],
    "scopes": ["openid", "payroll.admin"],
    "audience": "payroll",
    "cluster_audience": "https://graph.corp.example/{cluster}",
    "cluster_audience_by": "scope",
    "cluster_scopes": ["graph.all"],
    "relay_scopes": ["payroll.write"],
    "grant_types": ["device-code"],
    "dpop": False,
}


def in_force(document: dict[str, Any]) -> dict[str, Any]:
    return RelayProfile(("https://relay.example.org:443",), LoginOffer.read(document)).in_force


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in ("issuer", "grant_types")])
def test_b41_whatever_a_relay_names_changes_a_line(name: str) -> None:
    """Also what `LoginConfig` gets one day: each name in SETTINGS has to be in HOSTILE."""
    assert set(SETTINGS) <= set(HOSTILE)
    base = {**DOCUMENT, "cluster_audience": "c-{cluster}"}
    assert login_lines(in_force(base)) != login_lines(in_force({**base, name: HOSTILE[name]}))


def test_b41_all_of_it_is_there_in_80_columns() -> None:
    text = layout([Line("relay's CA", PIN), *login_lines(in_force(HOSTILE))], 80)
    assert max(map(len, text)) <= 80
    assert text == [
        "  relay's CA",
        f"    {PIN}",
        '  log in at           "https://login.example.org"',
        '  issuer also at      "https://login.corp.example"',
        '  as client           "corp-admin-cli"',
        '  scopes              "openid" "payroll.admin"',
        '  relay\'s audience    "payroll"',
        '  relay\'s scopes      "payroll.write"',
        '  clusters\' audience  "https://graph.corp.example/{cluster}", asked for by',
        '                      "scope"',
        '  clusters\' scopes    "graph.all"',
        "  you log in          by a code for another device, without the browser: the",
        "                      issuer's id token is then bound to no key",
        "  bound to a key      no: a copy of a token is as good as the token",
    ]


@pytest.mark.parametrize("width", [1, 44, 60, 80])
def test_a_value_of_any_length_keeps_its_line(width: int) -> None:
    """No value pushes another one off the screen's right edge, or looks like a line of its own."""
    text = layout([Line("as client", "x" * 512), Line("scopes", "openid " * 64)], width)
    assert max(map(len, text)) <= max(width, 44)
    assert [line.split()[0] for line in text if not line.startswith("    ")] == ["as", "scopes"]


def test_what_was_trusted_before_stands_before_what_is_new() -> None:
    lines = login_lines(in_force({**DOCUMENT, "audience": "payroll"}), in_force(DOCUMENT))
    assert [line for line in lines if line.before] == [
        Line("relay's audience", '"payroll"', "none; the issuer decides")
    ]
    assert '  relay\'s audience    none; the issuer decides → "payroll"' in layout(lines, 80)


def test_b31_a_further_origin_of_the_issuer_is_shown_and_none_is_not() -> None:
    more = {**DOCUMENT, "issuer_origins": ["https://login.corp.example"]}
    labels = [line.label for line in login_lines(in_force(DOCUMENT), in_force(DOCUMENT))]
    assert "issuer also at" not in labels
    assert '  issuer also at      none → "https://login.corp.example"' in layout(
        login_lines(in_force(more), in_force(DOCUMENT)), 80
    )
    assert '  issuer also at      "https://login.corp.example" → none' in layout(
        login_lines(in_force(DOCUMENT), in_force(more)), 80
    )


class TestFlags:
    def test_b41_what_is_beyond_the_defaults(self) -> None:
        offer = LoginOffer.read(HOSTILE)
        assert set(offer.beyond(LoginConfig(), {})) == {*SETTINGS, "grant_type"}
        words = shlex.split(" ".join(flags(offer.beyond(LoginConfig(), {}))))
        assert words == [
            *("--oidc-issuer-url", "https://login.example.org", "--oidc-client-id", "corp-admin-cli"),
            *("--oidc-audience", "payroll", "--cluster-audience", "https://graph.corp.example/{cluster}"),
            *("--cluster-audience-by", "scope", "--oidc-scope", "openid", "--oidc-scope", "payroll.admin"),
            *("--relay-scope", "payroll.write", "--cluster-scope", "graph.all"),
            *("--issuer-origin", "https://login.corp.example", "--grant-type", "device-code"),
        ]

    def test_what_is_given_or_no_more_than_a_default_is_not(self) -> None:
        offer = LoginOffer.read({**DOCUMENT, "scopes": ["openid"], "grant_types": ["authcode"]})
        assert offer.beyond(LoginConfig(issuer=DOCUMENT["issuer"], client_id="arcbridge"), {}) == {}
        assert offer.beyond(LoginConfig(), {"client_id": "mine"}) == {"issuer": DOCUMENT["issuer"]}
        device = LoginOffer.read({**DOCUMENT, "grant_types": ["device-code"]})
        assert "grant_type" not in device.beyond(LoginConfig(grant_type="authcode"), {})

    def test_a_value_cannot_be_another_flag(self) -> None:
        assert flags({"client_id": "--trust-first-use", "audience": "a;reboot"}) == [
            "--oidc-client-id=--trust-first-use",
            "--oidc-audience 'a;reboot'",
        ]

"""What is kept of a relay that was logged in at, and what it adds to the settings."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arcbridge.cli.parser import parse
from arcbridge.cli.settings import load_settings
from arcbridge.client.relay.relay_profile import (
    LoginOffer,
    RelayProfile,
    RelayProfiles,
    fill,
    has_login,
    login_command,
    organisation,
    own_settings,
)
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ConfigError, StateError
from arcbridge.net.address import parse_address
from arcbridge.settings.config import ClientConfig, LoginConfig
from tests.client.far_side import OTHER_CA, RELAY_CA

DOCUMENT: dict[str, Any] = {
    "issuer": "https://login.example.org/realms/example",
    "client_id": "arcbridge",
    "scopes": ["openid", "arcbridge-relay"],
    "audience": "arcbridge-relay",
    "cluster_audience": "arcbridge-{cluster}",
    "cluster_audience_by": "scope",
    "cluster_scopes": ["openid"],
    "relay_scopes": ["openid", "arcbridge-relay"],
    "grant_types": ["device-code"],
    "dpop": True,
    "of_a_later_version": [1],
}
OFFER = LoginOffer.read(DOCUMENT)
PROFILE = RelayProfile(
    ("https://relay.example.org:443", "https://b.example.org:8443"),
    OFFER,
    ca_pin=RELAY_CA.pin,
    ca_pem=RELAY_CA.certificate_pem,
    logged_in_at=1000.0,
)
SECOND = RelayProfile(
    ("https://relay.example.net:8443",),
    LoginOffer.read({"issuer": "https://login.example.net", "client_id": "cli"}),
    logged_in_at=2000.0,
)


def test_a_gateway_has_nothing_of_a_login(tmp_path: Path) -> None:
    """Its callers bring their tokens: it refused the issuer of the last login, which no setting named."""
    RelayProfiles(tmp_path).save(PROFILE)
    words = ["--state-dir", str(tmp_path)]
    assert load_settings(parse([*words, "clusters"], "client"), {}).login.issuer == OFFER.issuer
    assert load_settings(parse([*words, "gateway"], "client"), {}).login == LoginConfig()


@pytest.fixture
def profiles(tmp_path: Path) -> RelayProfiles:
    return RelayProfiles(tmp_path)


class TestOffer:
    def test_what_a_relay_says(self) -> None:
        assert OFFER.grants == ("device-code",)
        assert LoginOffer.read(OFFER.document()) == OFFER

    def test_defaults_are_those_of_the_settings(self) -> None:
        login = LoginConfig(issuer="https://login.example.net", client_id="cli")
        assert SECOND.login.settings == LoginOffer.of(login).settings

    @pytest.mark.parametrize(
        "change",
        [
            {"issuer": ""},
            {"issuer": "http://login.example.org"},
            {"issuer": "https://user@login.example.org"},
            {"issuer": "https://login.example.org/@user"},
            {"issuer": "https://login.example.org/?x=y"},
            {"issuer": "https://l\u043egin.example.org"},
            {"issuer": "https://login.example.org\n"},
            {"issuer": 70000},
            {"client_id": ""},
            {"client_id": "a b"},
            {"scopes": "openid"},
            {"scopes": ["openid profile"]},
            {"scopes": ["s"] * 65},
            {"audience": "a" * 513},
            {"dpop": "yes"},
            {"issuer": "https://login.example.org:"},
            {"issuer": "https://login.example.org:000443"},
            {"issuer": "https://-login.example.org"},
            {"cluster_audience_by": "x" * 20},
            {"grant_types": "device-code"},
        ],
        ids=str,
    )
    def test_b24_anything_else_is_refused_and_never_quoted(self, change: dict[str, Any]) -> None:
        with pytest.raises(ConfigError) as caught:
            LoginOffer.read({**DOCUMENT, **change})
        assert str(next(iter(change.values()))) not in caught.value.message or change in (
            {"issuer": ""},
            {"client_id": ""},
        )

    def test_b41_a_relay_names_one_audience_for_each_cluster(self) -> None:
        """What was kept, and what the user gives, may be otherwise."""
        one = {**DOCUMENT, "cluster_audience": "https://graph.corp.example"}
        with pytest.raises(ConfigError, match=r"cluster_audience: has no \{cluster\} in it") as caught:
            LoginOffer.read_from_relay(one)
        assert "graph" not in caught.value.message
        assert LoginOffer.read_from_relay(DOCUMENT) == OFFER
        assert LoginOffer.read_from_relay({**DOCUMENT, "cluster_audience": ""})
        assert LoginOffer.read(one).settings["cluster_audience"] == "https://graph.corp.example"

    def test_b24_a_relay_cannot_weaken_a_login(self, profiles: RelayProfiles) -> None:
        """It may name where one logs in, and nothing of how tokens are used."""
        hostile = {"one_token": True, "command": ["sh"], "ca_file": "/tmp/ca", "require_bound": False, "workload": "x"}
        profiles.save(replace(PROFILE, login=LoginOffer.read({**DOCUMENT, **hostile})))
        login = fill(ClientConfig(login=LoginConfig(require_bound=True)), profiles)[0].login
        assert not login.one_token
        assert not login.command
        assert login.ca_file is None
        assert login.require_bound
        assert not login.workload

    def test_differences(self) -> None:
        assert OFFER.differs(LoginOffer.read({**DOCUMENT, "grant_types": []})) == []
        assert OFFER.differs(LoginOffer.read({**DOCUMENT, "client_id": "x", "dpop": False})) == ["client_id", "dpop"]


class TestKept:
    def test_what_was_saved_is_found(self, profiles: RelayProfiles) -> None:
        assert profiles.all() == []
        saved = profiles.save(PROFILE)
        assert profiles.all() == [saved]
        assert profiles.get(parse_address("b.example.org:8443")) == saved
        assert profiles.get(parse_address("c.example.org")) is None
        assert stat.S_IMODE(saved.directory.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in saved.directory.iterdir()} == {0o600}

    def test_the_last_login_comes_first(self, profiles: RelayProfiles) -> None:
        first, second = profiles.save(PROFILE), profiles.save(SECOND)
        assert profiles.all() == [second, first]
        profiles.save(replace(first, logged_in_at=3000.0))
        assert [one.url for one in profiles.all()] == ["https://relay.example.org", "https://relay.example.net:8443"]

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"relays": [], "logged_in_at": 0}', "\udcff"], ids=range(6))
    def test_a_damaged_one(self, profiles: RelayProfiles, text: str) -> None:
        directory = profiles.save(PROFILE).directory
        (directory / "profile.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(StateError, match="is damaged: remove it, and log in again"):
            profiles.all()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("scopes", ("openid profile groups",)),
            ("relay_scopes", ("openid", "s" * 513)),
            ("client_id", "a b"),
            ("audience", "f\u00fcr"),
            ("scopes", ("s",) * 65),
        ],
        ids=["space", "long", "two words", "letters", "many"],
    )
    def test_what_could_not_be_read_again_is_not_kept(self, profiles: RelayProfiles, name: str, value: Any) -> None:
        """One such setting made the profile a damaged one for every command."""
        saved = profiles.save(PROFILE)
        named = rf"^login\.{name}: must be .*printable ASCII without a space, of at most 512 characters$"
        with pytest.raises(ConfigError, match=named):
            profiles.save(replace(saved, own={name: value}))
        with pytest.raises(ConfigError, match=named):
            profiles.save(replace(saved, login=replace(OFFER, settings={**OFFER.settings, name: value})))
        assert profiles.all() == [saved]

    def test_an_issuer_without_tls_is_not_told_of_words(self, profiles: RelayProfiles) -> None:
        settings = {**OFFER.settings, "issuer": "http://login.example.org"}
        with pytest.raises(ConfigError) as caught:
            profiles.save(replace(PROFILE, login=replace(OFFER, settings=settings)))
        words = "must be an https:// URL of a host, without an @, a query, a fragment or an empty port"
        assert caught.value.message == f"login.issuer: {words}"

    def test_what_the_user_gave_is_read_as_it_was_saved(self, profiles: RelayProfiles) -> None:
        own = {"scopes": ("openid", "groups"), "redirect_port": 0, "proof_key_file": Path("/k"), "audience": ""}
        saved = profiles.save(replace(PROFILE, own=own))
        assert saved.own == own
        assert profiles.all() == [saved]

    @pytest.mark.parametrize(
        "own",
        [[], {"issuer": "x"}, {"scopes": "s"}, {"redirect_port": "1"}, {"proof_key_file": 1}, {"client_id": 1}],
        ids=str,
    )
    def test_damaged_settings_of_the_user(self, profiles: RelayProfiles, own: object) -> None:
        file = profiles.save(PROFILE).directory / "profile.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "own": own}))
        with pytest.raises(StateError, match="is damaged"):
            profiles.all()

    def test_a_half_written_one_is_none(self, profiles: RelayProfiles) -> None:
        (profiles.save(PROFILE).directory / "profile.json").unlink()
        assert profiles.all() == []


class TestFill:
    def test_nothing_is_named(self, profiles: RelayProfiles) -> None:
        assert fill(ClientConfig(), profiles)[0] == ClientConfig()
        saved = profiles.save(PROFILE)
        config, fit = fill(ClientConfig(), profiles)
        assert fit == [saved]
        assert config.relay_urls() == PROFILE.relays
        assert (config.relay_ca_pin, config.relay_ca_file) == (RELAY_CA.pin, saved.directory / "ca.pem")
        assert {name: getattr(config.login, name) for name in OFFER.settings} == OFFER.settings
        assert config.login.grant_type == "device-code", "the only way that the relay offers"

    def test_several(self, profiles: RelayProfiles) -> None:
        first, second = profiles.save(PROFILE), profiles.save(SECOND)
        assert fill(ClientConfig(), profiles)[1] == [second, first]
        for named in ("https://relay.example.org", "relay.example.org", "https://b.example.org:8443", "b.example.org"):
            assert fill(ClientConfig(relays=(named,)), profiles)[1] == [first], named
        assert fill(ClientConfig(relay="relay.example.net"), profiles)[1] == [second]

    def test_another_relay_gets_nothing_of_these(self, profiles: RelayProfiles) -> None:
        """Above all no tokens of another organisation's login."""
        profiles.save(PROFILE)
        for relays in (("https://evil.example",), ("https://relay.example.org", "https://evil.example")):
            config = ClientConfig(relays=relays)
            assert fill(config, profiles)[0] == config

    def test_what_is_set_goes_before(self, profiles: RelayProfiles, tmp_path: Path) -> None:
        profiles.save(PROFILE)
        files = LoginConfig(access_token_file=tmp_path / "a", id_token_file=tmp_path / "b")
        config = fill(ClientConfig(login=files, relay_ca_pin=OTHER_CA.pin), profiles)[0]
        assert config.login == files
        assert (config.relay_ca_pin, config.relay_ca_file) == (OTHER_CA.pin, None)
        secret = tmp_path / "secret"
        pipeline = LoginConfig(
            issuer=OFFER.issuer, client_id="ci", grant_type="client-credentials", client_secret_file=secret
        )
        pinned = ClientConfig(relays=PROFILE.relays, relay_ca_pin=RELAY_CA.pin, login=pipeline)
        for given in (ClientConfig(login=pipeline), pinned):
            login = fill(given, profiles)[0].login
            assert (login.issuer, login.client_id, login.audience) == (OFFER.issuer, "ci", "arcbridge-relay")
            assert (login.grant_type, login.client_secret_file) == ("client-credentials", secret)
        elsewhere = replace(pipeline, issuer="https://login.example.net")
        named = ClientConfig(relays=PROFILE.relays, login=elsewhere)
        assert fill(named, profiles)[0].login == elsewhere, "it is not the issuer of that relay"

    @pytest.mark.parametrize(
        "credential",
        [
            {"client_secret_file": Path("/s")},
            {"client_key_file": Path("/k")},
            {"client_assertion_file": Path("/a")},
            {"client_assertion_command": ("sh",)},
            {"client_assertion_workload": "kubernetes"},
        ],
        ids=str,
    )
    def test_b37_an_issuer_that_a_relay_named_gets_no_credentials(
        self, profiles: RelayProfiles, credential: dict[str, Any]
    ) -> None:
        profiles.save(PROFILE)
        with pytest.raises(ConfigError, match=rf"^login\.{next(iter(credential))}: is for one issuer, and these"):
            fill(ClientConfig(login=LoginConfig(client_id="a-client", **credential)), profiles)

    def test_b38_another_issuer_gets_no_redirect_path(self) -> None:
        """Nor further origins: what the settings say beside one issuer is for that one."""
        login = LoginConfig(
            issuer="https://login.example.net", redirect_path="/", issuer_origins=("https://o.example",)
        )
        assert own_settings(login, OFFER) == {}
        assert own_settings(replace(login, issuer=OFFER.issuer), OFFER) == {
            "redirect_path": "/",
            "issuer_origins": ("https://o.example",),
        }

    def test_settings_that_lack_nothing_are_not_even_compared(self, profiles: RelayProfiles) -> None:
        (profiles.save(PROFILE).directory / "profile.json").write_text("{")
        whole = ClientConfig(relay="r", relay_ca_pin=RELAY_CA.pin, login=LoginConfig(access_token_file=Path("/a")))
        assert has_login(whole.login)
        assert fill(whole, profiles)[0] == whole


def test_the_command_that_logs_in(profiles: RelayProfiles) -> None:
    profiles.save(PROFILE)
    config = fill(ClientConfig(), profiles)[0]
    assert login_command(config, profiles) == "arcbridge login https://relay.example.org"
    own = ClientConfig(relay="r.example:8443", login=LoginConfig(issuer="https://i.example", client_id="c"))
    assert login_command(own, profiles) == (
        "arcbridge login https://r.example:8443 --oidc-issuer-url https://i.example --oidc-client-id c"
    )


def test_the_file_is_for_people_too(profiles: RelayProfiles) -> None:
    document = json.loads((profiles.save(PROFILE).directory / "profile.json").read_text())
    assert document["login"]["issuer"] == OFFER.issuer
    assert document["relays"] == list(PROFILE.relays)


@pytest.mark.parametrize(
    "more",
    [
        {"scopes": ["a"] * 21},
        {"cluster_scopes": ["a"] * 21},
        {"scopes": ["x" * 100] * 6, "relay_scopes": ["x" * 100] * 6},
        {"audience": "x" * 512, "client_id": "x" * 512},
    ],
)
def test_b48_a_relay_names_no_more_than_a_person_can_compare(more: dict[str, Any]) -> None:
    document = {"issuer": "https://login.example.org", "client_id": "arcbridge", **more}
    LoginOffer.read(document)  # what a user gave by flags may be longer
    with pytest.raises(ConfigError, match="which no reader can compare"):
        LoginOffer.read_from_relay(document)


def test_b42_which_relays_are_one_organisation(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state", tmp_path / "cache")

    def of(**relay: Any) -> str:
        return organisation(ClientConfig(**relay), state)

    ca, both = tmp_path / "ca.pem", tmp_path / "both.pem"
    ca.write_text(f"# Müller\n{RELAY_CA.certificate_pem}")
    both.write_text(RELAY_CA.certificate_pem + OTHER_CA.certificate_pem)
    a, b = "https://a.example", "https://b.example"
    assert of(relays=(a,)) != of(relays=(b,))
    assert of(relays=(a, b)) == of(relay=a)
    # The pin names the organisation, however it was given and whichever relay of it is asked.
    pinned = of(relays=(a,), relay_ca_pin=RELAY_CA.pin)
    assert pinned == of(relays=(b,), relay_ca_pin=RELAY_CA.pin.upper().replace("SHA", "sha"))
    assert pinned == of(relays=(a,), relay_ca_file=ca)
    assert pinned not in (of(relays=(a,)), of(relays=(a,), relay_ca_pin=OTHER_CA.pin))
    assert of(relays=(a,), relay_ca_file=both) == of(relays=(a,))
    # So does the profile of relays with a certificate of a public CA.
    offer = LoginOffer.of(LoginConfig(issuer="https://i.example", client_id="c"))
    RelayProfiles(state.path).save(RelayProfile((f"{a}:443", f"{b}:443"), offer))
    assert of(relays=(b,)) == of(relays=(a,))
    with pytest.raises(ConfigError, match="relays: required, because a login is for one organisation's relays"):
        of()

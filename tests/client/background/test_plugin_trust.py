"""Which flags of a kubeconfig the credential plugin takes, where `connect` has not written them."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcbridge.client.background.connection_settings import ConnectionSettings, read_words
from arcbridge.client.background.connections import Connections
from arcbridge.client.background.plugin_trust import refuse_untrusted
from arcbridge.client.relay.relay_profile import LoginOffer, RelayProfile, RelayProfiles
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.pki.authority import Authority
from tests.client.background.conftest import Background

PIN = "sha256:" + "a" * 64
ISSUER = "https://login.example.org"


class Home:
    """A user who has logged in at one relay."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {"XDG_CONFIG_HOME": str(path / "config"), "XDG_STATE_HOME": str(path / "state")}
        ca = Authority.create("relay CA")
        self.pin = ca.pin
        offer = LoginOffer.read({"issuer": ISSUER, "client_id": "cli"})
        RelayProfiles(path / "state" / "arcbridge").save(
            RelayProfile(("https://r.example:443",), offer, ca_pin=ca.pin, ca_pem=ca.certificate_pem, logged_in_at=1.0)
        )

    def settings(self, text: str) -> Path:
        file = self.path / "config" / "arcbridge" / "client.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o600)
        return file

    def ask(self, *words: str) -> None:
        refuse_untrusted(read_words(("--cluster", "prod", *words)), self.environment)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--relay", "https://evil.example"), "relays"),
        (("--relay", "https://r.example", "--relay", "https://evil.example"), "relays"),
        (("--relay-ca-pin", PIN), "relay_ca_pin"),
        (("--access-token-file", "/home/me/.other-org-token"), "login.access_token_file"),
        (("--id-token-file", "/home/me/.token"), "login.id_token_file"),
        (("--token-file", "/home/me/.token"), "token_file"),
        (("--oidc-issuer-url", "https://evil.example", "--oidc-client-id", "x"), "login.issuer"),
        (("--oidc-client-id=x",), "login.client_id"),
        (("--oidc-audience", "payroll"), "login.audience"),
        (("--cluster-ca-pin", PIN), "cluster_ca_pin"),
        (("--trust-first-use",), "trust_first_use"),
        (("--state-dir", "/tmp/evil"), "state_dir"),
    ],
)
def test_b49_a_strangers_flags_are_refused(home: Home, words: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=r"which `connect` has not written here") as caught:
        home.ask(*words)
    assert named in caught.value.message.partition(", which ")[0]
    assert "evil" not in caught.value.message.replace("/tmp/evil", "")


def test_b49_the_same_as_is_trusted_is_taken(home: Home) -> None:
    home.ask()
    home.ask("--relay", "https://r.example")
    home.ask("--relay", "https://r.example:443", "--oidc-client-id", "cli", "--relay-ca-pin", home.pin)
    home.ask("--port", "4711", "--kube-context", "mine", "--no-resumption")
    home.settings('relay = "https://own.example"\n[login]\naccess_token_file = "/a"\nid_token_file = "/b"\n')
    home.ask("--relay", "https://own.example", "--access-token-file", "/a")
    other = home.path / "other.toml"
    other.write_text('relay = "https://third.example"\n')
    other.chmod(0o600)
    home.ask("--config", str(other), "--relay", "https://third.example")


def test_b49_tokens_of_the_settings_do_not_go_to_another_relay_that_is_known(home: Home) -> None:
    home.settings('relay = "https://own.example"\n[login]\naccess_token_file = "/a"\nid_token_file = "/b"\n')
    with pytest.raises(ConfigError, match=r"set login\.issuer"):
        home.ask("--relay", "https://r.example")


async def test_b49_what_connect_has_written_goes_on_to_work(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ConnectionSettings] = []

    def refuse(settings: ConnectionSettings, *_: object) -> None:
        asked.append(settings)
        raise ConfigError("another person's")

    monkeypatch.setattr("arcbridge.client.background.clusters.refuse_untrusted", refuse)
    async with background.running():
        with pytest.raises(ArcbridgeError, match="another person's"):
            await background.ask("credential", *background.arguments)
        assert Connections(Path(background.place.connections)).all() == []
        assert asked == [background.settings]
        await background.connect()
        await background.ask("credential", *background.arguments)
    async with background.running():
        await background.ask("credential", *background.arguments)
    assert len(asked) == 1

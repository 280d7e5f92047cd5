"""IdentitySummary is logged in, read from what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jwt
import pytest

from arcbridge.client.credentials import proof_keys
from arcbridge.client.credentials.identity_summary import IdentitySummary, cache_of, other_logins, summary_of, user_name
from arcbridge.client.credentials.token_cache import TokenSet
from arcbridge.client.relay.relay_profile import LoginOffer, RelayProfile, RelayProfiles, apply
from arcbridge.client.state import StateDirectory
from arcbridge.errors import StateError, Unauthenticated
from arcbridge.settings.config import ClientConfig, LoginConfig

NOW = 1_800_000_000.0
LOGIN = LoginConfig(issuer="https://login.example.org", client_id="cli")
CONFIG = ClientConfig(relays=("https://relay.example.org",), login=LOGIN)


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory(tmp_path / "state", tmp_path / "cache")


def token(**claims: object) -> str:
    return jwt.encode({"sub": "alice", "exp": int(NOW) + 600, **claims}, "k" * 32, "HS256")


def keep(state: StateDirectory, **tokens: object) -> None:
    cache_of(CONFIG, state).save(TokenSet(obtained_at=NOW, **tokens))


def test_no_login(state: StateDirectory) -> None:
    with pytest.raises(Unauthenticated, match="you are not logged in; run `arcbridge login https://RELAY`"):
        summary_of(ClientConfig(), state)
    with pytest.raises(Unauthenticated, match=r"not logged in at https://login.example.org; run `arcbridge login"):
        summary_of(CONFIG, state)


def test_a_login(state: StateDirectory) -> None:
    keep(state, id_token=token(email="a@example.com"), access_token=token(), expires_at=NOW + 600, refresh_token="r")
    found = summary_of(CONFIG, state, now=NOW)
    assert found == IdentitySummary(
        "a@example.com", "alice", LOGIN.issuer, "https://relay.example.org", NOW + 600, renews=True, key=""
    )


def test_its_groups_are_those_of_the_token_and_bounded(state: StateDirectory) -> None:
    groups = [*(f"group-{number}" for number in range(500))]
    keep(state, id_token=token(groups=["platform", 7, *groups]), expires_at=NOW + 600)
    found = summary_of(CONFIG, state, now=NOW).groups
    assert found[:2] == ("platform", "group-0")
    assert len(found) < 300
    keep(state, id_token=token(groups="none"), expires_at=NOW + 600)
    assert summary_of(CONFIG, state, now=NOW).groups == ()


def test_b42_each_organisation_has_tokens_of_its_own(state: StateDirectory) -> None:
    other = replace(CONFIG, relays=("https://relay.example.net",))
    assert cache_of(CONFIG, state).path != cache_of(other, state).path


def test_its_end(state: StateDirectory) -> None:
    keep(state, id_token=token(exp=int(NOW) - 1), expires_at=NOW - 1)
    with pytest.raises(Unauthenticated, match=r"the login at https://login.example.org has ended; run"):
        summary_of(CONFIG, state, now=NOW)
    keep(state, id_token=token(exp=int(NOW) - 1), expires_at=NOW - 1, refresh_token="r")
    assert summary_of(CONFIG, state, now=NOW).renews


def test_the_key(state: StateDirectory) -> None:
    key = proof_keys.load_or_make(cache_of(CONFIG, state).key_path)
    for claims in ({"cnf": {"jkt": key.thumbprint}}, {"nonce": key.nonce()}, {"aud": [key.audience()]}):
        keep(state, access_token=token(**claims), expires_at=NOW + 600)
        assert summary_of(CONFIG, state, now=NOW).key == key.thumbprint, claims
    # A nonce of another kind, and of another key.
    for nonce in ("random", proof_keys.load_or_make(state.path / "other.key").nonce()):
        keep(state, access_token=token(nonce=nonce), expires_at=NOW + 600)
        assert summary_of(CONFIG, state, now=NOW).key == ""


def test_a_key_that_cannot_be_used_is_not_the_lack_of_one(state: StateDirectory) -> None:
    file = cache_of(CONFIG, state).key_path
    keep(state, access_token=token(nonce=proof_keys.load_or_make(file).nonce()), expires_at=NOW + 600)
    file.chmod(0o644)
    with pytest.raises(StateError, match="other users may read the key"):
        summary_of(CONFIG, state, now=NOW)


def test_another_relays_login_that_is_damaged_hides_none(state: StateDirectory) -> None:
    profiles = RelayProfiles(state.path)
    for name in ("damaged", "good"):
        offer = LoginOffer({"issuer": LOGIN.issuer, "client_id": LOGIN.client_id})
        profile = profiles.save(RelayProfile((f"https://{name}.example.org",), offer, logged_in_at=NOW))
        cache = cache_of(apply(ClientConfig(), profile), state)
        nonce = proof_keys.load_or_make(cache.key_path).nonce()
        cache.save(TokenSet(access_token=token(nonce=nonce), obtained_at=NOW, expires_at=NOW * 2))
        if name == "damaged":
            cache.key_path.chmod(0o644)
    warnings: list[str] = []
    (found,) = other_logins(CONFIG, state, warnings.append)
    assert found.relay == "https://good.example.org"
    (said,) = warnings
    assert said.startswith("the login at https://damaged.example.org cannot be read: other users may read the key")


def test_other_sources(state: StateDirectory, tmp_path: Path) -> None:
    file = tmp_path / "access"
    config = ClientConfig(login=LoginConfig(access_token_file=file))
    with pytest.raises(Unauthenticated, match="does not exist"):
        summary_of(config, state)
    file.write_text(token(preferred_username="ann", iss="https://i.example"))
    found = summary_of(config, state, now=NOW)
    assert (found.user, found.issuer, found.source) == ("ann", "https://i.example", "files")
    with pytest.raises(Unauthenticated, match="has expired; put a new one there"):
        summary_of(config, state, now=NOW + 601)
    with pytest.raises(StateError, match="cannot read the token file"):
        summary_of(ClientConfig(login=LoginConfig(id_token_file=tmp_path)), state)
    assert summary_of(ClientConfig(login=LoginConfig(command=("sso",))), state).source == "command"
    assert summary_of(ClientConfig(login=LoginConfig(workload="kubernetes")), state).source == "workload"
    program = LoginConfig(issuer="https://i.example", client_id="ci", grant_type="client-credentials")
    found = summary_of(ClientConfig(login=program), state)
    assert (found.user, found.source, found.renews) == ("ci", "client-credentials", True)


def test_names() -> None:
    claims = {"email": "a@example.com", "preferred_username": "ann", "sub": "1"}
    assert user_name(claims) == "a@example.com"
    assert user_name({**claims, "email_verified": False}) == "ann"
    assert user_name({"email": 5, "sub": "1"}) == "1"
    assert user_name({}) == ""

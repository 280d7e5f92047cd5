"""Whom a login trusts, and its end at the issuer; the questions at a terminal are tests/cli/test_login.py's."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.commands.first_contact import ask_relay
from arcbridge.client.commands.sign_in import revoke, trusted, with_profile
from arcbridge.client.credentials.token_cache import TokenSet
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relay_profile import RelayProfiles
from arcbridge.errors import ConfigError, PinMismatch, StateError, Unreachable
from arcbridge.pki.authority import Authority
from arcbridge.pki.rotation import Rotation
from arcbridge.settings.config import ClientConfig, LoginConfig
from tests.relay.api_station import Relay, serving
from tests.support.issuer import Issuer
from tests.support.world import fixed_port

ISSUER = "https://login.example.org"
DOCUMENT: dict[str, Any] = {"issuer": ISSUER, "client_id": "arcbridge"}


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Relay]:
    (tmp_path / "relay").mkdir()
    async with serving(tmp_path / "relay", dict(DOCUMENT)) as relay:
        yield relay


class Person:
    """Who answers each question alike, and what was asked."""

    def __init__(self, state: Path, answer: bool = True) -> None:
        self.profiles = RelayProfiles(state)
        self.answer = answer
        self.questions: list[str] = []
        self.told: list[str] = []

    async def ask(self, question: str) -> bool:
        self.questions.append(question)
        return self.answer

    async def trust(
        self, relay: Relay | None, *, renew: bool = False, named: Collection[str] = (), **settings: Any
    ) -> Any:
        relays = () if relay is None else (f"127.0.0.1:{relay.port}",)
        config = ClientConfig(relays=relays, **settings)
        say = self.told.append
        return await trusted(config, self.profiles, relays, ask=self.ask, say=say, renew=renew, named=named)

    async def script(self, relay: Relay, login: LoginConfig | None = None, **more: Any) -> Any:
        """Log in where nothing can be asked, with the pin of the relay's CA."""
        relays = (f"127.0.0.1:{relay.port}",)
        config = ClientConfig(relays=relays, relay_ca_pin=relay.authority.pin, login=login or LoginConfig())
        return await trusted(config, self.profiles, relays, ask=None, say=self.told.append, **more)


@pytest.fixture
def person(tmp_path: Path) -> Person:
    return Person(tmp_path / "state")


async def test_b21_the_user_is_asked_once(person: Person, relay: Relay) -> None:
    profile = await person.trust(relay)
    assert len(person.questions) == 1
    assert relay.authority.pin in person.questions[0]
    assert "login.example.org" in person.questions[0]
    assert await person.trust(relay) == profile
    assert await person.trust(None) == profile, "the one that is known"
    assert len(person.questions) == 1
    assert profile.logged_in_at == 0


async def test_each_part_that_is_given_is_not_asked_for(person: Person, relay: Relay, tmp_path: Path) -> None:
    await person.trust(relay, relay_ca_pin=relay.authority.pin)
    assert '  log in at           "https://login.example.org"\n' in person.questions[-1]
    given = LoginConfig(issuer=ISSUER, client_id="arcbridge")
    await person.trust(relay, renew=True, login=given)
    assert len(person.questions) == 1, "nothing is new"
    other = Person(tmp_path / "other")
    profile = await other.trust(relay, login=given, relay_ca_pin=relay.authority.pin)
    assert other.questions == []
    assert profile.from_relay, "the relay names the same"
    config = with_profile(ClientConfig(login=replace(given, dpop=False)), profile)
    assert (config.login.issuer, config.login.client_id, config.login.dpop) == (ISSUER, "arcbridge", False)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("client_id", "corp-admin-cli", 'as client           "corp-admin-cli"'),
        ("scopes", ["openid", "payroll.admin"], 'scopes              "openid" "payroll.admin"'),
        ("audience", "payroll", 'relay\'s audience    "payroll"'),
        ("relay_scopes", ["payroll.admin"], 'relay\'s scopes      "payroll.admin"'),
        (
            "cluster_audience",
            "https://graph.corp.example/{cluster}",
            'clusters\' audience  "https://graph.corp.example/{cluster}"',
        ),
        ("cluster_scopes", ["payroll.admin"], 'clusters\' scopes    "payroll.admin"'),
        ("dpop", False, "bound to a key      no: a copy of a token"),
        ("grant_types", ["device-code"], "you log in          by a code for another device, without the browser"),
    ],
)
async def test_b41_pin_and_issuer_do_not_agree_to_the_rest(
    person: Person, tmp_path: Path, name: str, value: object, line: str
) -> None:
    (tmp_path / "odd").mkdir()
    async with serving(tmp_path / "odd", {**DOCUMENT, name: value}) as relay:
        own = LoginConfig(issuer=ISSUER, client_id="" if name == "client_id" else "arcbridge")
        await person.trust(relay, relay_ca_pin=relay.authority.pin, login=own)
    (question,) = person.questions
    assert f"  {line}" in question
    assert max(map(len, question.splitlines())) <= 80


async def test_b41_a_script_gives_what_the_relay_names(person: Person, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    odd = {**DOCUMENT, "audience": "payroll", "cluster_scopes": ["a", "b"], "cluster_audience": "c-{cluster}"}
    async with serving(tmp_path / "odd", {**odd, "grant_types": ["device-code"], "dpop": False}) as relay:
        with pytest.raises(PinMismatch) as caught:
            await person.script(relay, LoginConfig(issuer=ISSUER))
        assert (
            "\n  --oidc-client-id arcbridge --oidc-audience payroll --cluster-audience 'c-{cluster}' --cluster-scope a "
            "--cluster-scope b --grant-type device-code\n"
        ) in caught.value.message
        assert person.profiles.all() == []
        given = LoginConfig(
            issuer=ISSUER, client_id="arcbridge", audience="payroll", cluster_audience="c-{cluster}",
            cluster_scopes=("a", "b"), grant_type="device-code",
        )  # fmt: skip
        profile = await person.script(relay, given)
        assert (profile.from_relay, profile.in_force["dpop"]) == (True, True)


async def test_b41_taking_back_a_flag_is_no_consent(person: Person, tmp_path: Path) -> None:
    """What the user gave went before the relay's word, to which the user has not agreed."""
    (tmp_path / "odd").mkdir()
    async with serving(tmp_path / "odd", {**DOCUMENT, "audience": "payroll"}) as relay:
        await person.trust(relay, login=LoginConfig(audience="mine"))
        assert "payroll" not in person.questions[0]
        person.answer = False
        for change in ({"named": {"audience"}}, {"renew": True}):
            with pytest.raises(PinMismatch, match="was not trusted"):
                await person.trust(relay, **change)
            assert '  relay\'s audience    "mine" → "payroll"\n' in person.questions[-1]
        assert person.profiles.all()[0].own == {"audience": "mine"}


async def test_b42_another_relay_with_the_same_client_is_named(person: Person, relay: Relay, tmp_path: Path) -> None:
    await person.trust(relay)
    assert "good at" not in person.questions[-1]
    (tmp_path / "second").mkdir()
    async with serving(tmp_path / "second", dict(DOCUMENT)) as second:
        await person.trust(second)
        assert f"will get tokens that are good at https://127.0.0.1:{relay.port}," in " ".join(
            person.questions[-1].split()
        )
        await person.trust(second, renew=True)
        assert len(person.questions) == 2, "it is not named beside itself"


@pytest.mark.parametrize(
    ("before", "after", "words", "shown"),
    [
        ({"cluster_audience": "c-{cluster}", "audience": "relay"}, {"audience": "relay"}, "--cluster-audience ''",
         "clusters' audience \"c-{cluster}\", asked for by \"resource\" → none: every cluster"),
        ({"cluster_scopes": ["a"], "cluster_audience": "c-{cluster}"}, {"cluster_audience": "c-{cluster}"},
         "--cluster-scope ''", "clusters' scopes \"a\" → none"),
        ({}, {"scopes": ["openid"]}, "--oidc-scope openid", '"offline_access" → "openid"'),
    ],
)  # fmt: skip
async def test_b46_what_a_relay_leaves_out_is_asked_for_too(
    person: Person, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], words: str, shown: str
) -> None:
    """A login without an audience for each cluster is weaker, and no default says that it is meant."""
    (tmp_path / "odd").mkdir()
    said = {**DOCUMENT, **before}
    async with serving(tmp_path / "odd", said) as relay:
        kept = await person.trust(relay)
        said.clear()
        said.update({**DOCUMENT, **after})
        person.answer = False
        with pytest.raises(PinMismatch, match="was not trusted"):
            await person.trust(relay, renew=True)
        assert shown in " ".join(person.questions[-1].split())
        with pytest.raises(PinMismatch) as caught:
            await person.script(relay, renew=True)
        assert f"\n  {words}\n" in caught.value.message
        assert person.profiles.all() == [kept]
        (name,) = {*before, *after} - {one for one in before if before[one] == after.get(one)}
        value = tuple(after[name]) if name in after else () if name == "cluster_scopes" else ""
        profile = await person.script(relay, LoginConfig(**{name: value}), renew=True, named={name})
        assert profile.in_force[name] == value


async def test_b47_the_warning_is_said_where_nothing_is_asked(person: Person, relay: Relay, tmp_path: Path) -> None:
    """Whatever the client id: the audiences say where a token is good."""
    await person.trust(relay)
    (tmp_path / "second").mkdir()
    async with serving(tmp_path / "second", {**DOCUMENT, "client_id": "other"}) as second:
        given = LoginConfig(issuer=ISSUER, client_id="other")
        await person.trust(second, login=given, relay_ca_pin=second.authority.pin)
    assert len(person.questions) == 1
    assert f"will get tokens that are good at https://127.0.0.1:{relay.port}, too" in person.told[-1]


async def test_b47_a_settings_file_does_not_pass_over_the_relays_issuer(person: Person, relay: Relay) -> None:
    own = LoginConfig(issuer="https://own.example", client_id="mine", audience="a")
    person.answer = False
    with pytest.raises(PinMismatch, match="nothing was sent to"):
        await person.trust(relay, relay_ca_pin=relay.authority.pin, login=own)
    assert "Log in there? [y/N]" in person.questions[-1]
    assert person.profiles.all() == []
    person.answer = True
    await person.trust(relay, relay_ca_pin=relay.authority.pin, login=own)
    assert [one.login.issuer for one in person.profiles.all()] == ["https://own.example"]


async def test_the_users_own_issuer_goes_before_the_relays(person: Person, relay: Relay) -> None:
    own = LoginConfig(issuer="https://own.example", client_id="mine", audience="a")
    profile = await person.trust(relay, relay_ca_pin=relay.authority.pin, login=own, named={"issuer"})
    assert person.questions == []
    assert (
        'names the issuer "https://login.example.org", and your settings name "https://own.example"' in person.told[0]
    )
    assert not profile.from_relay
    assert with_profile(ClientConfig(login=own), profile).login == own
    with pytest.raises(ConfigError, match=r"login\.client_id: required"):
        await person.trust(relay, renew=True, login=LoginConfig(issuer="https://third.example"))


async def test_a_ca_that_contradicts_what_is_kept(person: Person, relay: Relay, tmp_path: Path) -> None:
    await person.trust(relay)
    other = Authority.create("x")
    with pytest.raises(PinMismatch, match="--renew-trust"):
        await person.trust(relay, relay_ca_pin=other.pin)
    (tmp_path / "ca.pem").write_text(other.certificate_pem)
    with pytest.raises(PinMismatch, match=r"flag --relay-ca-file: sha256:.* is not the pin that was trusted"):
        await person.trust(relay, relay_ca_file=tmp_path / "ca.pem")
    (tmp_path / "ca.pem").write_text(relay.authority.certificate_pem)
    assert (await person.trust(relay, relay_ca_file=tmp_path / "ca.pem")).ca_pin == relay.authority.pin


@pytest.mark.parametrize("by", ["pin", "file"])
async def test_a_ca_that_is_given_for_a_relay_with_a_public_one(
    person: Person, relay: Relay, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts from then on, and one by which the relay is not known is refused."""
    (tmp_path / "public.pem").write_text(relay.authority.certificate_pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "public.pem"))
    profile = await person.trust(relay)
    assert profile.ca_pin == ""
    other = Authority.create("x")
    (tmp_path / "other.pem").write_text(other.certificate_pem)
    wrong: dict[str, Any] = {"relay_ca_pin": other.pin} if by == "pin" else {"relay_ca_file": tmp_path / "other.pem"}
    with pytest.raises(PinMismatch):
        await person.trust(relay, **wrong)
    assert person.profiles.all() == [profile]
    right: dict[str, Any] = (
        {"relay_ca_pin": relay.authority.pin} if by == "pin" else {"relay_ca_file": tmp_path / "public.pem"}
    )
    pinned = await person.trust(relay, **right)
    assert (pinned.ca_pin, pinned.ca_pem) == (relay.authority.pin, relay.authority.certificate_pem)
    assert person.profiles.all() == [pinned]
    with pytest.raises(PinMismatch, match="--renew-trust"):
        await person.trust(relay, **wrong)


async def test_a_ca_that_cannot_be_checked_is_not_kept(
    person: Person, relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "public.pem").write_text(relay.authority.certificate_pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "public.pem"))
    profile = await person.trust(relay)
    gone = replace(profile, relays=("https://127.0.0.1:9",))
    person.profiles.save(gone)
    config = ClientConfig(relays=gone.relays, relay_ca_pin=relay.authority.pin)
    with pytest.raises(Unreachable):
        await trusted(config, person.profiles, gone.relays, ask=person.ask, say=person.told.append)
    assert [one.ca_pin for one in person.profiles.all()] == [""]


async def test_what_a_second_login_gives_is_kept(person: Person, relay: Relay, tmp_path: Path) -> None:
    first = await person.trust(relay)
    key = tmp_path / "key.jwk"
    own = LoginConfig(
        issuer=ISSUER, client_id="mine", audience="a", cluster_audience="b-{cluster}", redirect_port=0,
        scopes=("openid",), proof_key_file=key,
    )  # fmt: skip
    await person.trust(relay, login=own)
    again = await person.trust(relay)  # without a flag
    assert len(person.questions) == 1
    assert (again.login, again.from_relay) == (first.login, True)
    later = with_profile(ClientConfig(), person.profiles.all()[0]).login
    assert later == replace(own, ca_file=None)
    # One more setting, and the others stay; a flag of a later command goes before all of them.
    await person.trust(relay, login=LoginConfig(audience="c"))
    later = with_profile(ClientConfig(login=LoginConfig(client_id="flag")), person.profiles.all()[0]).login
    assert (later.client_id, later.audience, later.cluster_audience) == ("flag", "c", "b-{cluster}")
    # Another issuer has nothing of them, and neither has trust that is renewed.
    await person.trust(relay, login=LoginConfig(issuer="https://own.example", client_id="c"))
    assert with_profile(ClientConfig(), person.profiles.all()[0]).login.audience == ""
    await person.trust(relay, renew=True)
    assert with_profile(ClientConfig(), person.profiles.all()[0]).login.client_id == "arcbridge"


async def test_what_cannot_be_kept_is_told_before_the_user_is_asked(person: Person, relay: Relay) -> None:
    odd = LoginConfig(scopes=("openid profile groups",))
    with pytest.raises(ConfigError, match=r"^login\.scopes: must be a list of at most 64 words"):
        await person.trust(relay, login=odd)
    assert person.questions == []
    profile = await person.trust(relay)
    with pytest.raises(ConfigError, match=r"^login\.scopes: must be a list of at most 64 words"):
        await person.trust(relay, login=odd)
    assert person.profiles.all() == [profile]


async def test_what_the_relay_names_takes_back_what_was_kept(person: Person, relay: Relay) -> None:
    """The next command logs in, and looks for the tokens, as this login did."""
    own = LoginConfig(client_id="other", audience="a", scopes=("openid",), grant_type="device-code")
    await person.trust(relay, login=own)
    profile = await person.trust(relay, login=LoginConfig(client_id="arcbridge"))
    assert profile.own == {"audience": "a", "scopes": ("openid",)}
    assert with_profile(ClientConfig(), person.profiles.all()[0]).login.client_id == "arcbridge"
    # A flag that gives a default is told from a flag that is not there.
    profile = await person.trust(relay, named={"audience", "scopes", "grant_type"})
    assert (profile.own, profile.grant_type) == ({}, "auto")
    assert person.profiles.all() == [profile]
    assert with_profile(ClientConfig(), profile).login.audience == ""


async def test_without_a_relay_the_settings_decide(person: Person) -> None:
    assert await person.trust(None, login=LoginConfig(issuer=ISSUER, client_id="c")) is None
    assert with_profile(ClientConfig(), None) == ClientConfig()
    with pytest.raises(ConfigError, match="no relay is known here"):
        await person.trust(None)
    with pytest.raises(ConfigError, match="there is nothing to log in at"):
        await person.trust(None, login=LoginConfig(command=("sso",)))


async def test_the_issuers_ca_is_kept(person: Person, relay: Relay, tmp_path: Path) -> None:
    ca = tmp_path / "issuer.pem"
    with pytest.raises(StateError, match=r"login\.ca_file: cannot read"):
        await person.trust(relay, login=LoginConfig(ca_file=ca))
    ca.write_text(relay.authority.certificate_pem)
    profile = await person.trust(relay, login=LoginConfig(ca_file=ca))
    ca.unlink()
    kept = with_profile(ClientConfig(), profile).login.ca_file
    assert kept is not None
    assert kept.read_text() == relay.authority.certificate_pem


async def test_why_a_login_is_not_revoked(tmp_path: Path) -> None:
    with Issuer(tmp_path / "issuer") as issuer:
        login = LoginConfig(issuer=issuer.url, client_id="cli", ca_file=issuer.ca_file)
        assert await revoke(login, TokenSet(access_token="a"), {}) == ""
        assert issuer.requests("/revoke") == 0, "there is nothing to revoke"
        (tmp_path / "secret").write_text("guess")
        wrong = replace(login, client_id="ci", client_secret_file=tmp_path / "secret")
        why = await revoke(wrong, TokenSet(refresh_token="r"), {})
        assert why == "the issuer refused (invalid_client: wrong secret)"
    with Issuer(tmp_path / "other", metadata={"revocation_endpoint": None}) as issuer:
        login = replace(login, issuer=issuer.url, ca_file=issuer.ca_file)
        assert await revoke(login, TokenSet(refresh_token="r"), {}) == "the issuer has no revocation endpoint"


@pytest.mark.parametrize("ended", [False, True], ids=["valid", "ended"])
async def test_e14_a_login_while_the_ca_is_rotated_and_after_changes_no_pin(
    person: Person, tmp_path: Path, ended: bool
) -> None:
    """The profile goes on to name the CA that the user has trusted, and each later command finds the relay by it: also
    one that has ended since."""
    began = time.time() - (86400.0 * 30 if ended else 60.0)
    first = Authority.create("relay CA", life=86400.0 * 20, clock=lambda: began)
    state = Rotation(first.certificate_pem, first.key_pem)
    given, port = LoginConfig(issuer=ISSUER, client_id="arcbridge"), fixed_port()
    for step in ("", "next", "activate", "retire"):
        if step:
            state = state.take(step, began)
        if ended and state.authority().pin == first.pin:
            continue
        (tmp_path / f"relay {step}").mkdir()
        now = state.authority()
        async with serving(tmp_path / f"relay {step}", dict(DOCUMENT), authority=now, port=port) as relay:
            for user in (person, Person(tmp_path / f"new at {step}")):
                settings = {} if user is person and user.profiles.all() else {"relay_ca_pin": first.pin}
                for _ in range(2):
                    profile = await user.trust(relay, login=given, **settings)
                    assert (profile.ca_pin, profile.ca_pem) == (first.pin, first.certificate_pem)
                file = tmp_path / "ca.pem"
                file.write_text(profile.ca_pem)
                access = RelayAccess(
                    f"127.0.0.1:{relay.port}",
                    ca_file=file,
                    ca_pin=profile.ca_pin,
                    successions=user.profiles.successions,
                )
                assert (await ask_relay(access, given=True)).ca_pin == first.pin
                access.follow(now.announced)  # as it joins
    assert "relay's CA" not in "".join(person.questions)


async def test_a_relay_with_another_next_ca_is_trusted_anew(person: Person, tmp_path: Path) -> None:
    """As one that was restored from a backup of before its rotation, and rotated again: the pin is the former one."""
    first = Authority.create("relay CA")
    kept, shown = [Rotation(first.certificate_pem, first.key_pem).take("next", time.time()) for _ in range(2)]
    shown = shown.take("activate", time.time())
    (tmp_path / "relay").mkdir()
    async with serving(tmp_path / "relay", dict(DOCUMENT), authority=shown.authority()) as relay:
        await person.trust(relay, relay_ca_pin=first.pin)
        person.profiles.successions.forget(first.pin)
        person.profiles.successions.keep(first.pin, kept.list)
        for _ in range(2):
            await person.trust(relay, relay_ca_pin=first.pin, renew=True)
            assert person.profiles.successions.known(first.pin) == shown.list

"""Which token goes where, and from where it comes."""

from __future__ import annotations

import json
import ssl
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from arcbridge.client.credentials import proof_keys
from arcbridge.client.credentials.token_cache import TokenSet
from arcbridge.client.credentials.tokens import OneToken, TokenCommand, Tokens, refuse_contradictions, with_defaults
from arcbridge.errors import ArcbridgeError, ConfigError, ExitCode, Unauthenticated, Unreachable
from arcbridge.identity.proof import ProofKey, check_proof, spki_of
from arcbridge.pki.authority import Authority
from arcbridge.settings.config import LoginConfig
from tests.client.session.test_session_manager import RELAY_CA, jwt_like, login


class Pair:
    key: ProofKey | None = None

    def __init__(self, tokens: TokenSet) -> None:
        self.set = tokens
        self.asked: list[tuple[bool, bool]] = []
        self.audiences: list[tuple[str, bool]] = []
        self.error: ArcbridgeError | None = None

    async def tokens(self, *, interactive: bool, force: bool = False) -> TokenSet:
        self.asked.append((interactive, force))
        if self.error is not None:
            raise self.error
        return self.set

    async def for_audience(self, audience: str, *, interactive: bool, force: bool = False) -> TokenSet:
        self.audiences.append((audience, force))
        return TokenSet(f"for {audience}", obtained_at=1.0, expires_at=2.0)


def one_file(field: str, path: Path, *, one_token: bool = False) -> LoginConfig:
    relay, cluster = (path, None) if field == "access_token_file" else (None, path)
    return LoginConfig(access_token_file=relay, id_token_file=cluster, one_token=one_token)


class TestFiles:
    async def test_each_its_own(self, tmp_path: Path) -> None:
        tokens = Tokens(login(tmp_path), None)
        assert await tokens.access() == "the-access-token"
        assert (await tokens.cluster()).text == "the-id-token"

    async def test_they_are_read_each_time(self, tmp_path: Path) -> None:
        tokens = Tokens(login(tmp_path), None)
        await tokens.access()
        (tmp_path / "access").write_text("newer")
        assert await tokens.access() == "newer"

    async def test_expired(self, tmp_path: Path) -> None:
        tokens = Tokens(login(tmp_path, access=jwt_like(-1)), None)
        with pytest.raises(Unauthenticated, match=r"access has expired"):
            await tokens.access()

    async def test_nothing_configured(self) -> None:
        with pytest.raises(Unauthenticated, match="no login is configured"):
            await Tokens(LoginConfig(), None).access()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cluster_audience": "a", "id_token_file": Path("id")}, "login.cluster_audience: .*login.id_token_file"),
        ({"workload": "kubernetes", "command": ("sso",)}, "login.workload: .*login.command"),
        ({"workload": "kubernetes", "issuer": "https://i"}, "login.workload: .*login.issuer"),
        ({"workload": "azure-pipelines"}, "needs login.issuer"),
        ({"grant_type": "client-credentials"}, "client-credentials needs login.issuer"),
        ({"cluster_scopes": ("openid",)}, "login.cluster_scopes: needs login.cluster_audience"),
    ],
)
def test_settings_that_contradict_one_another(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        refuse_contradictions(LoginConfig(**settings))


def test_azure_pipelines_are_for_an_issuer_to_trade_in() -> None:
    login = LoginConfig(workload="azure-pipelines:x", issuer="https://login.example.org")
    refuse_contradictions(login)
    assert with_defaults(login) is login


def test_usual_audiences_of_a_workload() -> None:
    found = with_defaults(LoginConfig(workload="github"))
    assert (found.audience, found.cluster_audience) == ("arcbridge-relay", "arcbridge-{cluster}")
    own = with_defaults(LoginConfig(workload="github", audience="a", cluster_audience="b"))
    assert (own.audience, own.cluster_audience) == ("a", "b")
    assert with_defaults(LoginConfig()) == LoginConfig()


class TestOneToken:
    """docs/threats.md#T10: the relay never gets the cluster's token, unless the user said so."""

    async def refused(self, tokens: Tokens) -> OneToken:
        with pytest.raises(OneToken, match="one_token = true") as caught:
            await tokens.access()
        assert "SECRET" not in str(caught.value)
        return caught.value

    @pytest.mark.parametrize("field", ["access_token_file", "id_token_file"])
    async def test_one_file(self, tmp_path: Path, field: str) -> None:
        (tmp_path / "token").write_text("SECRET")
        error = await self.refused(Tokens(one_file(field, tmp_path / "token"), None))
        assert str(tmp_path / "token") in error.message
        assert (error.exit_code, error.status_code) == (ExitCode.USAGE, 403)

    async def test_two_files_that_hold_the_same(self, tmp_path: Path) -> None:
        await self.refused(Tokens(login(tmp_path, access="SECRET", cluster="SECRET"), None))

    @pytest.mark.parametrize(
        "answer", [TokenSet("", "SECRET"), TokenSet("SECRET", ""), TokenSet("SECRET", "SECRET")], ids=str
    )
    async def test_a_login_that_gives_one(self, answer: TokenSet) -> None:
        await self.refused(Tokens(LoginConfig(), Pair(answer)))

    async def test_a_command_that_prints_an_id_token_alone(self) -> None:
        command = TokenCommand((sys.executable, "-c", """print('{"id_token": "SECRET"}')"""))
        await self.refused(Tokens(LoginConfig(), command))

    async def test_a_service_account_s_token_in_both_places(self, tmp_path: Path) -> None:
        (tmp_path / "sa").write_text("SECRET")
        await self.refused(Tokens(login(tmp_path, access="SECRET"), None, token="SECRET"))
        await self.refused(Tokens(login(tmp_path, access="SECRET"), None, token_file=tmp_path / "sa"))

    async def test_the_cluster_is_not_given_what_the_relay_has(self, tmp_path: Path) -> None:
        """A file is replaced between the join and AUTH."""
        settings = login(tmp_path, access="first", cluster="second")
        tokens = Tokens(settings, None)
        assert await tokens.access() == "first"
        (tmp_path / "id").write_text("first")
        (tmp_path / "access").write_text("third")
        with pytest.raises(OneToken, match="the relay has it already"):
            await tokens.cluster()

    async def test_a_cluster_s_token_that_is_missing_is_named_by_its_own_call(self, tmp_path: Path) -> None:
        settings = login(tmp_path)
        (tmp_path / "id").unlink()
        tokens = Tokens(settings, None)
        assert await tokens.access() == "the-access-token"
        with pytest.raises(Unauthenticated, match="does not exist"):
            await tokens.cluster()

    @pytest.mark.parametrize("field", ["access_token_file", "id_token_file"])
    async def test_the_setting_allows_it_and_warns_once(
        self, tmp_path: Path, field: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "token").write_text("one")
        tokens = Tokens(one_file(field, tmp_path / "token", one_token=True), None)
        for _ in range(2):
            assert await tokens.access() == "one"
            assert (await tokens.cluster()).text == "one"
        assert "".join(capsys.readouterr()).count("one token serves relay and cluster") == 1


class TestTokenMode:
    async def test_literal_and_file(self, tmp_path: Path) -> None:
        (tmp_path / "sa").write_text("from-file\n")
        literal = Tokens(login(tmp_path), None, token="literal")
        file = Tokens(login(tmp_path), None, token_file=tmp_path / "sa")
        assert ((await literal.cluster()).kind, (await literal.cluster()).text) == ("bearer", "literal")
        assert ((await file.cluster()).kind, (await file.cluster()).text) == ("bearer", "from-file")
        assert await literal.access() == "the-access-token"
        assert literal.token_mode
        assert file.token_mode

    async def test_it_is_never_sent_to_the_relay(self, tmp_path: Path) -> None:
        with pytest.raises(Unauthenticated):
            await Tokens(LoginConfig(), None, token="literal").access()


class TestPairs:
    async def test_both_tokens(self) -> None:
        pair = Pair(TokenSet("access", "id"))
        tokens = Tokens(LoginConfig(), pair)
        tokens.interactive = True
        assert (await tokens.access(), (await tokens.cluster()).text) == ("access", "id")
        assert pair.asked == [(True, False)] * 3

    async def test_after_the_end_of_a_login_the_next_one_s_tokens_are_taken_as_they_are(self) -> None:
        pair = Pair(TokenSet("access", "id"))
        tokens = Tokens(LoginConfig(), pair)
        await tokens.access()
        assert tokens.were_shown
        tokens.refused()
        pair.error = Unauthenticated("the login has ended")
        with pytest.raises(Unauthenticated):
            await tokens.access()
        assert not tokens.were_shown
        pair.error = None
        await tokens.access()
        assert [force for _, force in pair.asked][-2:] == [False, False]

    async def test_a_refused_token_is_replaced_once(self) -> None:
        pair = Pair(TokenSet("access", "id"))
        tokens = Tokens(LoginConfig(), pair)
        tokens.refused()
        await tokens.access()
        await tokens.cluster()
        assert [force for _, force in pair.asked] == [True, False, False]

    @pytest.mark.parametrize("ends", [1, 2], ids=["the new ones are good", "the new ones are refused too"])
    async def test_what_an_end_refused_is_replaced_for_one_more_try(self, ends: int) -> None:
        pair = Pair(TokenSet("access", "id"))
        tokens, tries = Tokens(LoginConfig(), pair), 0

        async def attempt() -> str:
            nonlocal tries
            tries += 1
            await tokens.access()
            if tries <= ends:
                raise Unauthenticated(f"refused {tries}")
            return "in"

        if ends == 1:
            assert await tokens.retry_once(attempt) == "in"
        else:
            with pytest.raises(Unauthenticated, match="refused 2"):
                await tokens.retry_once(attempt)
        assert tries == 2
        assert [force for _, force in pair.asked if force] == [True]

    async def test_there_is_one_try_where_nothing_was_shown_or_nothing_new_can_come(self, tmp_path: Path) -> None:
        tries = 0

        async def attempt() -> None:
            nonlocal tries
            tries += 1
            raise Unauthenticated("the login has ended")

        files = Tokens(login(tmp_path), None)
        await files.access()
        for tokens in (Tokens(LoginConfig(), Pair(TokenSet("access", "id"))), files):
            with pytest.raises(Unauthenticated):
                await tokens.retry_once(attempt)
        assert tries == 2


class TestOneAudiencePerCluster:
    SETTINGS = LoginConfig(cluster_audience="arcbridge-{cluster}")

    async def test_each_cluster_gets_its_own(self) -> None:
        pair = Pair(TokenSet("access", "id"))
        tokens = Tokens(self.SETTINGS, pair)
        for cluster in ("a", "b"):
            one = tokens.for_cluster(cluster)
            assert await one.access() == "access"
            found = await one.cluster()
            assert (found.kind, found.text, found.expires_at) == ("oidc", f"for arcbridge-{cluster}", 2.0)
        assert {audience for audience, _ in pair.audiences} == {"arcbridge-a", "arcbridge-b"}

    async def test_a_refused_token_is_replaced_once_for_its_cluster(self) -> None:
        pair = Pair(TokenSet("access", "id"))
        one, two = (Tokens(self.SETTINGS, pair).for_cluster(name) for name in "ab")
        one.refused()
        for tokens in (one, two, one):
            await tokens.cluster()
        assert pair.audiences == [("arcbridge-a", True), ("arcbridge-b", False), ("arcbridge-a", False)]

    async def test_a_list_of_clusters_needs_none(self) -> None:
        pair = Pair(TokenSet("access", "id"))
        assert await Tokens(self.SETTINGS, pair).access() == "access"
        assert pair.audiences == []

    async def test_the_relay_never_gets_a_cluster_s(self) -> None:
        """docs/threats.md#T10: an issuer that answers every wish with one token."""
        tokens = Tokens(self.SETTINGS, Pair(TokenSet("for arcbridge-a", "id"))).for_cluster("a")
        with pytest.raises(OneToken):
            await tokens.access()
        shown = Tokens(self.SETTINGS, Pair(TokenSet("for arcbridge-a"))).for_cluster("a")
        shown._shown = "for arcbridge-a"
        with pytest.raises(OneToken):
            await shown.cluster()

    @pytest.mark.parametrize("form", ["arcbridge-a", "arcbridge:key:T@arcbridge-a"])
    async def test_the_relay_gets_no_token_with_the_audience_of_the_cluster(self, form: str) -> None:
        """docs/threats.md#T10: another text, and good at the cluster all the same."""
        pair = Pair(TokenSet(jwt_like(600, aud=["arcbridge-relay", form]), "id"))
        with pytest.raises(OneToken, match="the audience of a cluster as well"):
            await Tokens(self.SETTINGS, pair).for_cluster("a").access()
        for tokens in (Tokens(self.SETTINGS, pair), Tokens(self.SETTINGS, pair).for_cluster("b")):
            with pytest.raises(OneToken, match=r"\(arcbridge-a\)"):
                await tokens.access()  # what the relay has is good there, for whatever cluster it is asked
        assert await Tokens(replace(self.SETTINGS, one_token=True), pair).for_cluster("a").access()
        fixed = LoginConfig(cluster_audience="arcbridge-a")
        with pytest.raises(OneToken):
            await Tokens(fixed, pair).access()

    async def test_the_relays_own_audience_is_no_clusters(self) -> None:
        """`arcbridge-relay` is of the pattern `arcbridge-{cluster}`; Keycloak adds `account` to each token."""
        pair = Pair(TokenSet(jwt_like(600, aud=["arcbridge-relay", "account"]), "id"))
        for pattern in ("arcbridge-{cluster}", "{cluster}"):
            tokens = Tokens(LoginConfig(cluster_audience=pattern), pair)
            assert await tokens.access()
            assert await tokens.for_cluster("a").access()
        with pytest.raises(OneToken):
            await Tokens(self.SETTINGS, pair).for_cluster("relay").access()

    async def test_the_end_of_an_audience_is_not_the_audience(self) -> None:
        """The agent reads `…@x@arcbridge-a` as `x@arcbridge-a`, and takes no such token."""
        pair = Pair(TokenSet(jwt_like(600, aud="arcbridge:key:T@x@arcbridge-a"), "id"))
        assert await Tokens(self.SETTINGS, pair).for_cluster("a").access()


class TestBoundTokensOnly:
    async def test_files_need_their_key(self, tmp_path: Path) -> None:
        file = tmp_path / "key"
        key = proof_keys.load_or_make(file)
        token = jwt_like(600, aud=["cluster", key.audience()])
        settings = replace(login(tmp_path, cluster=token), require_bound=True)
        with pytest.raises(Unauthenticated, match="bound to no key of this client"):
            await Tokens(settings, None).cluster()
        assert (await Tokens(replace(settings, proof_key_file=file), None).cluster()).text == token
        (tmp_path / "id").write_text("another")
        with pytest.raises(Unauthenticated, match="bound to no key of this client"):
            await Tokens(replace(settings, proof_key_file=file), None).cluster()


class TestKeys:
    async def test_a_command_finds_the_names_of_its_key(self) -> None:
        code = (
            "import json, os; e = os.environ; print(json.dumps({'access_token': e['ARCBRIDGE_PROOF_THUMBPRINT'], "
            "'id_token': e['ARCBRIDGE_PROOF_AUDIENCE'] + ' ' + e['ARCBRIDGE_PROOF_NONCE'] + ' ' + e['OTHER']}))"
        )
        command = TokenCommand((sys.executable, "-c", code), environment={"OTHER": "stays"})
        assert command.key is None
        tokens, key = await command.tokens(interactive=False), command.key
        assert key is not None
        assert tokens.access_token == key.thumbprint
        assert tokens.id_token == f"{key.audience()} {key.nonce()} stays"
        assert command.key is key
        own = ProofKey.generate()
        given = TokenCommand((sys.executable, "-c", code), key=own, environment={"OTHER": ""})
        assert (await given.tokens(interactive=False)).access_token == own.thumbprint

    async def test_the_key_of_a_command_is_made_in_a_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made_in: list[threading.Thread] = []
        generate = ProofKey.generate

        def watch() -> ProofKey:
            made_in.append(threading.current_thread())
            return generate()

        monkeypatch.setattr(ProofKey, "generate", watch)
        await TokenCommand((sys.executable, "-c", """print('{"access_token": "a"}')""")).tokens(interactive=False)
        assert len(made_in) == 1
        assert made_in[0] is not threading.main_thread()

    async def test_what_a_command_binds_to_its_key_comes_with_a_proof(self) -> None:
        """A token with the audience that the command found in its environment."""
        code = (
            "import base64, json, os\n"
            "def claims(aud): return base64.urlsafe_b64encode(json.dumps({'aud': aud}).encode()).decode()\n"
            "def token(aud): return f'h.{claims(aud)}.s'\n"
            "key = os.environ['ARCBRIDGE_PROOF_AUDIENCE']\n"
            "print(json.dumps({'access_token': token(['relay', key]), 'id_token': token(['cluster'])}))"
        )
        tokens = Tokens(LoginConfig(), TokenCommand((sys.executable, "-c", code)))
        der = x509.load_pem_x509_certificate(RELAY_CA.certificate_pem.encode()).public_bytes(Encoding.DER)
        assert tokens.prove(await tokens.access(), der)
        assert tokens.prove((await tokens.cluster()).text, der) == ""

    async def test_a_command_is_run_for_each_audience(self, tmp_path: Path) -> None:
        count = tmp_path / "count"
        code = (
            f"import json, os; a = os.environ['ARCBRIDGE_TOKEN_AUDIENCE']; open({str(count)!r}, 'a').write(a + ';')\n"
            "print(json.dumps({'access_token': 'relay', 'id_token': 'for ' + a} if a else {'access_token': 'relay'}))"
        )
        command = TokenCommand((sys.executable, "-c", code))
        tokens = Tokens(LoginConfig(cluster_audience="arcbridge-{cluster}"), command)
        for cluster in ("a", "b", "a"):
            one = tokens.for_cluster(cluster)
            assert (await one.access(), (await one.cluster()).text) == ("relay", f"for arcbridge-{cluster}")
        assert count.read_text() == ";arcbridge-a;arcbridge-b;"


class TestCommand:
    def command(self, text: str) -> TokenCommand:
        return TokenCommand((sys.executable, "-c", text))

    async def test_it_says_when_its_tokens_end(self) -> None:
        answer = json.dumps({"access_token": "a", "id_token": "i", "expires_at": 2000, "refresh_token": "r"})
        command = TokenCommand((sys.executable, "-c", f"print({answer!r})"), clock=lambda: 1000.0)
        assert await command.tokens(interactive=False) == TokenSet("a", "i", "", 1000.0, 2000.0)

    @pytest.mark.parametrize(
        ("code", "words"),
        [
            ("print('SECRET')", "did not print JSON"),
            ("print('[]')", "did not print JSON"),
            ("print(100000 * '[')", "did not print JSON"),
            ("print('{}')", "did not print JSON"),
            ("print('SECRET'); raise SystemExit(3)", "ended with code 3"),
        ],
    )
    async def test_failures_quote_nothing(self, code: str, words: str) -> None:
        with pytest.raises(Unauthenticated, match=words) as caught:
            await self.command(code).tokens(interactive=False)
        assert "SECRET" not in str(caught.value)


class TestProofs:
    """`prove` makes a proof for these tokens; tests/client/session/test_session_manager.py has what is sent with it."""

    KEY = ProofKey.generate()

    def tokens(self) -> Tokens:
        pair = Pair(TokenSet("access", "id"))
        pair.key = self.KEY
        return Tokens(LoginConfig(), pair, clock=lambda: 1000.0)

    def certificate(self) -> bytes:
        return ssl.PEM_cert_to_DER_cert(Authority.create("test").certificate_pem)

    def test_a_token_that_names_the_key(self) -> None:
        certificate, token = self.certificate(), jwt_like(600, nonce=self.KEY.nonce())
        proof = self.tokens().prove(token, certificate, "sha256:pin")
        found = check_proof(proof, token=token, peer_spki=spki_of(certificate), pin="sha256:pin", now=1000.0)
        assert found == self.KEY.thumbprint

    def test_a_token_that_names_none(self) -> None:
        for text in ("opaque", "", "a.b.c", jwt_like(600), jwt_like(600, nonce="random")):
            assert self.tokens().prove(text, self.certificate()) == ""

    def test_a_certificate_that_cannot_be_read(self) -> None:
        for certificate in (b"", b"none"):
            with pytest.raises(Unreachable, match="certificate"):
                self.tokens().prove(jwt_like(600, nonce=self.KEY.nonce()), certificate)

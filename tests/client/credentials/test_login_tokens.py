"""What the tokens of a login are bound to, and for whom they are: keys, one audience for each cluster, scopes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.credentials import login as login_module
from arcbridge.client.credentials import proof_keys
from arcbridge.client.credentials.jwt_unverified import claims_unverified, read_unverified
from arcbridge.client.credentials.login import Login
from arcbridge.client.credentials.token_cache import TokenSet
from arcbridge.errors import ConfigError, Unauthenticated, Unreachable
from arcbridge.identity.proof import Binding, BindingKind, ProofKey, binding
from tests.client.login_station import Terminal, make, with_browser
from tests.support.issuer import Issuer


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Issuer]:
    with Issuer(tmp_path_factory.mktemp("issuer"), auto_login="alice") as issuer:
        yield issuer


@pytest.fixture
def dpop(issuer: Issuer) -> Iterator[Issuer]:
    issuer.settings(dpop="on")
    yield issuer
    issuer.settings(dpop="off", dpop_nonce=False, nonce_at_refresh=False, resources=None)


def one_key(login: Login) -> ProofKey:
    key = login.key
    assert key is not None
    return key


def bound(token: str) -> Binding:
    return binding(claims_unverified(token))


class TestBoundTokens:
    async def test_the_nonce_names_the_key_of_the_login(self, issuer: Issuer, tmp_path: Path) -> None:
        login = with_browser(issuer, tmp_path)
        tokens = await login.log_in()
        assert bound(tokens.id_token).kind is BindingKind.NONCE
        assert bound(tokens.id_token).names(one_key(login).thumbprint)
        assert bound(tokens.access_token).kind is BindingKind.NONE, "this issuer does no DPoP"
        (file,) = tmp_path.glob("*.key")
        assert file.stat().st_mode & 0o777 == 0o600
        # Another run of the client has the same key.
        again = make(issuer, tmp_path)
        assert one_key(again).thumbprint == one_key(login).thumbprint

    async def test_an_issuer_may_leave_the_nonce_out_at_a_refresh(self, issuer: Issuer, tmp_path: Path) -> None:
        login = with_browser(issuer, tmp_path)
        await login.log_in()
        assert bound((await login.tokens(interactive=False, force=True)).id_token).kind is BindingKind.NONE

    async def test_or_keep_it(self, dpop: Issuer, tmp_path: Path) -> None:
        dpop.settings(nonce_at_refresh=True)
        login = with_browser(dpop, tmp_path)
        await login.log_in()
        for _ in range(2):
            tokens = await login.tokens(interactive=False, force=True)
            assert bound(tokens.id_token).names(one_key(login).thumbprint)

    @pytest.mark.parametrize("nonce", [False, True])
    async def test_dpop_binds_access_tokens_at_login_and_refresh(
        self, dpop: Issuer, tmp_path: Path, nonce: bool
    ) -> None:
        """With `nonce` the issuer wants a nonce of its own in each proof, and says which only in its refusal."""
        dpop.settings(dpop="required", dpop_nonce=nonce)
        for grant in ("device-code", "authcode"):
            login = with_browser(dpop, tmp_path / grant, grant_type=grant)
            tokens = await login.log_in()
            for _ in range(3):
                assert bound(tokens.access_token) == Binding(BindingKind.CNF_JKT, (one_key(login).thumbprint,))
                tokens = await login.tokens(interactive=False, force=True)

    async def test_the_code_is_bound_too(self, dpop: Issuer, tmp_path: Path) -> None:
        login = with_browser(dpop, tmp_path, change={"dpop_jkt": "another"})
        with pytest.raises(Unauthenticated, match="bound to another key"):
            await login.log_in()

    async def test_a_refresh_token_is_of_no_use_without_the_key(self, dpop: Issuer, tmp_path: Path) -> None:
        login = with_browser(dpop, tmp_path)
        await login.log_in()
        (file,) = tmp_path.glob("*.key")
        file.unlink()
        thief = make(dpop, tmp_path)
        with pytest.raises(Unauthenticated, match="run `arcbridge login`"):
            await thief.tokens(interactive=False, force=True)

    async def test_no_key_is_made_where_nothing_is_bound_to_it(self, issuer: Issuer, tmp_path: Path) -> None:
        login = make(issuer, tmp_path)
        await login.log_in()
        await login.tokens(interactive=False, force=True)
        assert login.key is None
        assert not list(tmp_path.glob("*.key"))

    async def test_dpop_can_be_switched_off(self, dpop: Issuer, tmp_path: Path) -> None:
        tokens = await make(dpop, tmp_path, dpop=False).log_in()
        assert bound(tokens.access_token).kind is BindingKind.NONE

    async def test_a_clock_that_is_wrong_is_named(self, dpop: Issuer, tmp_path: Path) -> None:
        dpop.settings(dpop="required")
        before = make(dpop, tmp_path / "before")
        await before.log_in()
        dpop.settings(clock_skew=900)
        try:
            with pytest.raises(Unauthenticated, match="compare this machine's clock"):
                await before.tokens(interactive=False, force=True)
            with pytest.raises(Unauthenticated, match=r"invalid_dpop_proof.*compare this machine's clock"):
                await with_browser(dpop, tmp_path).log_in()
        finally:
            dpop.settings(clock_skew=0)

    async def test_a_key_of_the_settings(self, issuer: Issuer, tmp_path: Path) -> None:
        key = proof_keys.load_or_make(tmp_path / "own.json")
        login = with_browser(issuer, tmp_path / "cache", proof_key_file=tmp_path / "own.json")
        assert bound((await login.log_in()).id_token).names(key.thumbprint)
        assert not list((tmp_path / "cache").glob("*.key"))

    async def test_a_logout_takes_the_key_away(self, dpop: Issuer, tmp_path: Path) -> None:
        login = make(dpop, tmp_path)
        await login.log_in()
        first = one_key(login).thumbprint
        cache = login._cache
        assert cache.clear()
        assert not list(tmp_path.glob("*.key"))
        assert login.key is None
        await login.log_in()
        assert one_key(login).thumbprint != first


class TestBoundTokensOnly:
    """`login.require_bound`: what a cluster sees is worth nothing elsewhere, or it sees nothing."""

    async def test_a_refresh_that_binds_nothing_leaves_the_former_token(self, issuer: Issuer, tmp_path: Path) -> None:
        now = time.time()
        login = with_browser(issuer, tmp_path, require_bound=True)
        login._clock = lambda: now
        first = await login.log_in()
        now += 3000
        second = await login.tokens(interactive=False)
        assert second.id_token == first.id_token
        assert second.access_token != first.access_token
        assert second.refresh_token != first.refresh_token
        now += 700
        with pytest.raises(Unauthenticated, match="bound to no key"):
            await login.tokens(interactive=False)
        # What the refresh gave is not used later either, and a new login is.
        with pytest.raises(Unauthenticated, match="bound to no key"):
            await login.tokens(interactive=False)
        again = await login.tokens(interactive=True)
        assert bound(again.id_token).names(one_key(login).thumbprint)

    async def test_an_issuer_that_binds_at_a_refresh(self, dpop: Issuer, tmp_path: Path) -> None:
        dpop.settings(nonce_at_refresh=True)
        login = with_browser(dpop, tmp_path, require_bound=True)
        first = await login.log_in()
        second = await login.tokens(interactive=False, force=True)
        assert second.id_token != first.id_token

    async def test_device_codes_bind_no_id_token(self, dpop: Issuer, tmp_path: Path) -> None:
        with pytest.raises(Unauthenticated, match=r"bound to no key .*--grant-type authcode"):
            await make(dpop, tmp_path, require_bound=True).log_in()

    async def test_but_a_cluster_s_own_access_token(self, dpop: Issuer, tmp_path: Path) -> None:
        login = make(dpop, tmp_path, require_bound=True, **PER_CLUSTER)
        await login.log_in()
        one = await login.for_audience("arcbridge-a", interactive=False)
        assert bound(one.access_token).names(one_key(login).thumbprint)
        dpop.settings(dpop="off")
        plain = make(dpop, tmp_path / "plain", require_bound=True, **PER_CLUSTER)
        await plain.log_in()
        with pytest.raises(ConfigError, match="bound to no key"):
            await plain.for_audience("arcbridge-a", interactive=False)


PER_CLUSTER: dict[str, Any] = {"cluster_audience": "arcbridge-{cluster}", "audience": "arcbridge-relay"}


class TestOneAudiencePerCluster:
    @pytest.mark.parametrize("by", ["resource", "audience", "exchange"])
    async def test_each_cluster_has_its_own_and_keeps_it(self, dpop: Issuer, tmp_path: Path, by: str) -> None:
        login = make(dpop, tmp_path, cluster_audience_by=by, **PER_CLUSTER)
        await login.log_in()
        asked = dpop.requests("/token")
        one = await login.for_audience("arcbridge-a", interactive=False)
        two = await login.for_audience("arcbridge-b", interactive=False)
        assert read_unverified(one.access_token).audiences == ("arcbridge-a",)
        assert read_unverified(two.access_token).audiences == ("arcbridge-b",)
        assert bound(one.access_token).names(one_key(login).thumbprint), "an access token, so DPoP binds it"
        assert dpop.requests("/token") == asked + 2
        # Kept by audience, for every process of this user.
        again = make(dpop, tmp_path, cluster_audience_by=by, **PER_CLUSTER)
        assert await again.for_audience("arcbridge-a", interactive=False) == one
        assert await again.for_audience("arcbridge-b", interactive=False) == two
        assert dpop.requests("/token") == asked + 2
        # The relay's stays the relay's, also after its own refresh.
        assert read_unverified((await login.tokens(interactive=False)).access_token).audiences == ("arcbridge-relay",)
        renewed = await login.tokens(interactive=False, force=True)
        assert read_unverified(renewed.access_token).audiences == ("arcbridge-relay",)
        assert await login.for_audience("arcbridge-a", interactive=False) == one

    async def test_a_refused_one_is_replaced_and_the_others_stay(self, dpop: Issuer, tmp_path: Path) -> None:
        login = make(dpop, tmp_path, **PER_CLUSTER)
        await login.log_in()
        one = await login.for_audience("arcbridge-a", interactive=False)
        two = await login.for_audience("arcbridge-b", interactive=False)
        assert await login.for_audience("arcbridge-a", interactive=False, force=True) != one
        assert await login.for_audience("arcbridge-b", interactive=False) == two

    async def test_parallel_processes_trade_once(self, dpop: Issuer, tmp_path: Path) -> None:
        await make(dpop, tmp_path, **PER_CLUSTER).log_in()
        before = dpop.requests("/token")
        logins = [make(dpop, tmp_path, **PER_CLUSTER) for _ in range(5)]
        found = await asyncio.gather(
            *(one.for_audience(f"arcbridge-{name}", interactive=False) for one in logins for name in "ab")
        )
        assert len({token.access_token for token in found}) == 2
        assert dpop.requests("/token") == before + 2

    async def test_an_issuer_that_does_not_know_the_cluster(self, dpop: Issuer, tmp_path: Path) -> None:
        dpop.settings(resources=["arcbridge-a", "arcbridge-relay"])
        login = make(dpop, tmp_path, **PER_CLUSTER)
        await login.log_in()
        with pytest.raises(ConfigError, match=r"cluster_audience: .*arcbridge-b.*invalid_target"):
            await login.for_audience("arcbridge-b", interactive=False)
        assert (await login.for_audience("arcbridge-a", interactive=False)).access_token

    async def test_an_issuer_that_ignores_what_it_is_asked(self, issuer: Issuer, tmp_path: Path) -> None:
        """What it gives then is a second token for the relay: the cluster is not shown it."""
        login = make(issuer, tmp_path, **PER_CLUSTER)
        await login.log_in()
        real = login_module.Issuer.post

        async def post(self: Any, url: str, form: Any) -> dict[str, Any]:
            return await real(self, url, {name: form[name] for name in form if name != "resource"})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(login_module.Issuer, "post", post)
            with pytest.raises(ConfigError, match="ignored"):
                await login.for_audience("arcbridge-a", interactive=False)
        # The refresh token that came with it was kept: the former one is void.
        assert (await login.for_audience("arcbridge-a", interactive=False)).access_token

    async def test_without_a_refresh_token(self, issuer: Issuer, tmp_path: Path) -> None:
        login = make(issuer, tmp_path, scopes=("openid",), **PER_CLUSTER)
        await login.log_in()
        with pytest.raises(ConfigError, match="offline_access"):
            await login.for_audience("arcbridge-a", interactive=False)

    async def test_a_login_that_was_taken_back(self, issuer: Issuer, tmp_path: Path) -> None:
        person = Terminal(issuer)
        login = make(issuer, tmp_path, person, **PER_CLUSTER)
        tokens = await login.log_in()
        issuer.request("POST", "/revoke", {"client_id": "cli", "token": tokens.refresh_token})
        with pytest.raises(Unauthenticated, match="run `arcbridge login`"):
            await login.for_audience("arcbridge-a", interactive=False)
        asked = issuer.requests("/token")
        for _ in range(6):  # as kubectl does
            with pytest.raises(Unauthenticated, match="the login has ended; run `arcbridge login`"):
                await make(issuer, tmp_path, person, **PER_CLUSTER).for_audience("arcbridge-a", interactive=False)
        assert issuer.requests("/token") == asked, "the issuer has said so once"
        shown = len(person.lines)
        assert (await login.for_audience("arcbridge-a", interactive=True)).access_token
        assert len(person.lines) > shown

    async def test_an_issuer_that_is_down(self, issuer: Issuer, tmp_path: Path) -> None:
        now = time.time()
        login = make(issuer, tmp_path, **PER_CLUSTER)
        login._clock = lambda: now
        await login.log_in()
        one = await login.for_audience("arcbridge-a", interactive=False)
        issuer.down()
        try:
            now += 3500  # old, and good for another minute
            assert await login.for_audience("arcbridge-a", interactive=False) == one
            with pytest.raises(Unreachable):
                await login.for_audience("arcbridge-a", interactive=False, force=True)
            with pytest.raises(Unreachable):
                await login.for_audience("arcbridge-b", interactive=False)
        finally:
            issuer.down(False)

    async def test_another_user_s_tokens_do_not_stay(self, issuer: Issuer, tmp_path: Path) -> None:
        login = make(issuer, tmp_path, **PER_CLUSTER)
        await login.log_in()
        one = await login.for_audience("arcbridge-a", interactive=False)
        await login.log_in()
        assert await login.for_audience("arcbridge-a", interactive=False) != one


BY_SCOPE: dict[str, Any] = {
    "scopes": ("openid", "offline_access", "audience:arcbridge-relay", "audience:arcbridge-a", "audience:arcbridge-b"),
    "relay_scopes": ("openid", "audience:arcbridge-relay"),
    "cluster_audience": "arcbridge-{cluster}",
    "cluster_audience_by": "scope",
    "cluster_scopes": ("audience:{audience}",),
}


class TestAudiencesByScope:
    @pytest.mark.parametrize("grant", ["device-code", "authcode"])
    async def test_no_token_for_several_ends_is_kept(self, dpop: Issuer, tmp_path: Path, grant: str) -> None:
        kept = []
        login = with_browser(dpop, tmp_path, grant_type=grant, **BY_SCOPE)
        save = login._cache.save

        def watch(tokens: TokenSet) -> None:
            kept.append(tokens.access_token)
            save(tokens)

        login._cache.save = watch
        tokens = await login.log_in()
        assert read_unverified(tokens.access_token).audiences == ("arcbridge-relay",)
        for name in ("arcbridge-a", "arcbridge-b"):
            one = await login.for_audience(name, interactive=False)
            assert read_unverified(one.access_token).audiences == (name,)
        renewed = await login.tokens(interactive=False, force=True)
        assert read_unverified(renewed.access_token).audiences == ("arcbridge-relay",)
        assert {read_unverified(token).audiences for token in kept if token} == {("arcbridge-relay",)}

    async def test_without_a_refresh_token(self, issuer: Issuer, tmp_path: Path) -> None:
        scopes = {**BY_SCOPE, "scopes": ("openid", "audience:arcbridge-relay")}
        login = make(issuer, tmp_path, **scopes)
        with pytest.raises(Unauthenticated, match=r"login\.relay_scopes: .*no refresh token"):
            await login.log_in()
        assert not login._cache.load().usable(time.time())

    async def test_what_the_login_was_not_given(self, issuer: Issuer, tmp_path: Path) -> None:
        login = make(issuer, tmp_path, **BY_SCOPE)
        await login.log_in()
        with pytest.raises(ConfigError, match=r"arcbridge-c by 'scope': .*invalid_scope"):
            await login.for_audience("arcbridge-c", interactive=False)

    async def test_a_confidential_client_proves_itself_at_each_step(self, issuer: Issuer, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("ci-secret\n")
        login = make(issuer, tmp_path, client_id="ci", client_secret_file=secret, **BY_SCOPE)
        await login.log_in()
        assert (await login.for_audience("arcbridge-a", interactive=False)).access_token
        secret.write_text("another")
        with pytest.raises(Unauthenticated, match="invalid_client"):
            await login.tokens(interactive=False, force=True)

"""Logging in at an OIDC issuer: device code (RFC 8628), authorization code with PKCE (RFC 7636), refresh, and tokens
for one cluster each by `resource` (RFC 8707), `audience` or token exchange (RFC 8693).

The authorization code comes back to a listener on both loopback addresses (`client.credentials.login_callback`) that
serves one valid answer and closes. `state` and `nonce` are checked. Tokens are saved before they are used: an issuer
that rotates refresh tokens has already forgotten the former one. The login has a key (`client.credentials.proof_keys`)
to which its tokens are bound where the issuer can do that: by DPoP, and the id token of the authorization code flow by
its nonce, which names the key. PKCE is what protects the code here (RFC 9700 §2.1.1), so the nonce need not be a new
one each time.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import re
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from arcbridge.client.credentials import audience_parameters, proof_keys
from arcbridge.client.credentials.client_authentication import ClientAuthentication, IssuerEndpoints
from arcbridge.client.credentials.issuer import Issuer, IssuerError, page_of
from arcbridge.client.credentials.jwt_unverified import claims_unverified, positive, read_unverified
from arcbridge.client.credentials.login_callback import HEAD_LIMIT, LoginCallback, check_redirect_path, redirect_path
from arcbridge.client.credentials.token_cache import LOCK_WAIT, TokenCache, TokenSet, token_set
from arcbridge.errors import ConfigError, StateError, Unauthenticated, Unreachable
from arcbridge.identity.proof import ProofKey, binding
from arcbridge.net.address import check_origins, origin_of
from arcbridge.net.loopback import listen_local
from arcbridge.settings.choices import AUDIENCE_BY, BROWSER, DEVICE
from arcbridge.settings.config import LoginConfig
from arcbridge.tasks import completed
from arcbridge.units import duration

REDIRECT_PORTS = (8000, 18000)
"""kubelogin's, so that a registration made for it serves us as well."""
BROWSER_WAIT = 300.0
"""Seconds for the user to log in in the browser."""
DEVICE_WAIT_MOST = 1800.0
"""Seconds to poll at most, whatever the issuer's `expires_in` says."""
POLL_LEAST, POLL_MOST = 1.0, 60.0
"""Seconds between two polls for a device code, whatever the issuer's `interval` says."""
ROTATION_GRACE = 2.0
"""Seconds that a refresh gets whose caller is cancelled: the issuer may have replaced the refresh token already, and
what is lost then is the login."""
_EXCHANGE_GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"
_ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
_DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,31}")
"""A code that the user is to type (RFC 8628 §6.1): one word, so that it can say nothing else to the user."""
_UNBOUND = "the issuer's new token for clusters is bound to no key (login.require_bound)"

Say = Callable[[str], None]
Wait = Callable[[str, float], AbstractContextManager[object]]
"""Shows that the command waits, for what and for how many seconds at most, as long as the context is entered."""
OpenBrowser = Callable[[str], Awaitable[bool]]


def check_login(config: LoginConfig) -> None:
    """Raise ConfigError for settings with which no login can work."""
    if config.redirect_port is not None and not 0 <= config.redirect_port <= 65535:
        raise ConfigError("login.redirect_port: must be a port, or 0 for any free one")
    check_redirect_path(config.redirect_path)
    check_origins("login.issuer_origins", config.issuer_origins)
    if config.cluster_audience_by not in AUDIENCE_BY:
        raise ConfigError(f"login.cluster_audience_by: must be one of {', '.join(AUDIENCE_BY)}")
    by_scope = config.cluster_audience_by == audience_parameters.BY_SCOPE
    if config.cluster_audience and by_scope and not config.relay_scopes:
        # The login asks for the scopes of relay and clusters together, so its own access token may be good at both.
        raise ConfigError(
            "login.relay_scopes: required with login.cluster_audience_by = scope; name the scopes of a token that "
            "is good at the relay alone"
        )


class Login:
    """One configured login. `say` shows a line to the user; `open_browser` returns whether it could; None: it
    cannot, and the user gets the page's address alone."""

    def __init__(
        self,
        config: LoginConfig,
        cache: TokenCache,
        *,
        say: Say,
        waiting: Wait = lambda text, limit: nullcontext(),
        open_browser: OpenBrowser | None = None,
        clock: Callable[[], float] = time.time,
        environment: Mapping[str, str] = os.environ,
        command: str = "arcbridge login",
        poll_least: float = POLL_LEAST,
    ) -> None:
        """`command`: what an error advises the user to run where only a new login helps. `poll_least`: seconds between
        two polls for a device code, even if the issuer's `interval` is shorter."""
        check_login(config)
        self._authentication = ClientAuthentication(config, clock, environment)
        self._config = config
        self._cache = cache
        self._say = say
        self._waiting = waiting
        self._open_browser = open_browser
        self._clock = clock
        self._environment = environment
        self._redirect_ports = REDIRECT_PORTS if config.redirect_port is None else (config.redirect_port,)
        self._command = command
        self._poll_least = poll_least

    async def tokens(self, *, interactive: bool, force: bool = False) -> TokenSet:
        """Return tokens that are fresh: kept, refreshed, or from a new login if `interactive`.

        `force` refreshes even what looks fresh (the other end refused it). Raises Unauthenticated when only a new
        login would help and none may begin, Unreachable when the issuer is down and nothing kept is usable.
        """
        refused = self._cache.load() if force else None
        if not force and (kept := self._cache.load()).fresh(self._clock()) and self._suits(kept):
            return kept
        async with self._cache.locked():
            # Another process may have refreshed while this one waited.
            kept = self._cache.load()
            suits = self._suits(kept)
            if kept.fresh(self._clock()) and suits and (refused is None or not kept.same_login(refused)):
                return kept
            why = ""
            async with self._issuer() as issuer:
                if kept.refresh_token:
                    try:
                        found = await completed(self._refresh(issuer, kept), ROTATION_GRACE)
                        if self._suits(found):
                            return found
                        why = f" ({_UNBOUND})"
                    except IssuerError as error:
                        if error.code == "invalid_dpop_proof":
                            raise _refused(error) from error  # a new login would fare the same
                        why = f" ({error.words})"  # revoked or too old: a new login is the answer
                        if error.code == "invalid_grant":
                            self._end(kept)
                    except Unreachable:
                        if kept.usable(self._clock()) and suits and not force:
                            return kept
                        raise
                elif kept.usable(self._clock()) and suits and not force:
                    return kept
                if not interactive:
                    state = f"the login has ended{why}" if kept else self._cache.no_login
                    raise Unauthenticated(f"{state}; run `{self._command}`")
                return await self._log_in(issuer)

    async def log_in(self, *, since: float = 0.0) -> TokenSet:
        """Log in anew, whatever is kept; `since`: a login that another process has made since then (unix seconds), or
        that has failed since then, counts, so that of many which wait for the user one asks. 0: none does."""
        async with self._cache.locked(BROWSER_WAIT + LOCK_WAIT), self._issuer() as issuer:
            kept = self._cache.load()
            if 0 < since <= kept.logged_in_at and kept.usable(self._clock()):
                return kept
            if 0 < since <= kept.failed_at:
                raise Unauthenticated(f"the login of another command has failed just now; run `{self._command}`")
            try:
                return await self._log_in(issuer)
            except Unauthenticated:
                if since:
                    with suppress(StateError):
                        self._cache.save(replace(self._cache.load(), failed_at=self._clock()))
                raise

    async def for_audience(self, audience: str, *, interactive: bool, force: bool = False) -> TokenSet:
        """Return a token that is fresh, and good for `audience` alone: kept, or traded for this login's tokens.

        `force`, and what is raised: as for `tokens`; ConfigError besides where the issuer gives no such token.
        """
        refused = self._cache.load().by_audience.get(audience) if force else None
        await self.tokens(interactive=interactive)
        async with self._cache.locked():
            kept = self._cache.load()
            one = kept.by_audience.get(audience)
            if one is not None and one.fresh(self._clock()) and one != refused:
                return one
            async with self._issuer() as issuer:
                try:
                    return await self._trade_or_log_in(issuer, kept, audience, interactive=interactive)
                except IssuerError as error:
                    raise self._no_token_for(audience, f"the issuer refused it ({error.words})") from error
                except Unreachable:
                    if one is not None and one.usable(self._clock()) and one != refused:
                        return one
                    raise

    def _suits(self, tokens: TokenSet) -> bool:
        """Return whether the id token may be shown to clusters: it is bound to the key, or need not be, or is not for
        them."""
        return not self._config.require_bound or bool(self._config.cluster_audience) or self._is_bound(tokens.id_token)

    def _is_bound(self, token: str) -> bool:
        key = self.key
        return key is not None and binding(claims_unverified(token)).names(key.thumbprint)

    @property
    def key(self) -> ProofKey | None:
        """The key to which this login's tokens are bound; None: there was no login yet. Raises StateError."""
        return proof_keys.load(self._key_path)

    def _own_key(self) -> ProofKey:
        return proof_keys.load_or_make(self._key_path)

    @property
    def _key_path(self) -> Path:
        return self._config.proof_key_file or self._cache.key_path

    def _issuer(self) -> Issuer:
        # Only where the issuer's discovery offers DPoP is a key made.
        return Issuer(self._config, self._authentication, key=self._own_key, clock=self._clock)

    # -- the grants ---------------------------------------------------------------------------------------------------

    async def _refresh(self, issuer: Issuer, kept: TokenSet) -> TokenSet:
        form = {"grant_type": "refresh_token", "refresh_token": kept.refresh_token}
        form |= audience_parameters.for_relay(self._config)
        answer = await issuer.ask(form)
        # An issuer may leave the nonce out of the new id token, and may not change it (OpenID Connect Core §12.2).
        was, now = (read_unverified(text).nonce for text in (kept.id_token, str(answer.get("id_token") or "")))
        if now and was and now != was:
            raise Unauthenticated("the issuer's answer belongs to another login (nonce); log in again")
        # Some issuers send no id token at a refresh, or one that is bound no more: the former stays while it lasts.
        unfit = "id_token" not in answer or (self._config.require_bound and not self._is_bound(str(answer["id_token"])))
        if unfit and read_unverified(kept.id_token).expires_at > self._clock():
            answer = {**answer, "id_token": kept.id_token}
        return self._keep(answer, kept)

    def _end(self, kept: TokenSet) -> None:
        """Keep that the issuer has ended the login: else each further process, and each of kubectl's attempts, would
        ask it once more. Raises StateError."""
        self._cache.save(replace(kept, refresh_token="", expires_at=self._clock(), by_audience={}))

    async def _trade_or_log_in(self, issuer: Issuer, kept: TokenSet, audience: str, *, interactive: bool) -> TokenSet:
        try:
            return await completed(self._trade(issuer, kept, audience), ROTATION_GRACE)
        except IssuerError as error:
            if error.code != "invalid_grant":
                raise
            if not interactive:
                self._end(kept)
                raise Unauthenticated(f"the login has ended ({error.words}); run `{self._command}`") from error
        return await self._trade(issuer, await self._log_in(issuer), audience)

    async def _trade(self, issuer: Issuer, kept: TokenSet, audience: str) -> TokenSet:
        """Have a token for `audience` by refresh token or access token, and keep it."""
        by = self._config.cluster_audience_by
        if by == audience_parameters.BY_EXCHANGE:
            form = {"grant_type": _EXCHANGE_GRANT, "subject_token": kept.access_token}
            form |= {"subject_token_type": _ACCESS_TOKEN, "requested_token_type": _ACCESS_TOKEN}
        elif kept.refresh_token:
            form = {"grant_type": "refresh_token", "refresh_token": kept.refresh_token}
        else:
            raise self._no_token_for(audience, "the login gave no refresh token (scope offline_access)")
        form |= audience_parameters.for_cluster(self._config, audience)
        answer = await issuer.ask(form)
        now = self._clock()
        token = token_set({"access_token": answer.get("access_token"), "expires_in": answer.get("expires_in")}, now)
        renewed = answer.get("refresh_token")
        if by != audience_parameters.BY_EXCHANGE and isinstance(renewed, str) and renewed:
            kept = replace(kept, refresh_token=renewed)
            self._cache.save(kept)  # at once: the issuer may have made the former refresh token void
        if audience not in read_unverified(token.access_token).audiences:
            # An issuer that does not know the parameter ignores it: the token would be the relay's.
            raise self._no_token_for(audience, "the issuer ignored that it was asked for")
        if self._config.require_bound and not self._is_bound(token.access_token):
            raise self._no_token_for(audience, _UNBOUND)
        others = {name: one for name, one in kept.by_audience.items() if one.usable(now)}
        self._cache.save(replace(kept, by_audience={**others, audience: token}))
        return token

    def _no_token_for(self, audience: str, why: str) -> ConfigError:
        return ConfigError(
            f"login.cluster_audience: there is no token for {audience} by {self._config.cluster_audience_by!r}: {why}; "
            "have the issuer set up for it (docs/security.md), or take the setting out"
        )

    async def _log_in(self, issuer: Issuer) -> TokenSet:
        endpoints = await issuer.endpoints()
        grant = self._config.grant_type
        if grant == "auto":
            by_browser = bool(endpoints.authorization) and _has_browser(self._environment)
            grant = BROWSER if by_browser or not endpoints.device_authorization else DEVICE
        by = self._device_code if grant == DEVICE else self._authorization_code
        try:
            found = await by(issuer, endpoints)
        except IssuerError as error:
            raise _refused(error) from error
        if not self._suits(found):
            raise Unauthenticated(f"{_UNBOUND}; use --grant-type authcode, or see docs/security.md")
        return found

    async def _device_code(self, issuer: Issuer, endpoints: IssuerEndpoints) -> TokenSet:
        """Log in by RFC 8628: show a code, poll until the user has entered it on another device."""
        if not endpoints.device_authorization:
            raise ConfigError(f"the issuer {issuer.url} offers no device code; use --grant-type authcode")
        # PKCE has no place in RFC 8628, and is ignored there; Keycloak wants it where the client has to use it.
        verifier = secrets.token_urlsafe(32)
        wanted = {**self._wanted(), **_challenge(verifier)}
        answer = await issuer.post(endpoints.device_authorization, wanted)
        device_code, user_code = answer.get("device_code"), answer.get("user_code")
        page = page_of(answer.get("verification_uri"))
        shown = isinstance(user_code, str) and _CODE.fullmatch(user_code) and page
        if not isinstance(device_code, str) or not shown:
            raise Unreachable(f"the issuer {issuer.url} gave an incomplete device code; try again")
        whole = page_of(answer.get("verification_uri_complete"))
        _check_page(issuer, page)
        where = "" if origin_of(page) == origin_of(issuer.url) else f" at {issuer.url}"
        life = min(positive(answer.get("expires_in"), 600.0), DEVICE_WAIT_MOST)
        # The code has a line of its own: in the middle of a sentence a narrow terminal breaks it.
        self._say(f"To log in{where}, open {page} in a browser and")
        self._say(f"enter the code {user_code}")
        if whole and issuer.has(whole):
            self._say(f"or open {whole}")
        self._say(f"The code is good for {duration(life)}.")
        with self._waiting("Waiting for the login in the browser", life):
            return await self._poll(issuer, answer, device_code, verifier, life)

    async def _poll(
        self, issuer: Issuer, answer: Mapping[str, object], device_code: str, verifier: str, life: float
    ) -> TokenSet:
        interval = min(max(positive(answer.get("interval"), 5.0), self._poll_least), POLL_MOST)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + life
        form = {"grant_type": _DEVICE_GRANT, "device_code": device_code, "code_verifier": verifier}
        while True:
            await asyncio.sleep(min(interval, deadline - loop.time()))
            if loop.time() >= deadline:
                raise Unauthenticated("the device code has expired before the login; start again")
            try:
                given = await issuer.ask(form)
            except IssuerError as error:
                if error.code == "slow_down":
                    interval = min(interval + 5.0, POLL_MOST)  # RFC 8628 §3.5
                elif error.code == "expired_token":
                    raise Unauthenticated("the device code has expired before the login; start again") from error
                elif error.code == "access_denied":
                    raise Unauthenticated("the login was refused in the browser") from error
                elif error.code != "authorization_pending":
                    raise
            except Unreachable:
                interval = min(interval * 2, POLL_MOST)  # RFC 8628 §3.5: back off when the connection fails
            else:
                return await self._begin(issuer, given)

    async def _authorization_code(self, issuer: Issuer, endpoints: IssuerEndpoints) -> TokenSet:
        """Log in by RFC 8252 and 7636: the browser comes back to a port of ours with a code."""
        if not endpoints.authorization:
            raise ConfigError(f"the issuer {issuer.url} offers no authorization code; use --grant-type device-code")
        verifier, state = (secrets.token_urlsafe(32) for _ in range(2))
        key = self._own_key()
        nonce = key.nonce()
        path = redirect_path(endpoints, self._config.redirect_path)
        callback = LoginCallback(state, endpoints, path)
        servers, port = await self._listen(callback)
        try:
            redirect = f"http://localhost:{port}{path}"
            question = {
                "response_type": "code",
                "redirect_uri": redirect,
                "state": state,
                "nonce": nonce,
                **_challenge(verifier),
                # The code, too, is of no use without the key (RFC 9449 §10).
                **({"dpop_jkt": key.thumbprint} if endpoints.dpop and self._config.dpop else {}),
                "client_id": self._config.client_id,
                **self._wanted(),
            }
            joint = "&" if urlsplit(endpoints.authorization).query else "?"
            page = f"{endpoints.authorization}{joint}{urlencode(question)}"
            if self._open_browser is not None and await self._open_browser(page):
                # It may be another profile's, another screen's, or none in spite of what the system says.
                self._say("The login is in your browser. If you do not see it, open")
                self._say(page)
            else:
                self._say(f"To log in, open {page}")
            try:
                with self._waiting("Waiting for the login in the browser", BROWSER_WAIT):
                    async with asyncio.timeout(BROWSER_WAIT):
                        code = await callback.code
            except TimeoutError as error:
                raise Unauthenticated(
                    f"the login took longer than {BROWSER_WAIT:.0f} s; start again. If the issuer's page says that it "
                    f"does not know the redirect URI, have {redirect} registered there (docs/how-to/log-in.md)"
                ) from error
        finally:
            for server in servers:
                server.close()
            await callback.finish()
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": redirect, "code_verifier": verifier}
        answer = await issuer.ask(form)
        id_token = answer.get("id_token")
        if isinstance(id_token, str) and not hmac.compare_digest(
            read_unverified(id_token).nonce.encode(), nonce.encode()
        ):
            # The token came over TLS from the issuer, so its signature may go unchecked here (OpenID Connect Core
            # §3.1.3.7); the nonce may not: it binds the token to this login.
            raise Unauthenticated("the issuer's answer belongs to another login (nonce); start again")
        return await self._begin(issuer, answer)

    async def _listen(self, callback: LoginCallback) -> tuple[list[asyncio.Server], int]:
        for port in self._redirect_ports:
            try:
                # Both addresses of `localhost`: at the other one another program would get the answer.
                sockets = listen_local(port)
            except ConfigError:
                continue  # another program listens there
            servers = [await asyncio.start_server(callback.serve, sock=sock, limit=HEAD_LIMIT) for sock in sockets]
            return servers, int(sockets[0].getsockname()[1])
        ports = " and ".join(str(port) for port in self._redirect_ports)
        raise Unauthenticated(
            f"local ports {ports} are in use, so the browser could not come back; free one of them, or set "
            "login.redirect_port"
        )

    # -- parts --------------------------------------------------------------------------------------------------------

    async def _begin(self, issuer: Issuer, answer: Mapping[str, object]) -> TokenSet:
        """Keep what a new login gave, once it is such that each end may have its part."""
        if not self._config.relay_scopes:
            return self._keep(answer, TokenSet(logged_in_at=self._clock()))
        # This access token is good at every end, and stays here: the relay gets one that is good at the relay alone.
        # Until then the cache has nothing that another process could show.
        refresh = answer.get("refresh_token")
        if not isinstance(refresh, str) or not refresh:
            raise Unauthenticated(
                "login.relay_scopes: the login gave no refresh token, which the relay's token needs (scope "
                "offline_access); have the issuer set up for it, or take the setting out"
            )
        login = TokenSet(refresh_token=refresh, logged_in_at=self._clock())
        self._cache.save(login)
        return await self._refresh(issuer, login)

    def _wanted(self) -> dict[str, str]:
        wanted = {"scope": " ".join(self._config.scopes)}
        if self._config.audience:
            wanted["audience"] = self._config.audience
        return wanted

    def _keep(self, answer: Mapping[str, object], former: TokenSet) -> TokenSet:
        tokens = token_set(dict(answer), self._clock(), former.refresh_token)
        tokens = replace(tokens, by_audience=former.by_audience, logged_in_at=former.logged_in_at)
        if not tokens.access_token and not tokens.id_token:
            raise Unreachable(f"the issuer {self._config.issuer} answered without tokens")
        self._cache.save(tokens)
        return tokens


def _refused(error: IssuerError) -> Unauthenticated:
    clock = "; compare this machine's clock" if error.code == "invalid_dpop_proof" else ""
    return Unauthenticated(f"the issuer refused the login ({error.words}){clock}")


def _check_page(issuer: Issuer, page: str) -> None:
    """Raise ConfigError for a page of device codes at an origin that the user has not accepted.

    It could be another issuer's, at which the code logs another user in (docs/threats.md#B34).
    """
    try:
        where = origin_of(page)
    except ConfigError as error:
        raise ConfigError(
            f"the page for device codes of the issuer {issuer.url} cannot be used: {error.message}; tell the issuer's "
            "operator"
        ) from None
    if where not in issuer.origins:
        raise ConfigError(
            f"login.issuer_origins: the issuer {issuer.url} has its page for device codes at {page}, and accepted are "
            f"{' and '.join(issuer.origins)} alone. Your code could log in another user there; ask the issuer's "
            f"operator, and if that is right {issuer.how_to_accept(where)}"
        )


def _challenge(verifier: str) -> dict[str, str]:
    """Return what a request has so that only the holder of `verifier` can go on with it (RFC 7636 §4.3)."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    return {"code_challenge": digest, "code_challenge_method": "S256"}


def _has_browser(environment: Mapping[str, str]) -> bool:
    if environment.get("SSH_CONNECTION"):
        return False  # the browser would open, and come back, on the wrong machine
    return sys.platform in ("darwin", "win32") or bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))

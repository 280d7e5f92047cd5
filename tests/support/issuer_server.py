"""The issuer's server for tests: endpoints, grants, a key, and what goes wrong on request. `issuer.py` runs it.

`IssuerServer` listens nowhere and keeps its key in a directory that it is given. `ManyIssuers` serves its documents in
a thread, for any number of issuers, with routes that a test adds.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import html
import json
import secrets
import time
import urllib.parse
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.support.app_thread import AppThread

# The made-up people. Any other user may log in too, without groups.
USERS: dict[str, tuple[str, ...]] = {
    "alice": ("platform",),
    "bob": ("developers",),
    "carol": ("platform", "developers"),
    "mallory": ("interns",),
}
# Clients that keep a secret; they alone may use client_credentials. All other client ids are public.
SECRETS = {"ci": "ci-secret"}
# What a job of the pipeline has in ACTIONS_ID_TOKEN_REQUEST_TOKEN.
ACTIONS_SECRET = "the-jobs-own-secret"
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
# What a request for a distributed claim has to bring.
CLAIMS_TOKEN = "f005ba11"
TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
GRANTS = "authorization_code", "refresh_token", "client_credentials", DEVICE_GRANT, TOKEN_EXCHANGE
# A scope that begins so says whom an access token is for.
AUDIENCE_SCOPE = "audience:"
ACCESS_AUDIENCE = "arcbridge-relay"
"""Of access tokens, unless the request names another by `resource` or `audience`."""
REFRESH_LIFETIME = 24 * 3600.0
CODE_LIFETIME = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a test can change while the issuer runs. Times are in seconds."""

    down: bool = False
    """Every public path answers 503."""
    lifetime: float = 3600.0
    """Of tokens from the grants."""
    clock_skew: float = 0.0
    """How far this issuer's clock is ahead, in every token it signs."""
    device_interval: float = 0.01
    """Seconds between two polls for a device code, as the issuer says; the executable waits for a second at least."""
    device_lifetime: float = 600.0
    response_iss: str = "announced"
    """Whether answers through the browser have `iss` (RFC 9207): `announced`, `sent` (unannounced), or `none`."""
    redirect_uris: tuple[str, ...] = ()
    """Redirect URIs that are registered, compared to the letter but for the port; empty: any of loopback."""
    metadata: Mapping[str, object] = field(default_factory=dict)
    """Members of the discovery document that are others, or missing (null). `{url}` in a value stands for the issuer's
    URL, and `{other}` for another origin at which it answers, too."""
    device_page: str = "{url}/device"
    """The page for device codes, written in the same way."""
    auto_login: str = ""
    """The user whom the authorization page logs in without asking."""
    dpop: str = "off"
    """DPoP (RFC 9449) at the token endpoint: `off` (not advertised, headers are ignored), `on`, or `required`."""
    dpop_nonce: bool = False
    """A DPoP proof must have a nonce of this server, each good for one request (RFC 9449 §8)."""
    nonce_at_refresh: bool = False
    """Id tokens from a refresh have the login's nonce; OpenID Connect Core §12.2 leaves that to the issuer."""
    resources: tuple[str, ...] | None = None
    """Audiences that may be asked for at the token endpoint; None: any."""


@dataclass(slots=True)
class Grant:
    """What a code or a refresh token stands for."""

    client: str
    scope: str
    user: str = ""
    resource: str = ""
    """Audience of the access token; empty: `ACCESS_AUDIENCE`."""
    granted: str = ""
    """The same as asked for at the authorization endpoint: what a refresh without a wish gives."""
    nonce: str = ""
    challenge: str = ""
    redirect_uri: str = ""
    ends: float = 0.0
    family: str = ""
    refresh_scope: str = ""
    """What the refresh token stands for, where a request asked for less; empty: the same."""
    jkt: str = ""
    """Thumbprint of the key that code and refresh token are bound to; empty: to none."""


@dataclass(slots=True)
class Device:
    """A login on another device, from its start to its first success."""

    grant: Grant
    state: str = "pending"
    next_poll: float = 0.0
    used: bool = field(default=False)


class Refused(Exception):
    """An OAuth error (RFC 6749 §5.2), answered as JSON."""

    def __init__(self, error: str, description: str = "", status: int = 400, nonce: str = "") -> None:
        super().__init__(f"{error}: {description}")
        self.body = {"error": error, "error_description": description}
        self.status = status
        self.headers = {"Cache-Control": "no-store", **({"DPoP-Nonce": nonce} if nonce else {})}


class IssuerServer:
    """The state behind the pages, and one RSA key."""

    def __init__(self, state: Path | None, settings: Settings) -> None:
        """Without `state` the keys are kept nowhere."""
        self.url = ""
        self.settings = settings
        self.codes: dict[str, Grant] = {}
        self.refresh: dict[str, Grant] = {}
        self.spent: dict[str, str] = {}  # used refresh tokens and their families
        self.devices: dict[str, Device] = {}
        self.user_codes: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.proofs: set[str] = set()  # `jti` of DPoP proofs that were used
        self.nonce = secrets.token_urlsafe(12)
        self.key = _kept_key(state) if state else _new_key()
        self.kid = b64(hashlib.sha256(str(self.key.public_key().public_numbers().n).encode()).digest())[:16]

    def app(self) -> web.Application:
        """Return the application."""
        app = web.Application(middlewares=[self._middleware])
        app.add_routes(
            [
                web.get("/.well-known/openid-configuration", self.discovery),
                web.get("/jwks", self.jwks),
                web.post("/token", self.token),
                web.post("/device_authorization", self.device_authorization),
                web.get("/device", self.device_page),
                web.post("/device", self.device_answer),
                web.get("/authorize", self.authorize),
                web.post("/authorize", self.authorize),
                web.post("/revoke", self.revoke),
                web.get("/actions", self.actions),
                web.post("/_test/mint", self.test_mint),
                web.post("/_test/settings", self.test_settings),
                web.post("/_test/device", self.test_device),
                web.get("/_test/requests", self.test_requests),
            ]
        )
        return app

    @web.middleware
    async def _middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if not request.path.startswith("/_test/"):
            self.requests[request.path] += 1
            if self.settings.down:
                return web.Response(status=503, text="down for a test\n")
        try:
            return await handler(request)
        except Refused as error:
            return web.json_response(error.body, status=error.status, headers=error.headers)

    # Keys and tokens.

    def sign(self, claims: Mapping[str, object], headers: Mapping[str, object] = {}, *, foreign: bool = False) -> str:
        """Return a JWS; with `foreign` a forger's, under our key's id. A header of None is left out."""
        key = _new_key() if foreign else self.key
        return jwt.encode(dict(claims), key, "RS256", headers={"typ": "JWT", "kid": self.kid, **headers})

    def now(self) -> float:
        """The time by this issuer's clock, which may be wrong on purpose."""
        return time.time() + self.settings.clock_skew

    def claims(self, user: str, audience: str, lifetime: float | None = None) -> dict[str, object]:
        """Return the claims of a token for a user."""
        now = self.now()
        return {
            "iss": self.url,
            "sub": user,
            "aud": audience,
            "iat": int(now),
            "nbf": int(now),
            "exp": int(now + (self.settings.lifetime if lifetime is None else lifetime)),
            "jti": secrets.token_hex(8),
            "email": f"{user}@example.com",
            "email_verified": True,
            "preferred_username": user,
            "name": user.capitalize(),
            "groups": list(USERS.get(user, ())),
        }

    def tokens(self, grant: Grant) -> dict[str, object]:
        """Return what the token endpoint answers for a grant that has been accepted."""
        user = grant.user or grant.client
        access = self.claims(user, grant.resource or ACCESS_AUDIENCE)
        # Where scopes say whom a token is for, as at Keycloak and Entra ID.
        by_scope = [scope.removeprefix(AUDIENCE_SCOPE) for scope in grant.scope.split() if AUDIENCE_SCOPE in scope]
        if by_scope:
            access["aud"] = by_scope if len(by_scope) > 1 else by_scope[0]
        access |= {"client_id": grant.client, "scope": grant.scope}
        if grant.jkt:
            access["cnf"] = {"jkt": grant.jkt}
        if not grant.user:  # a service has no mail address
            for name in ("email", "email_verified", "preferred_username", "name"):
                del access[name]
        answer: dict[str, object] = {
            "access_token": self.sign(access, {"typ": "at+jwt"}),
            "token_type": "DPoP" if grant.jkt else "Bearer",
            "expires_in": int(self.settings.lifetime),
            "scope": grant.scope,
        }
        scopes = grant.scope.split()
        if grant.user and "openid" in scopes:
            identity = self.claims(grant.user, grant.client) | {"azp": grant.client, "auth_time": int(self.now())}
            if grant.nonce:
                identity["nonce"] = grant.nonce
            answer["id_token"] = self.sign(identity)
        refreshable = grant.refresh_scope or grant.scope
        if grant.user and "offline_access" in refreshable.split():
            token = secrets.token_urlsafe(24)
            family = grant.family or secrets.token_hex(8)
            nonce = grant.nonce if self.settings.nonce_at_refresh else ""
            # What was asked for at one refresh is not asked for at the next (RFC 8707 §2.2).
            kept = replace(grant, nonce=nonce, resource=grant.granted, family=family)
            # Nor does a refresh for less take anything from the next one (RFC 6749 §6).
            kept = replace(kept, scope=refreshable, refresh_scope="")
            self.refresh[token] = replace(kept, ends=time.monotonic() + REFRESH_LIFETIME)
            answer["refresh_token"] = token
        return answer

    # Public pages.

    def document(self, issuer: str) -> dict[str, object]:
        """Return what OpenID Connect Discovery 1.0 §3 asks for."""
        announced = self.settings.response_iss == "announced"
        found: dict[str, object] = {
            "issuer": issuer,
            "authorization_endpoint": f"{issuer}/authorize",
            "token_endpoint": f"{issuer}/token",
            "device_authorization_endpoint": f"{issuer}/device_authorization",
            "revocation_endpoint": f"{issuer}/revoke",
            "jwks_uri": f"{issuer}/jwks",
            "response_types_supported": ["code"],
            "response_modes_supported": ["query"],
            "grant_types_supported": [*GRANTS],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "scopes_supported": ["openid", "email", "profile", "groups", "offline_access"],
            "claims_supported": ["sub", "email", "email_verified", "groups", "preferred_username", "name"],
            "token_endpoint_auth_methods_supported": ["none", "client_secret_basic", "client_secret_post"],
            "code_challenge_methods_supported": ["S256"],
            **({"authorization_response_iss_parameter_supported": True} if announced else {}),
            **({} if self.settings.dpop == "off" else {"dpop_signing_alg_values_supported": ["ES256", "RS256"]}),
            **{name: self._address(value) for name, value in self.settings.metadata.items()},
        }
        return {name: value for name, value in found.items() if value is not None}

    async def discovery(self, request: web.Request) -> web.Response:
        """Answer the discovery document."""
        return web.json_response(self.document(self.url))

    def _address(self, value: Any) -> Any:
        other = self.url.replace("127.0.0.1", "localhost")
        return value.format(url=self.url, other=other) if isinstance(value, str) else value

    def published(self) -> dict[str, object]:
        """Return the published key, in a set."""
        public = jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
        return {"keys": [{**public, "kid": self.kid, "alg": "RS256", "use": "sig"}]}

    async def jwks(self, request: web.Request) -> web.Response:
        """Answer the published keys."""
        return web.json_response(self.published(), headers={"Cache-Control": "public, max-age=300"})

    async def token(self, request: web.Request) -> web.Response:
        """Answer a token request of any of the five grants."""
        form = form_of(await request.post())
        client = self._client(request, form)
        jkt = self._proven_key(request)
        resource = form.get("resource") or form.get("audience", "")
        if resource and self.settings.resources is not None and resource not in self.settings.resources:
            raise Refused("invalid_target", "this client may not ask for that audience")
        match form.get("grant_type"):
            case "authorization_code":
                grant = self._redeem_code(client, form)
            case "refresh_token":
                grant = self._redeem_refresh(client, form, jkt)
            case grant_type if grant_type == DEVICE_GRANT:
                grant = self._redeem_device(client, form)
            case "client_credentials":
                if client not in SECRETS:
                    raise Refused("unauthorized_client", "a public client has no credentials")
                grant = Grant(client, form.get("scope", ""))
            case grant_type if grant_type == TOKEN_EXCHANGE:
                grant = self._exchange(client, form)
            case other:
                raise Refused("unsupported_grant_type", str(other))
        if grant.jkt and grant.jkt != jkt:
            raise Refused("invalid_grant", "bound to another key")
        # A public client's refresh token is bound to the key of its first use (RFC 9449 §5).
        grant = replace(grant, jkt=jkt)
        if resource:
            grant = replace(grant, resource=resource)
        answer = self.tokens(grant)
        if form.get("grant_type") == TOKEN_EXCHANGE:
            answer["issued_token_type"] = ACCESS_TOKEN
        headers = {"Cache-Control": "no-store", "Pragma": "no-cache"}
        if jkt and self.settings.dpop_nonce:
            headers["DPoP-Nonce"] = self.nonce
        return web.json_response(answer, headers=headers)

    def _proven_key(self, request: web.Request) -> str:
        """Return the thumbprint of the key whose DPoP proof a token request has; empty without one (RFC 9449 §4.3)."""
        if self.settings.dpop == "off":
            return ""
        proofs = request.headers.getall("DPoP", [])
        if not proofs and self.settings.dpop == "on":
            return ""
        if len(proofs) != 1:
            raise Refused("invalid_dpop_proof", "one DPoP header is needed")
        try:
            header = jwt.get_unverified_header(proofs[0])
            key = jwt.PyJWK.from_dict(header["jwk"], "ES256")
            claims = jwt.decode(proofs[0], key, ["ES256"], options={"verify_aud": False, "verify_iat": False})
            members = {name: header["jwk"][name] for name in ("crv", "kty", "x", "y")}
        except (jwt.PyJWTError, KeyError, TypeError) as error:
            raise Refused("invalid_dpop_proof", f"{error!r}") from None
        if header.get("typ") != "dpop+jwt" or "d" in header["jwk"]:
            raise Refused("invalid_dpop_proof", "typ or jwk")
        if (claims.get("htm"), claims.get("htu")) != (request.method, f"{self.url}{request.path}"):
            raise Refused("invalid_dpop_proof", "another request")
        if abs(claims.get("iat", 0) - self.now()) > 60:
            raise Refused("invalid_dpop_proof", "iat")
        if self.settings.dpop_nonce:
            current, self.nonce = self.nonce, secrets.token_urlsafe(12)
            if claims.get("nonce") != current:
                raise Refused("use_dpop_nonce", "a nonce is needed", nonce=self.nonce)
        if not claims.get("jti") or claims["jti"] in self.proofs:
            raise Refused("invalid_dpop_proof", "jti")
        self.proofs.add(claims["jti"])
        canonical = json.dumps(members, separators=(",", ":"), sort_keys=True)
        return b64(hashlib.sha256(canonical.encode()).digest())

    def _exchange(self, client: str, form: Mapping[str, str]) -> Grant:
        """RFC 8693: an access token of ours for one with another audience."""
        if form.get("subject_token_type") != ACCESS_TOKEN or not (form.get("audience") or form.get("resource")):
            raise Refused("invalid_request", "subject_token_type, and audience or resource")
        claims = self._own_claims(form.get("subject_token", ""))
        if claims is None or claims.get("client_id") != client:
            raise Refused("invalid_request", "subject_token")
        scope = " ".join(one for one in str(claims["scope"]).split() if one not in ("openid", "offline_access"))
        jkt = str(claims.get("cnf", {}).get("jkt", ""))
        return Grant(client, scope, user=str(claims["sub"]), jkt=jkt)

    def _own_claims(self, token: str) -> dict[str, Any] | None:
        """Return the claims of an access token that our key signed."""
        try:
            return dict(jwt.decode(token, self.key.public_key(), ["RS256"], options={"verify_aud": False}))
        except jwt.InvalidTokenError:
            return None

    def _client(self, request: web.Request, form: Mapping[str, str]) -> str:
        client, secret = credentials_of(request, form)
        if not client:
            raise Refused("invalid_client", "no client_id", 401)
        if client in SECRETS and not hmac.compare_digest(SECRETS[client], secret):
            raise Refused("invalid_client", "wrong secret", 401)
        return client

    def _redeem_code(self, client: str, form: Mapping[str, str]) -> Grant:
        grant = self.codes.pop(form.get("code", ""), None)
        if grant is None or grant.client != client or grant.ends < time.monotonic():
            raise Refused("invalid_grant", "unknown, used or expired code")
        if grant.redirect_uri != form.get("redirect_uri"):
            raise Refused("invalid_grant", "another redirect_uri")
        verifier = form.get("code_verifier", "")
        if b64(hashlib.sha256(verifier.encode()).digest()) != grant.challenge:
            raise Refused("invalid_grant", "code_verifier does not match")
        return grant

    def _redeem_refresh(self, client: str, form: Mapping[str, str], jkt: str) -> Grant:
        token = form.get("refresh_token", "")
        if token in self.spent:  # RFC 9700 §4.14.2: one of the two who have it is a thief
            family = self.spent[token]
            self.refresh = {key: grant for key, grant in self.refresh.items() if grant.family != family}
        grant = self.refresh.get(token)
        if grant is None or grant.client != client or grant.ends < time.monotonic():
            raise Refused("invalid_grant", "unknown, used, revoked or expired refresh token")
        if grant.jkt and grant.jkt != jkt:  # it stays good for its owner
            raise Refused("invalid_grant", "bound to another key")
        # Each refresh token works once; using one again revokes its successors.
        del self.refresh[token]
        self.spent[token] = grant.family
        scope = form.get("scope", grant.scope)
        if not set(scope.split()) <= set(grant.scope.split()):
            raise Refused("invalid_scope", "more than was granted")
        return replace(grant, scope=scope, refresh_scope=grant.scope)

    def _redeem_device(self, client: str, form: Mapping[str, str]) -> Grant:
        device = self.devices.get(form.get("device_code", ""))
        if device is None or device.grant.client != client or device.used:
            raise Refused("invalid_grant", "unknown or used device_code")
        if device.grant.challenge and b64(hashlib.sha256(form.get("code_verifier", "").encode()).digest()) != (
            device.grant.challenge
        ):
            raise Refused("invalid_grant", "code_verifier does not match")
        now = time.monotonic()
        if device.grant.ends < now:
            raise Refused("expired_token")
        early, device.next_poll = now < device.next_poll, now + self.settings.device_interval * 0.9
        if device.state == "denied":
            raise Refused("access_denied")
        if device.state == "pending":
            raise Refused("slow_down" if early else "authorization_pending")
        device.used = True
        return device.grant

    async def device_authorization(self, request: web.Request) -> web.Response:
        """Begin a login on another device (RFC 8628 §3.1)."""
        form = form_of(await request.post())
        client = self._client(request, form)
        resource = form.get("resource") or form.get("audience", "")
        grant = Grant(client, form.get("scope", ""), resource=resource, granted=resource)
        grant.challenge = form.get("code_challenge", "")  # as Keycloak has it; RFC 8628 has no PKCE
        grant.ends = time.monotonic() + self.settings.device_lifetime
        device_code = secrets.token_urlsafe(24)
        letters = "".join(secrets.choice("BCDFGHJKLMNPQRSTVWXZ") for _ in range(8))
        user_code = f"{letters[:4]}-{letters[4:]}"
        self.devices[device_code] = Device(grant)
        self.user_codes[user_code] = device_code
        page = self._address(self.settings.device_page)
        return web.json_response(
            {
                "device_code": device_code,
                "user_code": user_code,
                "verification_uri": page,
                "verification_uri_complete": f"{page}?user_code={user_code}",
                "expires_in": int(self.settings.device_lifetime),
                "interval": self.settings.device_interval,
            },
            headers={"Cache-Control": "no-store"},
        )

    async def device_page(self, request: web.Request) -> web.Response:
        """Show the page on which a person approves a code."""
        code = html.escape(request.query.get("user_code", ""), quote=True)
        return _page("Log in a device", f'<p>Code <input name="user_code" value="{code}"></p>{self._choice()}')

    async def device_answer(self, request: web.Request) -> web.Response:
        """Take the person's answer."""
        form = form_of(await request.post())
        self.answer_device(form.get("user_code", ""), form.get("user", ""), deny=form.get("action") == "deny")
        return _page("Done", "<p>You can close this page.</p>")

    def answer_device(self, user_code: str, user: str, *, deny: bool) -> None:
        """Approve or deny a login. Raises `Refused` for a code that is not waiting."""
        device = self.devices.get(self.user_codes.get(user_code.strip().upper(), ""))
        if device is None or device.state != "pending" or device.grant.ends < time.monotonic():
            raise Refused("invalid_request", "no such code is waiting")
        if not deny and not user:
            raise Refused("invalid_request", "no user")
        device.grant.user = user
        device.state = "denied" if deny else "approved"

    async def authorize(self, request: web.Request) -> web.Response:
        """Log a person in and redirect with a code: at once for `auto_login`, else after the page was answered."""
        query = request.query
        redirect_uri = query.get("redirect_uri", "")
        parsed = urllib.parse.urlsplit(redirect_uri)
        # https: a relay's page; http: a client.
        if parsed.scheme not in ("http", "https") or parsed.hostname not in ("127.0.0.1", "::1", "localhost"):
            # No redirect with an error: an address that was not registered must learn nothing.
            raise Refused("invalid_request", "redirect_uri must be on loopback")
        without_port = parsed._replace(netloc=parsed.hostname).geturl()
        if self.settings.redirect_uris and without_port not in self.settings.redirect_uris:
            raise Refused("invalid_request", "redirect_uri is not registered")
        answer: dict[str, str] = {"state": query["state"]} if "state" in query else {}
        form = form_of(await request.post())
        user = form.get("user") or self.settings.auto_login
        if query.get("response_type") != "code" or "client_id" not in query:
            answer["error"] = "unsupported_response_type"
        elif query.get("code_challenge_method") != "S256" or not query.get("code_challenge"):
            answer |= {"error": "invalid_request", "error_description": "PKCE with S256 is required"}
        elif form.get("action") == "deny":
            answer["error"] = "access_denied"
        elif not user:
            return _page("Log in", self._choice())
        else:
            code = secrets.token_urlsafe(24)
            self.codes[code] = Grant(
                client=query["client_id"],
                scope=query.get("scope", ""),
                user=user,
                resource=query.get("resource") or query.get("audience", ""),
                granted=query.get("resource") or query.get("audience", ""),
                nonce=query.get("nonce", ""),
                jkt=query.get("dpop_jkt", ""),
                challenge=query["code_challenge"],
                redirect_uri=redirect_uri,
                ends=time.monotonic() + CODE_LIFETIME,
            )
            answer |= {"code": code} if self.settings.response_iss == "none" else {"code": code, "iss": self.url}
        separator = "&" if parsed.query else "?"
        return web.Response(
            status=303, headers={"Location": f"{redirect_uri}{separator}{urllib.parse.urlencode(answer)}"}
        )

    def _choice(self) -> str:
        options = "".join(f"<option>{html.escape(user)}</option>" for user in USERS)
        return (
            f'<p>User <select name="user">{options}</select></p>'
            '<button name="action" value="approve">Log in</button> <button name="action" value="deny">Refuse</button>'
        )

    async def revoke(self, request: web.Request) -> web.Response:
        """Forget a refresh token; unknown ones are no error (RFC 7009 §2.2)."""
        form = form_of(await request.post())
        self._client(request, form)
        self.refresh.pop(form.get("token", ""), None)
        return web.Response()

    async def actions(self, request: web.Request) -> web.Response:
        """Answer as the token service of GitHub Actions: a job's token with the one audience that it asks for."""
        if not hmac.compare_digest(request.headers.get("Authorization", ""), f"bearer {ACTIONS_SECRET}"):
            return web.json_response({"message": "no job"}, status=401)
        job = "repo:example/shop:ref:refs/heads/main"
        audience = request.query.get("audience", "https://github.com/example")
        claims = self.claims(job, audience) | {"email": "shop@ci.example.com", "groups": ["platform"]}
        return web.json_response({"count": 1, "value": self.sign(claims)})

    # What tests ask for.

    async def test_mint(self, request: web.Request) -> web.Response:
        """Sign any claims, with any header; a claim of null is left out."""
        asked = await request.json()
        given: dict[str, object] = asked.get("claims", {})
        claims = self.claims(str(given.get("sub", "unnamed")), "arcbridge-relay", asked.get("lifetime")) | given
        claims = {name: value for name, value in claims.items() if value is not None}
        token = self.sign(claims, asked.get("headers", {}), foreign=asked.get("foreign", False))
        return web.json_response({"token": token})

    async def test_settings(self, request: web.Request) -> web.Response:
        """Change settings."""
        try:
            self.settings = replace(self.settings, **await request.json())
        except TypeError as error:
            raise Refused("invalid_request", str(error)) from None
        return web.json_response(asdict(self.settings))

    async def test_device(self, request: web.Request) -> web.Response:
        """Answer a device login."""
        asked = await request.json()
        self.answer_device(asked["user_code"], asked.get("user", ""), deny=bool(asked.get("deny")))
        return web.json_response({})

    async def test_requests(self, request: web.Request) -> web.Response:
        """Answer how often each public path was asked."""
        return web.json_response(self.requests)


class ManyIssuers(AppThread):
    """Discovery and the key of any number of issuers below one URL, for tables of configurations; nobody logs in here.

    with ManyIssuers() as issuers:
        issuers.url("a")                      # https://127.0.0.1:PORT/a
        issuers.mint("a", {"sub": "alice"})   # these claims and `iss`, and no other
    """

    def __init__(self) -> None:
        super().__init__()
        self._server = IssuerServer(None, Settings())
        self.routes: list[web.RouteDef] = []
        """What answers besides, before the documents of the issuers."""
        self.sources: dict[str, str] = {}
        """Distributed claims (OpenID Connect Core 1.0 §5.6.2): a JWT for each path below `/claims/`."""

    def served(self) -> Sequence[web.Application]:
        """Return the one application."""
        app = web.Application()
        app.add_routes([*self.routes, web.get("/claims/{path}", self._claims), web.get("/{path:.*}", self._document)])
        return [app]

    def url(self, name: str) -> str:
        """Return the issuer of this name."""
        return f"{self.urls[0]}/{name}"

    def source(self, path: str, text: str) -> dict[str, str]:
        """Serve a JWT with a distributed claim at `/claims/PATH`, and return what `_claim_sources` says of it."""
        self.sources[path] = text
        return {"endpoint": self.url(f"claims/{path}"), "access_token": CLAIMS_TOKEN}

    def document(self, path: str) -> dict[str, object]:
        """Return what is answered to a path: the discovery document of an issuer, or the key of all."""
        name, found, _ = path.partition("/.well-known/openid-configuration")
        return self._server.document(self.url(name.strip("/"))) if found else self._server.published()

    def read(self, token: str, audience: str) -> dict[str, Any]:
        """Return the claims of a token of this server for an audience. Raises jwt.PyJWTError."""
        return dict(jwt.decode(token, self._server.key.public_key(), ["RS256"], audience=audience))

    def mint(self, name: str, claims: Mapping[str, Any], issuer: str = "") -> str:
        """Return a signed token of an issuer, or of `issuer` instead."""
        return self._server.sign({**claims, "iss": issuer or self.url(name)})

    async def _document(self, request: web.Request) -> web.Response:
        return web.json_response(self.document(request.path))

    async def _claims(self, request: web.Request) -> web.Response:
        """Without its token, or for a path that has none, the answer is empty."""
        allowed = request.headers.get("Authorization", "") == f"Bearer {CLAIMS_TOKEN}"
        text = self.sources.get(request.match_info["path"], "") if allowed else ""
        return web.Response(text=text, status=200 if text else 404, content_type="application/json")


def _new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def _kept_key(state: Path) -> rsa.RSAPrivateKey:
    """Return the key that the directory has, or a new one."""
    state.mkdir(parents=True, exist_ok=True)
    path = state / "key.pem"
    if not path.exists():
        path.touch(mode=0o600)
        private = serialization.PrivateFormat.PKCS8
        path.write_bytes(_new_key().private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()))
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    return key


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def form_of(fields: Mapping[str, object]) -> dict[str, str]:
    return {name: value for name, value in fields.items() if isinstance(value, str)}


def credentials_of(request: web.Request, form: Mapping[str, str]) -> tuple[str, str]:
    """Return client id and secret of a request, by its header or its form; empty without one (RFC 6749 §2.3.1)."""
    scheme, _, basic = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return form.get("client_id", ""), form.get("client_secret", "")
    client, _, secret = base64.b64decode(basic).decode().partition(":")
    return urllib.parse.unquote_plus(client), urllib.parse.unquote_plus(secret)


def _page(title: str, body: str) -> web.Response:
    head = f'<!doctype html><meta charset="utf-8"><title>{title}</title><h1>{title}</h1>'
    return web.Response(text=f'{head}<form method="post">{body}</form>', content_type="text/html")

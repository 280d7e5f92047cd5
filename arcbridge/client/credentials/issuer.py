"""The OIDC issuer as a login sees it: discovery, and forms posted to its endpoints.

Nothing is specific to a vendor. HTTPS only, no redirects, bounded answers; the issuer that discovery names must be
the one that was configured (OpenID Connect Discovery 1.0 §4.3). Invariant: what goes to an endpoint goes to the
issuer's own origin or to one that the user has accepted, because a hostile issuer may name the endpoints of another one
(docs/threats.md#B31). With a key, forms to the token endpoint of an issuer
that does DPoP carry a proof of it (RFC 9449), so that access and refresh tokens are bound to the key.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode, urlsplit

from arcbridge.client.credentials.client_authentication import ClientAuthentication, IssuerEndpoints
from arcbridge.client.credentials.jwt_unverified import read_unverified
from arcbridge.errors import ConfigError, Unauthenticated, Unreachable, UntrustedCertificate
from arcbridge.net.address import check_origins, issuer_origin, origin_of
from arcbridge.net.fetch import HttpFetcher
from arcbridge.net.system_trust import read_cas
from arcbridge.observe.untrusted_text import clean
from arcbridge.untrusted_json import read_json_object

if TYPE_CHECKING:
    from arcbridge.identity.proof import ProofKey
    from arcbridge.settings.config import LoginConfig

DEADLINE = 20.0
"""Seconds for one request."""
_ENDPOINTS = ("authorization", "token", "device_authorization", "revocation")
_CODE_LIMIT = 64
_DESCRIPTION_LIMIT = 200
"""Bytes of an issuer's word and of its own explanation, which messages quote."""
_URL_LIMIT = 2048
_NONCE_LIMIT = 1024
"""Characters of a nonce that the issuer wants in DPoP proofs."""


class _IssuerReply(NamedTuple):
    status: int
    document: dict[str, Any]
    dpop_nonce: str
    """What the issuer wants in the next DPoP proof; empty: it did not say."""


class IssuerError(Exception):
    """The issuer answered with an OAuth error; `code` is its word (RFC 6749 §5.2, RFC 8628 §3.5).

    Both are cleaned here: one line without control characters, and short.
    """

    def __init__(self, code: str, description: str = "") -> None:
        self.code = clean(code, _CODE_LIMIT)
        self.description = clean(description, _DESCRIPTION_LIMIT)
        super().__init__(self.code)

    @property
    def words(self) -> str:
        """The issuer's word and its own explanation, for messages."""
        return f"{self.code}: {self.description}" if self.description else self.code


class Issuer:
    """One issuer. Use as an async context manager: it owns an HTTP session.

    `authentication` proves to it who the client is. `key` gives what tokens are to be bound to, and is called where
    the issuer does DPoP and `login.dpop` is on, or `login.pop` is (the way of Entra ID, which no discovery document
    tells of); None: tokens are bound to nothing. `clock`: unix seconds.
    """

    def __init__(
        self,
        config: LoginConfig,
        authentication: ClientAuthentication,
        *,
        key: Callable[[], ProofKey] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_origins("login.issuer_origins", config.issuer_origins)
        self.url = config.issuer
        self.origins = (issuer_origin(config.issuer, "login.issuer"), *config.issuer_origins)
        """Where its endpoints and its pages may be."""
        self._config = config
        self._ca_pem = None if config.ca_file is None else read_cas(config.ca_file, "login.ca_file")
        self._fetcher = HttpFetcher(deadline=DEADLINE, keep=True)
        self._authentication = authentication
        self._endpoints: IssuerEndpoints | None = None
        self._find_key = key
        self._clock = clock
        self._dpop_nonce = ""

    async def __aenter__(self) -> Issuer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._fetcher.close()

    async def endpoints(self) -> IssuerEndpoints:
        """Find the endpoints by discovery, once.

        Raises Unreachable; ConfigError when the issuer is another one, or has endpoints without an origin, or at one
        that the user has not accepted.
        """
        if self._endpoints is None:
            url = self.url.rstrip("/") + "/.well-known/openid-configuration"
            status, document, _ = await self._request("GET", url, {}, {})
            if status != 200:
                raise Unreachable(f"the issuer {self.url} has no discovery document (status {status})")
            if document.get("issuer") != self.url:
                raise ConfigError(
                    f"login.issuer: {self.url} names itself differently in its discovery document; "
                    "use its own spelling, trailing slash included"
                )
            methods = "token_endpoint_auth_methods_supported"
            found = IssuerEndpoints(
                issuer=self.url,
                **{name: _endpoint(document, f"{name}_endpoint") for name in _ENDPOINTS},
                dpop=_lists(document, "dpop_signing_alg_values_supported", "ES256"),
                secret_in_form=_lists(document, methods, "client_secret_post")
                and not _lists(document, methods, "client_secret_basic"),
                response_iss=document.get("authorization_response_iss_parameter_supported") is True,
            )
            if not found.token:
                raise Unreachable(f"the issuer {self.url} names no token endpoint")
            self._check_origins(found)
            self._endpoints = found
        return self._endpoints

    def _check_origins(self, found: IssuerEndpoints) -> None:
        foreign: dict[str, list[str]] = {}
        for name in _ENDPOINTS:
            if (url := getattr(found, name)) and not self.has(url):
                foreign.setdefault(origin_of(url), []).append(f"{name}_endpoint")
        if not foreign:
            return
        named = " and ".join(f"{', '.join(names)} at {where}" for where, names in foreign.items())
        raise ConfigError(
            f"login.issuer_origins: the issuer {self.url} names its {named}, and accepted are "
            f"{' and '.join(self.origins)} alone. What is meant for one organisation could go to another one; ask the "
            f"issuer's operator, and if that is right {self.how_to_accept(*foreign)}"
        )

    def has(self, url: str) -> bool:
        """Return whether a URL is at the issuer's own origin, or at one that the user has accepted."""
        try:
            return origin_of(url) in self.origins
        except ConfigError:
            return False

    def how_to_accept(self, *origins: str) -> str:
        """Return what a user does so that these count beside those that do, for messages."""
        wanted = tuple(dict.fromkeys((*self.origins[1:], *origins)))
        flags = " ".join(f"--issuer-origin {where}" for where in wanted)
        listed = ", ".join(f'"{where}"' for where in wanted)
        return (
            f"log in with {flags} (where your settings file has login.issuer, write issuer_origins = [{listed}] below "
            "[login] there), or with --renew-trust when the relay names it"
        )

    async def ask(self, form: Mapping[str, str]) -> dict[str, Any]:
        """Send a form of the client to the token endpoint, and return the reply. Raises as `post` does; Unauthenticated
        also where the id token in it is another issuer's or another client's."""
        answer = await self.post((await self.endpoints()).token, form)
        check_id_token(answer, self.url, self._config.client_id)
        return answer

    async def post(self, url: str, form: Mapping[str, str]) -> dict[str, Any]:
        """Send a form of the client to an endpoint, and return the document of a good answer.

        Raises IssuerError for an OAuth error, Unreachable for everything else, and what the proof of the client raises.
        """
        reply = await self._attempt(url, form)
        if reply.document.get("error") == "use_dpop_nonce" and reply.dpop_nonce:
            # The issuer says only now which nonce it wants (RFC 9449 §8). A second refusal is an error like others.
            reply = await self._attempt(url, form)
        if reply.status == 200:
            return reply.document
        code, description = reply.document.get("error"), reply.document.get("error_description")
        if isinstance(code, str) and code:
            raise IssuerError(code, description if isinstance(description, str) else "")
        raise Unreachable(f"the issuer {self.url} answered with status {reply.status}; try again")

    async def _attempt(self, url: str, form: Mapping[str, str]) -> _IssuerReply:
        """Send a form once: an issuer takes an assertion, and a proof of the key, once (RFC 7523 §3, `jti`)."""
        config, endpoints = self._config, await self.endpoints()
        fields, headers = await self._authentication.proof(endpoints, url)
        sent = {**form, **fields}
        if self._find_key is not None and url == endpoints.token:
            if config.pop:
                sent |= {"token_type": "pop", "req_cnf": self._find_key().req_cnf()}
            if config.dpop and endpoints.dpop:
                headers["DPoP"] = self._find_key().dpop("POST", url, self._clock(), nonce=self._dpop_nonce or None)
        return await self._request("POST", url, sent, headers)

    async def _request(
        self, method: str, url: str, form: Mapping[str, str], headers: Mapping[str, str]
    ) -> _IssuerReply:
        headers = {"Accept": "application/json", **headers}
        if form:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        try:
            reply = await self._fetcher.ask(method, url, self._ca_pem, headers=headers, body=urlencode(form).encode())
        except UntrustedCertificate as error:
            raise Unreachable(
                f"the issuer {self.url} cannot be trusted ({error.message}); set login.ca_file (--oidc-ca-file)"
            ) from error
        except Unreachable as error:
            raise Unreachable(
                f"the issuer {self.url} cannot be reached ({error.detail or error.message}); check its address and "
                "this machine's network"
            ) from error
        nonce = reply.dpop_nonce if "DPoP" in headers else ""
        if not (len(nonce) <= _NONCE_LIMIT and nonce.isascii() and nonce.isprintable()):
            nonce = ""
        self._dpop_nonce = nonce or self._dpop_nonce
        return _IssuerReply(reply.status, read_json_object(reply.body), nonce)


def page_of(value: object) -> str:
    """Return a URL that an issuer gives for a browser, as it may be shown; empty where it is none.

    A URL is ASCII (RFC 3986 §2): what else is in it could move the cursor of the terminal that shows it.
    """
    if not isinstance(value, str) or len(value) > _URL_LIMIT or not (value.isascii() and value.isprintable()):
        return ""
    try:
        parts = urlsplit(value)
    except ValueError:
        return ""
    return value if parts.scheme in ("https", "http") and parts.hostname and " " not in value else ""


def check_id_token(answer: Mapping[str, object], issuer: str, client_id: str) -> None:
    """Raise Unauthenticated for a token endpoint's answer whose id token is another issuer's, or for another client.

    The token came over TLS from the issuer, so its signature may go unchecked here; whose it is may not (OpenID Connect
    Core §3.1.3.7). None of such an answer may be kept or used.
    """
    id_token = answer.get("id_token")
    if id_token is None:
        return
    claims = read_unverified(id_token if isinstance(id_token, str) else "")
    if claims.issuer != issuer or client_id not in claims.audiences:
        raise Unauthenticated(
            f"the issuer {issuer} answered with an id token that is not its own, or not for the client {client_id} "
            "(its iss or aud is another one), so nothing of that answer was kept; tell the issuer's operator"
        )


def _endpoint(document: Mapping[str, Any], key: str) -> str:
    url = page_of(document.get(key))
    if urlsplit(url).scheme != "https":
        return ""
    try:
        origin_of(url)
    except ConfigError as error:
        raise ConfigError(f"the issuer's {key} cannot be used: {error.message}; tell the issuer's operator") from None
    return url


def _lists(document: Mapping[str, Any], key: str, value: str) -> bool:
    listed = document.get(key)
    return isinstance(listed, list) and value in listed

"""The OIDC issuer as a login sees it: discovery, and forms posted to its endpoints.

Nothing is specific to a vendor. HTTPS only, no redirects, bounded answers; the issuer that discovery names must be
the one that was configured (OpenID Connect Discovery 1.0 §4.3). Invariant: what goes to an endpoint goes to the
issuer's own origin or to one that the user has accepted, because a hostile issuer may name the endpoints of another one
(docs/threats.md#B31). With a key, forms to the token endpoint of an issuer
that does DPoP carry a proof of it (RFC 9449), so that access and refresh tokens are bound to the key.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from arcbridge.client.credentials.jwt_unverified import read_unverified
from arcbridge.errors import ConfigError, StateError, Unauthenticated, Unreachable
from arcbridge.net.address import check_origins, origin_of
from arcbridge.net.http_connector import DialingConnector, NotConnected
from arcbridge.net.http_errors import reason
from arcbridge.net.system_trust import trusting_context
from arcbridge.observe.untrusted_text import clean
from arcbridge.untrusted_json import read_json_object

if TYPE_CHECKING:
    from arcbridge.identity.proof import ProofKey
    from arcbridge.settings.config import LoginConfig

DEADLINE = 20.0
"""Seconds for one request."""
_LIMIT = 1024 * 1024
_CODE_LIMIT = 64
_DESCRIPTION_LIMIT = 200
"""Bytes of an issuer's word and of its own explanation, which messages quote."""
_URL_LIMIT = 2048
_NONCE_LIMIT = 1024
"""Characters of a nonce that the issuer wants in DPoP proofs."""


@dataclass(frozen=True, slots=True)
class IssuerEndpoints:
    """What discovery names; empty where the issuer has none."""

    token: str
    issuer: str = ""
    """The issuer's own URL."""
    authorization: str = ""
    device_authorization: str = ""
    revocation: str = ""
    """RFC 7009."""
    dpop: bool = False
    """Whether the token endpoint takes DPoP proofs with ES256 (RFC 9449 §5.1)."""
    secret_in_form: bool = False
    """Whether a client's secret belongs into the form, because the issuer takes no HTTP Basic (RFC 6749 §2.3.1)."""
    response_iss: bool = False
    """Whether the issuer announces that it names itself in its answers through the browser (RFC 9207 §3)."""

    def foreign_origins(self) -> dict[str, list[str]]:
        """Return the origins of endpoints that are not the issuer's own, each with the endpoints' names."""
        found: dict[str, list[str]] = {}
        for name in ("authorization", "token", "device_authorization", "revocation"):
            url = getattr(self, name)
            if url and origin_of(url) != origin_of(self.issuer):
                found.setdefault(origin_of(url), []).append(f"{name}_endpoint")
        return found


@dataclass(frozen=True, slots=True)
class ClientProof:
    """What one request carries beside its grant, so that the issuer knows the client."""

    form: dict[str, str]
    headers: dict[str, str]


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

    `origins`: those besides its own at which it may have endpoints (`login.issuer_origins`). `key` gives what tokens
    are to be bound to, and is called once, where the issuer does DPoP; None: nothing. `pop`: the same in the way of
    Entra ID, which no discovery document tells of. `clock`: unix seconds.
    """

    def __init__(
        self,
        url: str,
        ca_file: Path | None = None,
        *,
        origins: tuple[str, ...] = (),
        key: Callable[[], ProofKey] | None = None,
        pop: Callable[[], ProofKey] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        try:
            parts = urlsplit(url)
        except ValueError:
            raise ConfigError("login.issuer: it is not an https:// URL") from None
        # Before any error quotes it: such a part may be a secret (OpenID Connect Discovery §4 has no place for them).
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ConfigError("login.issuer: an issuer's URL has no user information, query or fragment")
        if parts.scheme != "https" or not parts.hostname:
            raise ConfigError(f"login.issuer: {url!r} is not an https:// URL")
        check_origins("login.issuer_origins", origins)
        try:
            own = origin_of(url)
        except ConfigError as error:
            raise ConfigError(f"login.issuer: {error.message}") from None
        self.url = url
        self.origins = (own, *origins)
        """Where its endpoints and its pages may be."""
        self._context = _context(ca_file)
        self._session: aiohttp.ClientSession | None = None
        self._endpoints: IssuerEndpoints | None = None
        self._find_key = key
        self._find_pop_key = pop
        self._key: ProofKey | None = None
        self._clock = clock
        self._dpop_nonce = ""

    @classmethod
    def of(cls, login: LoginConfig, key: Callable[[], ProofKey], clock: Callable[[], float]) -> Issuer:
        """Return the issuer of a login's settings, at which tokens are bound to `key` as the settings say."""
        dpop, pop = key if login.dpop else None, key if login.pop else None
        return cls(login.issuer, login.ca_file, origins=login.issuer_origins, key=dpop, pop=pop, clock=clock)

    async def __aenter__(self) -> Issuer:
        self._session = aiohttp.ClientSession(
            connector=DialingConnector(ssl=self._context),
            timeout=aiohttp.ClientTimeout(total=DEADLINE),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def endpoints(self) -> IssuerEndpoints:
        """Find the endpoints by discovery, once.

        Raises Unreachable; ConfigError when the issuer is another one, or has endpoints without an origin, or at one
        that the user has not accepted.
        """
        if self._endpoints is None:
            status, document, _ = await self._request(
                "GET", self.url.rstrip("/") + "/.well-known/openid-configuration", None
            )
            if status != 200:
                raise Unreachable(f"the issuer {self.url} has no discovery document (status {status})")
            if document.get("issuer") != self.url:
                raise ConfigError(
                    f"login.issuer: {self.url} names itself differently in its discovery document; "
                    "use its own spelling, trailing slash included"
                )
            found = IssuerEndpoints(
                token=_endpoint(document, "token_endpoint"),
                issuer=self.url,
                authorization=_endpoint(document, "authorization_endpoint"),
                device_authorization=_endpoint(document, "device_authorization_endpoint"),
                revocation=_endpoint(document, "revocation_endpoint"),
                dpop=_lists(document, "dpop_signing_alg_values_supported", "ES256"),
                secret_in_form=_lists(document, "token_endpoint_auth_methods_supported", "client_secret_post")
                and not _lists(document, "token_endpoint_auth_methods_supported", "client_secret_basic"),
                response_iss=document.get("authorization_response_iss_parameter_supported") is True,
            )
            if not found.token:
                raise Unreachable(f"the issuer {self.url} names no token endpoint")
            self._check_origins(found)
            self._endpoints = found
        return self._endpoints

    def _check_origins(self, found: IssuerEndpoints) -> None:
        foreign = {where: names for where, names in found.foreign_origins().items() if where not in self.origins}
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

    async def post(
        self,
        url: str,
        form: Mapping[str, str],
        proof: Callable[[], Awaitable[ClientProof]] | None = None,
        *,
        bind: bool = True,
    ) -> dict[str, Any]:
        """Post a form and return the answer; raises IssuerError for an OAuth error, Unreachable for everything else.

        `proof` gives what the client proves itself by. It is called for each attempt, because an issuer takes an
        assertion once (RFC 7523 §3, `jti`); what it raises is raised. `bind`: with a proof of the key, if there is one.
        """
        if not bind:
            self._key = None  # the next form asks for it again
            return _judged(self.url, await self._attempt(url, form, proof, bind=False))
        answer = await self._attempt(url, form, proof)
        if answer.document.get("error") == "use_dpop_nonce" and answer.dpop_nonce:
            # The issuer says only now which nonce it wants (RFC 9449 §8). A second refusal is an error like others.
            answer = await self._attempt(url, form, proof)
        return _judged(self.url, answer)

    async def _attempt(
        self,
        url: str,
        form: Mapping[str, str],
        proof: Callable[[], Awaitable[ClientProof]] | None,
        *,
        bind: bool = True,
    ) -> _IssuerReply:
        client = ClientProof({}, {}) if proof is None else await proof()
        if bind and self._find_pop_key is not None and self._endpoints is not None and url == self._endpoints.token:
            form = {**form, "token_type": "pop", "req_cnf": self._find_pop_key().req_cnf()}
        dpop = self._dpop(url) if bind else ""
        return await self._request("POST", url, {**form, **client.form}, dpop, client.headers)

    def _dpop(self, url: str) -> str:
        """Make a new proof for a form to `url`, each good for one request; empty where none is to be sent."""
        endpoints = self._endpoints
        if self._find_key is None or endpoints is None or not endpoints.dpop or url != endpoints.token:
            return ""
        if self._key is None:
            self._key = self._find_key()
        return self._key.dpop("POST", url, self._clock(), nonce=self._dpop_nonce or None)

    async def _request(
        self,
        method: str,
        url: str,
        form: Mapping[str, str] | None,
        dpop: str = "",
        more: Mapping[str, str] | None = None,
    ) -> _IssuerReply:
        assert self._session is not None, "use `async with`"
        headers = {"Accept": "application/json", **({"DPoP": dpop} if dpop else {}), **(more or {})}
        try:
            async with self._session.request(
                method, url, data=form, allow_redirects=False, headers=headers
            ) as response:
                body = b""
                async for chunk in response.content.iter_chunked(65536):
                    body += chunk
                    if len(body) > _LIMIT:
                        raise Unreachable(f"the issuer {self.url} answered more than {_LIMIT} bytes")
                status, nonce = response.status, response.headers.get("DPoP-Nonce", "") if dpop else ""
        except TimeoutError as error:
            raise Unreachable(f"the issuer {self.url} did not answer within {DEADLINE:.0f} s") from error
        except aiohttp.ClientSSLError as error:
            raise Unreachable(
                f"the issuer's certificate is not trusted for {urlsplit(url).hostname}; "
                "set login.ca_file (--oidc-ca-file)"
            ) from error
        except (aiohttp.ClientError, NotConnected, OSError) as error:
            raise Unreachable(
                f"the issuer {self.url} cannot be reached ({reason(error)}); check its address and this machine's "
                "network"
            ) from error
        if not (len(nonce) <= _NONCE_LIMIT and nonce.isascii() and nonce.isprintable()):
            nonce = ""
        self._dpop_nonce = nonce or self._dpop_nonce
        return _IssuerReply(status, read_json_object(body, _LIMIT), nonce)


def _judged(url: str, answer: _IssuerReply) -> dict[str, Any]:
    """Return the document of a good answer. Raises as `Issuer.post` does."""
    if answer.status == 200:
        return answer.document
    code = answer.document.get("error")
    if isinstance(code, str) and code:
        description = answer.document.get("error_description")
        raise IssuerError(code, description if isinstance(description, str) else "")
    raise Unreachable(f"the issuer {url} answered with status {answer.status}; try again")


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


def _context(ca_file: Path | None) -> ssl.SSLContext:
    if ca_file is None:
        return trusting_context()
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as error:
        raise ConfigError(f"login.ca_file: {ca_file} holds no PEM certificate") from error
    except OSError as error:
        raise StateError(f"login.ca_file: cannot read {ca_file}: {error.strerror}") from error

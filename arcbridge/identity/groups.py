"""Groups that a verified token does not hold itself, but points to: at Microsoft Graph, or as a distributed claim.

A token of Entra ID whose issuer has a `[graph.NAME]` in the settings gets its groups from there (`identity.graph`), and
never from an address that the token gives. For other issuers this is the distributed claim of OpenID Connect Core 1.0
§5.6.2, as kube-apiserver resolves it: the one claim that `claimMappings.groups` names, when it is absent; the token's
`_claim_sources` say where a JWT with it is. That place is asked only where it belongs to the issuer itself or to the
origins that the settings name, over HTTPS and without redirects. Invariant: a token that points elsewhere becomes an
identity with all its groups, or none.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlsplit

from arcbridge.errors import ConfigError, Unreachable
from arcbridge.identity import graph
from arcbridge.identity.authentication import AuthenticationConfig, IssuerConfig
from arcbridge.identity.fetch import SendRequest
from arcbridge.identity.lookups import Lookups
from arcbridge.identity.refusal import GroupsUnavailable, TokenRefused
from arcbridge.refusals import RefusalRule

if TYPE_CHECKING:
    from arcbridge.settings.config import GraphConfig

MAX_ENDPOINT = 2048
"""Characters of an endpoint in a token."""
KEEP = 60.0
"""Seconds for which the groups of one token are remembered; the verifier remembers its result no longer."""
_BEARER: Final = re.compile(r"[A-Za-z0-9\-._~+/]{1,16384}=*", re.ASCII)
"""RFC 6750 §2.1."""

Verify = Callable[[str], Awaitable[Mapping[str, Any]]]
"""Verifies a JWT of the same issuer and returns its claims. Raises as `TokenVerifier.verify`."""


class Source(NamedTuple):
    """Where a distributed claim is, as a token says it."""

    endpoint: str
    access_token: str


def check(
    directories: Mapping[str, GraphConfig], claim_sources: Iterable[str], issuers: AuthenticationConfig | None
) -> None:
    """Check the settings that need no file. Raises ConfigError that names the key. `issuers` None: there is no
    authentication file; empty: it could not be read, and says nothing of the settings."""
    named: set[str] = set()
    for name, settings in directories.items():
        graph.check(name, settings)
        for n, url in enumerate(settings.issuers):
            at = f"graph.{name}.issuers[{n}]"
            if issuers is not None and issuers.issuers and issuers.issuer(url) is None:
                raise ConfigError(f"{at}: {url} is no issuer.url of the authentication file")
            if url in named:
                raise ConfigError(f"{at}: {url} has another [graph.…] already")
        named.update(settings.issuers)
    for index, url in enumerate(claim_sources):
        _setting_origin(index, url)
        if issuers is None:
            raise ConfigError(f"claim_sources[{index}]: it is about tokens of issuers, and there is no authentication")
    if issuers is None and directories:
        raise ConfigError(
            f"graph.{next(iter(directories))}: it is about tokens of issuers, and there is no authentication"
        )


class GroupSources:
    """All places where groups may be looked up, by the settings of one end. `clock`: unix; `monotonic`: seconds."""

    def __init__(
        self,
        ask: SendRequest,
        *,
        directories: Mapping[str, GraphConfig] | None = None,
        claim_sources: Iterable[str] = (),
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`directories` and `claim_sources` have passed `check`. Raises ConfigError for a CA that cannot be read."""
        self._ask = ask
        self._allowed = frozenset(_setting_origin(n, url) for n, url in enumerate(claim_sources))
        self._directories: dict[str, graph.Directory] = {}
        for name, settings in (directories or {}).items():
            directory = graph.Directory(name, settings, ask, clock=clock, monotonic=monotonic)
            self._directories |= dict.fromkeys(settings.issuers, directory)
        self._monotonic = monotonic
        self._places: dict[tuple[str, str], Lookups] = {}
        """The look-ups of distributed claims, by issuer and origin: one that stalls holds up no other. The settings
        bound their number, since an origin is one of the issuer's own or of `claim_sources`."""

    @property
    def directories(self) -> tuple[graph.Directory, ...]:
        """All directories, in the order of the settings."""
        return tuple(dict.fromkeys(self._directories.values()))

    @property
    def all_lookups(self) -> tuple[Lookups, ...]:
        """For metrics."""
        return (*self._places.values(), *(one.lookups for one in self.directories))

    async def expand(
        self, issuer: IssuerConfig, claims: dict[str, Any], digest: bytes, verify: Verify
    ) -> dict[str, Any]:
        """Return the claims with their groups, where the token (SHA-256 `digest`) points elsewhere for them.

        Raises TokenRefused, or GroupsUnavailable where the other place does not answer.
        """
        directory = self._directories.get(issuer.url)
        if directory is not None:
            # An expression, too, is given the groups under the name that it knows.
            wanted = (issuer.groups is not None and issuer.groups.claim == "groups") or (
                issuer.expressions is not None and issuer.expressions.may_read("groups")
            )
            if wanted and graph.points_elsewhere(claims):
                return {**claims, "groups": list(await directory.groups(claims))}
            return claims
        if issuer.groups is None or (source := source_of(claims, issuer.groups.claim)) is None:
            return claims
        where = self._origin_of(issuer, source.endpoint)
        lookups = self._places.get((issuer.url, where))
        if lookups is None:
            lookups = self._places[issuer.url, where] = Lookups(self._monotonic, KEEP)
        look = partial(self._fetch, issuer, issuer.groups.claim, source, claims.get("sub"), verify)
        names = await lookups.get((issuer.groups.claim, digest), look, "the place that the token names for its groups")
        return {**claims, issuer.groups.claim: list(names)}

    def forget(self) -> None:
        """Forget what was looked up for tokens: other settings may name another claim, or trust other keys."""
        for lookups in self._places.values():
            lookups.forget()

    async def close(self) -> None:
        """End what is under way."""
        for lookups in self._places.values():
            await lookups.close()
        for directory in self.directories:
            await directory.close()

    # -- distributed claims -------------------------------------------------------------------------------------------

    def _origin_of(self, issuer: IssuerConfig, endpoint: str) -> str:
        """Return the origin of an endpoint in a token, where it may be asked. Raises TokenRefused."""
        own = {_origin(issuer.url), _origin(issuer.discovery_url)} - {""}
        where = _origin(endpoint)
        if not where or where not in own | self._allowed:
            raise TokenRefused(
                RefusalRule.CLAIMS_GROUPS_SOURCE,
                "the token says that its groups are at a place that is not asked; the operator can name it in "
                "claim_sources",
            )
        return where

    async def _fetch(
        self, issuer: IssuerConfig, claim: str, source: Source, subject: object, verify: Verify
    ) -> tuple[str, ...]:
        headers = {"Accept": "application/jwt"}
        if source.access_token:
            headers["Authorization"] = f"Bearer {source.access_token}"
        try:
            reply = await self._ask("GET", source.endpoint, issuer.ca_pem, headers=headers)
        except Unreachable as error:
            raise GroupsUnavailable("the place that the token names does not answer", detail=error.message) from error
        if reply.status != 200:
            raise GroupsUnavailable(f"the place that the token names answered with status {reply.status}")
        found = await verify(reply.body.decode("ascii", "replace").strip())
        if found.get("sub", subject) != subject:  # OpenID Connect Core §5.6.2 advises its source to leave sub out
            raise TokenRefused(RefusalRule.CLAIMS_GROUPS_SUBJECT, "the groups that were looked up are another user's")
        value = found.get(claim)
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TokenRefused(RefusalRule.CLAIMS_GROUPS, "the groups that were looked up are not a list of names")
        return tuple(names)


def source_of(claims: Mapping[str, Any], claim: str) -> Source | None:
    """Return where a distributed claim is; None where the token has the claim, or does not point to it.

    An aggregated claim, whose JWT is in the token, is not resolved, as kube-apiserver does it; `identity.claims`
    refuses a token that has one for its groups. `claims` have passed `check_pointers`. Raises TokenRefused for an
    address or token that is not asked.
    """
    if claim in claims or "_claim_names" not in claims:
        return None
    if "_claim_sources" not in claims:
        raise _malformed()
    name = (claims["_claim_names"] or {}).get(claim)
    source = None if name is None else claims["_claim_sources"][name]
    if source is None:
        return None
    endpoint, access_token = source.get("endpoint") or "", source.get("access_token") or ""
    if len(endpoint) > MAX_ENDPOINT or (access_token and _BEARER.fullmatch(access_token) is None):
        raise _malformed()
    return Source(endpoint, access_token) if endpoint else None


def check_pointers(claims: Mapping[str, Any]) -> None:
    """Refuse a token whose pointers to claims elsewhere are malformed, whether or not a claim is read through them.

    kube-apiserver does so for every token. What is null counts as absent. Raises TokenRefused.
    """
    names, sources = claims.get("_claim_names"), claims.get("_claim_sources")
    names, sources = {} if names is None else names, {} if sources is None else sources
    if not isinstance(names, Mapping) or not isinstance(sources, Mapping):
        raise _malformed()
    if not all(isinstance(name, str) and name and name in sources for name in names.values()):
        raise _malformed()
    for source in sources.values():
        if not isinstance(source, Mapping | None):
            raise _malformed()
        if source and not all(isinstance(source.get(name), str | None) for name in ("endpoint", "access_token")):
            raise _malformed()


def _malformed() -> TokenRefused:
    return TokenRefused(RefusalRule.CLAIMS_GROUPS_POINTER, "the token's pointer to its groups is malformed")


def _origin(url: str) -> str:
    """Return `host:port` of an https URL; empty for anything else. A URL that two parsers could read differently is
    none."""
    if not url.isascii() or not url.isprintable() or any(c in url for c in ' \\"<>`{}|^#'):
        return ""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return ""
    if not url.startswith("https://") or not host or "@" in parts.netloc:
        return ""
    return f"{host}:{443 if port is None else port}"


def _setting_origin(index: int, url: str) -> str:
    found = _origin(url)
    if not found or urlsplit(url).path not in ("", "/") or urlsplit(url).query:
        raise ConfigError(f"claim_sources[{index}]: must be https://host:port of a server, without a path")
    return found

"""From a token to an identity: JWT verification by the configuration alone.

Nothing in the token decides how it is verified. `alg` must be one that the *key* allows, `kid` only selects, and
`jku`, `x5u`, `x5c`, `jwk` are not looked at; `crit` is refused, whatever it lists (RFC 7515 §4.1.11: none
is understood). Keys that occur twice in header or payload are refused, because two parsers would not agree on them.

The order is: size, shape, header, issuer (exact), key, signature, kind, times, audience, groups that are elsewhere
(`identity.groups`), claims. Results are kept by SHA-256 of the token for 60 s at most, never past `exp`, and not past a
change of the issuer's keys.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jwt

from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.identity.authentication import AuthenticationConfig, IssuerConfig
from arcbridge.identity.claims import Identity, map_claims
from arcbridge.identity.fetch import Fetch
from arcbridge.identity.groups import GroupSources, check_pointers
from arcbridge.identity.keys import KeySet
from arcbridge.identity.proof import place_of
from arcbridge.identity.refusal import TokenRefused
from arcbridge.identity.strict_json import parse_object
from arcbridge.refusals import RefusalRule
from arcbridge.tasks import TaskSet
from arcbridge.units import duration

MAX_TOKEN = 64 * 1024
"""Characters of a token. Entra tokens with 200 groups have 12 KiB; a head of 64 KiB is what the proxy accepts."""
MAX_HEADER = 8 * 1024
LEEWAY = 10.0
"""Seconds by which `iat` may lie ahead of our clock. Few, because a revocation takes effect by the time of issue."""
NOT_BEFORE_LEEWAY = 60.0
"""Seconds by which `nbf` may lie ahead: kube-apiserver's. For `exp` there are none, as in kube-apiserver."""
MAX_LIFETIME = 400 * 86400.0
"""Seconds: the largest `Acceptance.max_lifetime`, a year and some days. Revocations are kept for as long."""
DEFAULT_LIFETIME = 48 * 3600.0
"""Seconds from `iat` to `exp` that a token may have unless the operator says otherwise. Of the issuers in
docs/security.md#what-each-issuer-can-bind the longest default is 28 hours (Entra ID with continuous access evaluation),
then 24 (Dex). A longer life mostly is a mistake of the issuer, and gives a thief of the token as much time."""
MIN_LIFETIME = 60.0
"""Seconds: the smallest `Acceptance.max_lifetime`; GitLab's shortest tokens live for five minutes."""
TOKEN_TYPES = frozenset({"jwt", "at+jwt"})
"""What `typ` may say (RFC 7519 §5.1, RFC 9068 §2.1), in lower case and without `application/`. It may be absent,
because Kubernetes and Dex give none. It is a list of what is accepted and not of what is refused (`logout+jwt`,
`dpop+jwt`, `arcbridge-proof+jwt` and types to come): JWTs of other purposes can have the same issuer, audience and
subject."""
CACHE_TIME = 60.0
CACHE_SIZE = 4096
LOOP_COST = 5_000
"""Units of cost (`identity.cel`) that a token's expressions may spend in the event loop: 5 ms. Usual ones cost 50."""
LOOP_TIME = 0.02
"""Seconds that they may compute there."""
MAX_CANDIDATES = 10
"""Keys tried for a token without `kid`: bounds the signature checks one token can cost."""
ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"})
"""kube-apiserver's list. Asymmetric only: with a symmetric one, every verifier could also sign."""
_JWT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+")
"""RFC 7515 §7.1: base64url without padding, so that a signed token has one text."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What a token must be beyond what the AuthenticationConfiguration says of its issuer; the same for all issuers."""

    forbidden_audiences: frozenset[str] = frozenset()
    """Audiences that a token must not have besides its own: with one of them it is good at another door as well."""
    max_lifetime: float = DEFAULT_LIFETIME
    """Seconds from `iat` to `exp` at most. A token that is valid for longer is refused and not shortened: the operator
    sees a refusal at the first login, and would not notice a shortened lifetime."""
    actor_clients: frozenset[str] = frozenset()
    """Clients whose tokens have them as actor (`identity.actor`)."""

    def check(self, config: AuthenticationConfig) -> None:
        """Raise ConfigError, which names the setting, where no token, or none of an issuer, could be accepted."""
        if not MIN_LIFETIME <= self.max_lifetime <= MAX_LIFETIME:
            raise ConfigError(
                f"max_token_lifetime: must be from {MIN_LIFETIME:.0f} s to {MAX_LIFETIME / 86400:.0f} days"
            )
        for issuer in config.issuers:
            for audience in issuer.audiences:
                if audience in self.forbidden_audiences:
                    raise ConfigError(
                        f"forbidden_audiences: {audience!r} is an audience of {issuer.path} in the authentication "
                        "file; take it out of one of the two"
                    )


class TokenVerifier:
    """Verifies tokens of the configured issuers.

    `fetch` brings discovery documents and keys, `clock` is wall-clock unix seconds (token times), `monotonic` drives
    the caches. `close()` must be awaited at the end; it ends background fetches. Raises ConfigError when `accept` and
    `config` let no token in (`Acceptance.check`).
    """

    def __init__(
        self,
        config: AuthenticationConfig,
        fetch: Fetch,
        clock: Callable[[], float] = time.time,
        *,
        accept: Acceptance | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        algorithms: Iterable[str] = ALGORITHMS,
        groups: GroupSources | None = None,
    ) -> None:
        self.groups = groups
        """Where groups are looked up that a token does not hold; None: nowhere, such a token is refused."""
        self._accept = accept or Acceptance()
        self._accept.check(config)
        self._config = config
        self._fetch = fetch
        self._left = TaskSet()
        """The ends of key sets that are not used any more."""
        self._clock = clock
        self._monotonic = monotonic
        self._algorithms = frozenset(algorithms) & ALGORITHMS
        self._keys = {issuer.url: KeySet(issuer, fetch, monotonic) for issuer in config.issuers}
        # sha256(token) -> (identity, monotonic deadline, issuer's key generation)
        self._results: OrderedDict[bytes, tuple[Identity, float, int]] = OrderedDict()
        self._expensive = asyncio.Lock()
        self.verified = 0
        self.refused = 0
        self.refusals: Counter[str] = Counter()
        """Refused tokens by the rule that refused them."""
        self.without_groups = 0
        """Accepted tokens without the claim from which the settings take groups."""
        self.on_missing_groups: Callable[[str, str, str, bool], None] = lambda user, claim, issuer, usual: None
        """Called for each of them; `usual`: a token of this issuer has had the claim, so its name is right."""
        self._groups_claimed: set[str] = set()
        """Issuers one of whose tokens has had the claim."""

    def oldest_keys(self) -> float:
        """Return the seconds since the oldest key set was fetched; 0 before any was."""
        return max((keys.age for keys in self._keys.values() if keys.age is not None), default=0.0)

    @property
    def has_keys(self) -> bool:
        """Whether there are keys of at least one issuer, so that a token of it could be verified now."""
        return any(keys.usable for keys in self._keys.values())

    async def look_at_keys(self) -> list[tuple[str, str, bool, ArcbridgeError | None]]:
        """See to it that each issuer's keys are there, within the rules of `keys`, and say how that went.

        Returns what `key_finding` takes: the issuer's path in the file and URL, whether there are keys to verify with,
        and why the last fetch failed.
        """
        issuers = self._config.issuers
        failures = await asyncio.gather(*(self._keys[issuer.url].refresh_if_needed() for issuer in issuers))
        return [
            (issuer.path, issuer.url, self._keys[issuer.url].usable, failure)
            for issuer, failure in zip(issuers, failures, strict=True)
        ]

    @property
    def has_directories(self) -> bool:
        """Whether the settings have a directory in which groups are looked up."""
        return self.groups is not None and bool(self.groups.directories)

    def on_directory_failure(self, call: Callable[[], None]) -> None:
        """Have `call` called whenever a directory cannot be asked."""
        for directory in () if self.groups is None else self.groups.directories:
            directory.token.on_failure = call

    async def look_at_directories(self) -> list[tuple[str, bool, str, str]]:
        """See to it that each directory of the settings can be asked, as often as its delays allow, and say how.

        Returns what `directory_finding` takes: the table of the settings (`graph.NAME`), whether it can be asked
        now, and what is wrong, as code (`graph_token.Failure`) and in words; both empty where nothing is.
        """
        directories = () if self.groups is None else self.groups.directories
        failures = await asyncio.gather(*(one.look() for one in directories))
        return [
            (one.at, one.token.usable, *(failure or ("", "")))
            for one, failure in zip(directories, failures, strict=True)
        ]

    def graph_tokens(self) -> dict[str, int]:
        """Count the requests for own tokens of Microsoft Graph: `granted` and `failed`."""
        tokens = () if self.groups is None else [one.token for one in self.groups.directories]
        return {"granted": sum(one.granted for one in tokens), "failed": sum(one.failed for one in tokens)}

    def group_lookups(self) -> dict[str, int]:
        """Count the look-ups of groups that tokens did not hold: `answered`, and `failed` for want of an answer."""
        lookups = () if self.groups is None else self.groups.all_lookups
        failed = sum(one.failed for one in lookups)
        return {"answered": sum(one.asked for one in lookups) - failed, "failed": failed}

    async def verify(self, token: str) -> Identity:
        """Return the identity, or raises TokenRefused (an Unauthenticated) or IssuerUnavailable (503)."""
        try:
            identity = await self._verify(token)
        except TokenRefused as error:
            self.refused += 1
            self.refusals[error.rule] += 1
            raise
        self.verified += 1
        if identity.missing_groups_claim:
            self.without_groups += 1
            usual = identity.issuer in self._groups_claimed
            self.on_missing_groups(identity.username, identity.missing_groups_claim, identity.issuer, usual)
        else:
            self._groups_claimed.add(identity.issuer)
        return identity

    @property
    def config(self) -> AuthenticationConfig:
        """The issuers in force."""
        return self._config

    @property
    def acceptance(self) -> Acceptance:
        """What else is asked of a token now."""
        return self._accept

    def replace(self, config: AuthenticationConfig, accept: Acceptance) -> None:
        """Judge tokens by `config` and `accept` from now on; keys of issuers that stay as they were are kept.

        A token that is being verified meanwhile is verified once more. Raises ConfigError as the constructor does, and
        changes nothing then.
        """
        accept.check(config)
        kept = {issuer.url: issuer for issuer in self._config.issuers}
        keys = {}
        for issuer in config.issuers:
            before = kept.get(issuer.url)
            same = before is not None and (before.discovery_url, before.ca_pem) == (issuer.discovery_url, issuer.ca_pem)
            keys[issuer.url] = self._keys[issuer.url] if same else KeySet(issuer, self._fetch, self._monotonic)
        for url, unused in self._keys.items():
            if keys.get(url) is not unused:
                self._left.start(unused.close())
        self._config, self._accept, self._keys = config, accept, keys
        self._results.clear()
        self._groups_claimed.clear()
        if self.groups is not None:
            self.groups.forget()

    async def close(self) -> None:
        """End background fetches."""
        for keys in self._keys.values():
            await keys.close()
        if self.groups is not None:
            await self.groups.close()
        if self._left:
            await asyncio.wait(self._left)

    async def _verify(self, token: str) -> Identity:
        if len(token) > MAX_TOKEN:
            raise TokenRefused(RefusalRule.TOKEN_SIZE, f"the token is longer than {MAX_TOKEN} characters")
        if not token or not token.isascii():
            raise TokenRefused(RefusalRule.TOKEN_SHAPE, "the token is not a JWT")
        digest = hashlib.sha256(token.encode("ascii")).digest()
        known = self._known(digest)
        if known is not None:
            return known
        while True:
            config = self._config
            identity, generation = await self._check(token, digest)
            if config is self._config:
                break
        left = min(CACHE_TIME, identity.expires_at - self._clock())
        if left > 0:
            self._results[digest] = (identity, self._monotonic() + left, generation)
            while len(self._results) > CACHE_SIZE:
                self._results.popitem(last=False)
        return identity

    def _known(self, digest: bytes) -> Identity | None:
        entry = self._results.get(digest)
        if entry is None:
            return None
        identity, deadline, generation = entry
        # The wall clock is asked as well: it may have been set forward since.
        if (
            self._monotonic() >= deadline
            or self._clock() >= identity.expires_at
            or self._keys[identity.issuer].generation != generation
        ):
            del self._results[digest]
            return None
        self._results.move_to_end(digest)
        return identity

    async def _check(self, token: str, digest: bytes) -> tuple[Identity, int]:
        issuer, header, claims, generation = await self._signed(token)
        _check_kind(header, claims)
        self._check_times(claims)
        self._check_audience(issuer, claims)
        check_pointers(claims)
        if self.groups is not None:
            verify = partial(self._verify_source, issuer)
            claims = await self.groups.expand(issuer, claims, digest, verify)
        return await self._mapped(issuer, claims), generation

    async def _verify_source(self, issuer: IssuerConfig, token: str) -> dict[str, Any]:
        """Verify a JWT with a distributed claim: signed by a key of the token's issuer, for a place of ours, of now."""
        if not token or len(token) > MAX_TOKEN or not token.isascii():
            raise TokenRefused(RefusalRule.TOKEN_SHAPE, "the token is not a JWT")
        found, header, claims, _ = await self._signed(token)
        if found.url != issuer.url:
            raise TokenRefused(
                RefusalRule.CLAIMS_GROUPS_ISSUER, "the groups that were looked up are signed by another issuer"
            )
        _check_kind(header, claims)
        now = self._clock()
        expires, not_before = _number(claims, "exp", required=True), _number(claims, "nbf", required=False)
        if now >= expires or now < not_before - NOT_BEFORE_LEEWAY:
            raise TokenRefused(
                RefusalRule.CLAIMS_GROUPS_EXP, "the groups that were looked up are not of now; compare the clocks"
            )
        self._check_audience(issuer, claims)
        check_pointers(claims)
        return claims

    async def _signed(self, token: str) -> tuple[IssuerConfig, dict[str, Any], dict[str, Any], int]:
        """Return the issuer, header and claims of a token whose signature is good, and the generation of the issuer's
        keys."""
        header, payload = _parts(token)
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in self._algorithms:
            raise TokenRefused(RefusalRule.TOKEN_ALG, "the token's signature algorithm is not accepted")
        if "crit" in header:
            raise TokenRefused(RefusalRule.TOKEN_CRIT, "the token demands extensions that are not known here")
        if "enc" in header or str(header.get("cty", "")).upper() == "JWT":
            raise TokenRefused(RefusalRule.TOKEN_NESTED, "encrypted or nested tokens are not accepted")
        kid = header.get("kid")
        if kid is not None and not isinstance(kid, str):
            raise TokenRefused(RefusalRule.TOKEN_KID, "the token is not a JWT")

        issuer_url = payload.get("iss")
        issuer = self._config.issuer(issuer_url) if isinstance(issuer_url, str) else None
        if issuer is None:
            # The caller does not learn which issuers are accepted: this token may be forged.
            said = repr(issuer_url[:200]) if isinstance(issuer_url, str) else "missing"
            raise TokenRefused(
                RefusalRule.TOKEN_ISS,
                "the token comes from an issuer that is not accepted here",
                detail=f"its issuer (iss) is {said}; the authentication file does not have it",
            )
        keys = self._keys[issuer.url]
        candidates = await keys.candidates(kid, algorithm)
        if not candidates:
            raise TokenRefused(RefusalRule.TOKEN_KEY, "the token is signed with a key that its issuer does not publish")
        generation = keys.generation
        claims = None
        for candidate in candidates[:MAX_CANDIDATES]:
            try:
                claims = jwt.decode(token, candidate.key, algorithms=[algorithm], options=_SIGNATURE_ONLY)
                break
            except jwt.PyJWTError:
                continue
        if claims is None or claims != payload:
            raise TokenRefused(RefusalRule.TOKEN_SIGNATURE, "the token's signature is not valid")
        return issuer, header, claims, generation

    async def _mapped(self, issuer: IssuerConfig, claims: dict[str, Any]) -> Identity:
        """Map the claims. Expressions that cost more than the event loop may spend are evaluated in a thread."""
        clients = self._accept.actor_clients
        if issuer.expressions is None:
            return map_claims(issuer, claims, None, clients)
        from arcbridge.identity.cel.evaluation import TimeLimit
        from arcbridge.identity.cel.mapping import BudgetExceeded, CostBudget

        try:
            return map_claims(issuer, claims, CostBudget(LOOP_COST, TimeLimit(LOOP_TIME)), clients)
        except BudgetExceeded:
            # One at a time: however many such tokens come, one thread competes with the loop, for seconds at most. A
            # thread cannot be ended, so the turn is its own also where the caller leaves before it is done.
            await self._expensive.acquire()
            evaluated = asyncio.ensure_future(asyncio.to_thread(map_claims, issuer, claims, None, clients))
            evaluated.add_done_callback(self._evaluated)
            return await asyncio.shield(evaluated)

    def _evaluated(self, evaluated: asyncio.Future[Identity]) -> None:
        self._expensive.release()
        if not evaluated.cancelled():
            evaluated.exception()  # retrieved, also where the caller has left

    def _check_times(self, claims: dict[str, Any]) -> None:
        now = self._clock()
        expires, issued = _number(claims, "exp", required=True), _number(claims, "iat", required=True)
        not_before = _number(claims, "nbf", required=False)
        if now >= expires:
            raise TokenRefused(RefusalRule.TOKEN_EXP, "the token has expired; log in again")
        if now < max(issued - LEEWAY, not_before - NOT_BEFORE_LEEWAY):
            raise TokenRefused(RefusalRule.TOKEN_NBF, "the token is not valid yet; compare the clocks")
        if expires - issued > self._accept.max_lifetime:
            raise TokenRefused(
                RefusalRule.TOKEN_LIFE,
                f"the token is valid for more than {duration(self._accept.max_lifetime)}; have a shorter one issued, "
                "or ask the operator about max_token_lifetime",
            )

    def _check_audience(self, issuer: IssuerConfig, claims: dict[str, Any]) -> None:
        audience = claims.get("aud")
        named = [audience] if isinstance(audience, str) else audience
        if not isinstance(named, list) or not all(isinstance(item, str) for item in named):
            named = None
        places = {place_of(item) for item in named or ()}
        if not places & set(issuer.audiences):
            wanted = ", ".join(issuer.audiences)
            found = "has no audience (aud) that can be read"
            if named is not None:
                found = f"is for audience {', '.join(named)[:200]!r}"
            raise TokenRefused(
                RefusalRule.TOKEN_AUD, "the token is not meant for this place (audience)", wanted=wanted,
                detail=f"it {found}; {issuer.path} wants {wanted!r}",
            )  # fmt: skip
        if places & self._accept.forbidden_audiences:
            raise TokenRefused(
                RefusalRule.TOKEN_AUD_FORBIDDEN,
                "the token is also meant for another place (audience), which could use it here; have one issued for "
                "this place alone",
            )


# PyJWT's own clock cannot be replaced, so times, audience and issuer are checked here.
_SIGNATURE_ONLY: Any = {f"verify_{claim}": False for claim in ("exp", "nbf", "iat", "aud", "iss", "sub", "jti")}
_SIGNATURE_ONLY["verify_signature"] = True


def _check_kind(header: dict[str, Any], claims: dict[str, Any]) -> None:
    """Refuse what the issuer signed for another purpose than to say who may come in."""
    kind = header.get("typ")
    if kind is not None and (not isinstance(kind, str) or kind.lower().removeprefix("application/") not in TOKEN_TYPES):
        raise TokenRefused(RefusalRule.TOKEN_TYP, "this is not an access token or id token (typ)")
    # Issuers may send logout tokens without a type of their own (OpenID Connect Back-Channel Logout 1.0 §2.4); every
    # security event token has `events` (RFC 8417 §2.2), and no other token has.
    if "events" in claims:
        raise TokenRefused(RefusalRule.TOKEN_EVENTS, "this is not an access token or id token (events)")
    if not all(isinstance(claims.get(name), str | None) for name in ("nonce", "at_hash")):
        raise TokenRefused(RefusalRule.TOKEN_CLAIMS, "the token's nonce or at_hash is no text")


_TIMES: Final = {"exp": RefusalRule.TOKEN_EXP, "iat": RefusalRule.TOKEN_IAT, "nbf": RefusalRule.TOKEN_NBF}


def _number(claims: dict[str, Any], name: str, *, required: bool) -> float:
    value: Any = claims.get(name)
    if value is None and not required:
        return 0.0
    # A larger integer has no exact double, and one of 400 digits none at all.
    small = isinstance(value, float) or (type(value) is int and value.bit_length() <= 53)
    if not isinstance(value, int | float) or not small or not math.isfinite(value) or value < 0:
        raise TokenRefused(_TIMES[name], "the token's times are missing or malformed")
    return float(value)


def _parts(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    match = _JWT.fullmatch(token)
    if match is None or len(match[1]) > MAX_HEADER:
        raise TokenRefused(RefusalRule.TOKEN_SHAPE, "the token is not a signed JWT")
    return _segment(match[1]), _segment(match[2])


def _segment(text: str) -> dict[str, Any]:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        return parse_object(raw)
    except ValueError as error:
        raise TokenRefused(RefusalRule.TOKEN_SHAPE, "the token is not a signed JWT") from error

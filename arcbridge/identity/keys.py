"""The public keys of one issuer: discovery, JWKS, and when to fetch again.

Rules, in the order they are applied (times are seconds of a monotonic clock that is passed in):

1. A set is fresh for `min(Cache-Control max-age, 1 h)`, at least 60 s. Older than that, it is fetched again in the
   background while callers go on with the old one.
2. A `kid` that the set lacks causes at most one fetch per 30 s, for all callers together (single flight): a storm of
   made-up ids must not become a storm on the issuer.
3. A fetch that fails leaves the last good set in use, for 24 h at most; then everything is refused. Whether there is a
   `kid` that it lacks is not known meanwhile.
4. Failed fetches are 2 s apart at least, doubling up to 30 s, so that an issuer that is down is not hammered and an
   issuer that is back is noticed.
5. The discovery document's `issuer` must equal the configured url exactly (OpenID Connect Discovery 1.0 §4.3).

A key is used only if it can be: RSA of 2048 to 8192 bits with an exponent below 2^32, P-256/384/521; `use`, `key_ops`
and `alg`, where given and not empty, must allow it, and `issuer`, which Entra ID gives, must be the configured one
(Microsoft, "Access tokens", validate the signing key issuer): one document has the keys of several tenants there. A set
in which other keys are broken is still good for the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from arcbridge.errors import ArcbridgeError, Unreachable, WrongDocument
from arcbridge.identity.authentication import IssuerConfig
from arcbridge.identity.fetch import Fetch
from arcbridge.identity.refusal import IssuerUnavailable
from arcbridge.tasks import cancel_and_wait
from arcbridge.untrusted_json import read_json

MAX_FRESH = 3600.0
MIN_FRESH = 60.0
"""Seconds: the most and the least for which a set is fresh, whatever its Cache-Control says (rule 1)."""
UNKNOWN_KEY_INTERVAL = 30.0
"""Seconds between two fetches for a `kid` that the set lacks (rule 2)."""
LAST_GOOD = 24 * 3600.0
"""Seconds for which a set is used that cannot be fetched again (rule 3)."""
RETRY_FIRST = 2.0
RETRY_MAX = 30.0
"""Seconds from a fetch that failed to the next: the first time, and at most (rule 4)."""
MAX_KEYS = 100
"""Keys of one set; issuers have two or three."""

_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """One public key and the algorithms that the key allows, whatever a token says."""

    kid: str | None
    key: Any
    algorithms: tuple[str, ...]


class KeySet:
    """The keys of one issuer, fetched when needed; `close()` ends a background fetch."""

    def __init__(self, issuer: IssuerConfig, fetch: Fetch, clock: Callable[[], float]) -> None:
        self._issuer = issuer
        self._fetch = fetch
        self._clock = clock
        self._keys: tuple[VerificationKey, ...] = ()
        self._fetched_at: float | None = None
        self._fresh_until = 0.0
        self._failed_at: float | None = None
        self._retry_delay = RETRY_FIRST
        self._unknown_kid_at: float | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self.failure: ArcbridgeError | None = None
        """Why the last fetch failed; None where it did not, and before the first."""
        self.generation = 0
        """Counts sets that differ from the one before: results verified under an older one are void."""

    @property
    def age(self) -> float | None:
        """Seconds since the set in use was fetched; None before the first."""
        return None if self._fetched_at is None else self._clock() - self._fetched_at

    @property
    def usable(self) -> bool:
        """Whether there are keys to verify with."""
        return self._fetched_at is not None and self._clock() - self._fetched_at <= LAST_GOOD

    async def refresh_if_needed(self) -> ArcbridgeError | None:
        """Fetch the keys where they are missing, stale, or failed to come the last time; return `failure`.

        It keeps to the rules above: an issuer is asked no more often for being watched. A cancelled call leaves the
        shared fetch running.
        """
        now = self._clock()
        wanted = self._failed_at is not None or self._fetched_at is None or now >= self._fresh_until
        if wanted and (self._may_retry(now) or self._is_refreshing):
            await asyncio.wait([self._start_refresh()])
        return self.failure

    async def candidates(self, kid: str | None, algorithm: str) -> list[VerificationKey]:
        """Return the keys that may have signed a token with this header; empty when there is none.

        With a `kid` only keys of that id, without one every key that allows the algorithm. Raises
        IssuerUnavailable when no usable set is at hand, or it lacks the `kid` and the last fetch failed. A cancelled
        call leaves the shared fetch running.
        """
        now = self._clock()
        if not self.usable:
            self._keys = ()
            await self._refresh_now(now)
        elif now >= self._fresh_until and self._may_retry(now):
            self._start_refresh()
        found = self._matching(kid, algorithm)
        if not found and kid is not None and not self._has(kid):
            if self._may_fetch_for_unknown_kid(now):
                self._unknown_kid_at = now
                await asyncio.wait([self._start_refresh()])
                found = self._matching(kid, algorithm)
            if not found and self.failure is not None:  # the issuer may have published it since
                raise _unavailable()
        return found

    async def close(self) -> None:
        """End a fetch that is under way."""
        task, self._refreshing = self._refreshing, None
        if task is not None:
            await cancel_and_wait(task)

    # -- inside -----------------------------------------------------------------------------------------------

    @property
    def _is_refreshing(self) -> bool:
        return self._refreshing is not None and not self._refreshing.done()

    def _has(self, kid: str) -> bool:
        return any(key.kid == kid for key in self._keys)

    def _matching(self, kid: str | None, algorithm: str) -> list[VerificationKey]:
        return [k for k in self._keys if algorithm in k.algorithms and (kid is None or k.kid == kid)]

    def _may_retry(self, now: float) -> bool:
        return self._failed_at is None or now - self._failed_at >= self._retry_delay

    def _may_fetch_for_unknown_kid(self, now: float) -> bool:
        if self._is_refreshing:
            return True  # joins the fetch that is under way, costs the issuer nothing
        recent = self._fetched_at is not None and now - self._fetched_at < 1.0
        return not recent and (self._unknown_kid_at is None or now - self._unknown_kid_at >= UNKNOWN_KEY_INTERVAL)

    async def _refresh_now(self, now: float) -> None:
        if self._is_refreshing or self._may_retry(now):
            await asyncio.wait([self._start_refresh()])
        if not self.usable:
            raise _unavailable()

    def _start_refresh(self) -> asyncio.Task[None]:
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh(), name="jwks-refresh")
        return self._refreshing

    async def _refresh(self) -> None:
        try:
            keys, max_age = await self._load()
        except ArcbridgeError as error:
            now = self._clock()
            self.failure = error
            self._retry_delay = RETRY_FIRST if self._failed_at is None else min(self._retry_delay * 2, RETRY_MAX)
            self._failed_at = now
            return
        now = self._clock()
        if [(k.kid, k.key) for k in keys] != [(k.kid, k.key) for k in self._keys]:
            self.generation += 1
        self._keys = keys
        self._fetched_at = now
        self._failed_at = self.failure = None
        self._retry_delay = RETRY_FIRST
        fresh = MAX_FRESH if max_age is None else min(max_age, MAX_FRESH)
        self._fresh_until = now + max(fresh, MIN_FRESH)

    async def _load(self) -> tuple[tuple[VerificationKey, ...], float | None]:
        issuer = self._issuer
        url = issuer.discovery_url or issuer.url.rstrip("/") + "/.well-known/openid-configuration"
        discovery = _json_object((await self._fetch(url, issuer.ca_pem)).body)
        if discovery.get("issuer") != issuer.url:
            raise WrongDocument(f"{issuer.path}: the discovery document is for another issuer")
        jwks_uri = discovery.get("jwks_uri")
        if not isinstance(jwks_uri, str) or not jwks_uri.startswith("https://"):
            raise WrongDocument(f"{issuer.path}: the discovery document has no https jwks_uri")
        document = await self._fetch(jwks_uri, issuer.ca_pem)
        keys = parse_keys(_json_object(document.body), issuer.url)
        if not keys:
            raise WrongDocument(f"{issuer.path}: the issuer's key set holds no usable key")
        return keys, document.max_age


def _unavailable() -> IssuerUnavailable:
    return IssuerUnavailable("the identity provider's keys cannot be fetched right now; try again shortly")


def parse_keys(document: Mapping[str, Any], issuer: str = "") -> tuple[VerificationKey, ...]:
    """Return the usable keys of a JWKS (RFC 7517 §5); broken, weak, symmetric and encryption keys are left out, and so
    are those of another issuer than the URL `issuer` (empty: of any)."""
    entries = document.get("keys")
    if not isinstance(entries, list):
        return ()
    read = (_key(entry) for entry in entries[:MAX_KEYS] if isinstance(entry, dict) and _is_of(entry, issuer))
    return tuple(key for key in read if key is not None)


def _is_of(entry: dict[str, Any], issuer: str) -> bool:
    """Return whether a key is one of an issuer. `{tenantid}` in the key's stands for the tenant in the issuer's URL."""
    key_issuer = entry.get("issuer")
    if key_issuer is None or not issuer:
        return True
    if not isinstance(key_issuer, str):
        return False
    before, template, after = key_issuer.partition("{tenantid}")
    if not template:
        return key_issuer == issuer
    tenant = issuer[len(before) : len(issuer) - len(after)]
    return issuer == f"{before}{tenant}{after}" and bool(tenant) and "/" not in tenant


def _key(entry: dict[str, Any]) -> VerificationKey | None:
    if entry.get("kty") not in ("RSA", "EC") or (entry.get("use") or "sig") != "sig":
        return None
    operations = entry.get("key_ops")
    if operations is not None and (not isinstance(operations, list) or "verify" not in operations):
        return None
    kid = entry.get("kid")
    if kid is not None and not isinstance(kid, str):
        return None
    public = {name: value for name, value in entry.items() if name in ("kty", "n", "e", "crv", "x", "y")}
    try:
        key = jwt.PyJWK(public, algorithm=_default_algorithm(entry)).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    # An exponent as long as the key makes each token cost a hundred times as much (docs/threats.md#J35).
    if isinstance(key, rsa.RSAPublicKey) and 2048 <= key.key_size <= 8192 and key.public_numbers().e < 1 << 32:
        allowed: tuple[str, ...] = _RSA
    elif isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        allowed = (_CURVES[key.curve.name],)
    else:
        return None
    if entry.get("alg"):
        allowed = tuple(name for name in allowed if name == entry["alg"])
    return VerificationKey(kid, key, allowed) if allowed else None


def _default_algorithm(entry: dict[str, Any]) -> str:
    """Return the name by which PyJWK picks its parser; what the key may verify is decided from the key itself."""
    if entry["kty"] == "RSA":
        return "RS256"
    return {"P-384": "ES384", "P-521": "ES512"}.get(str(entry.get("crv")), "ES256")


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        document = read_json(body.decode())  # a byte order mark is an error, as in kube-apiserver
    except ValueError as error:
        raise Unreachable("the identity provider's answer is not JSON") from error
    if not isinstance(document, dict):
        raise Unreachable("the identity provider's answer is not a JSON object")
    return document

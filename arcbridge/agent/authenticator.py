"""Decides who a session speaks for: by an OIDC token verified here, or by a service-account token that the API server
reviews.

In token mode (`bearer`) the caller's own token is shown to the API server in a SelfSubjectReview, over a connection
without any credential of the agent's; the answer is who the caller is. Invariant: what the token itself says is
believed only after that, and only to end the session in time, to tell tokens from before a revocation, and to refuse a
token that is bound to a key and comes without the proof of that key.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Final

from arcbridge.agent.kube.apiserver import AnswerFailed, ApiServer
from arcbridge.agent.kube.caller import token_digest
from arcbridge.errors import PermissionRefused, Unauthenticated, Unreachable
from arcbridge.identity.actor import actor_of
from arcbridge.identity.claims import Identity
from arcbridge.identity.proof import NO_PEER, Peer, ProofChecker, ProofRefused, binding, decode_object
from arcbridge.identity.verifier import LEEWAY, TokenVerifier
from arcbridge.wire.records import RESTRICTED, Auth

if TYPE_CHECKING:
    from arcbridge.agent.restrictions.session_restrictions import SessionRestrictions

REVIEW = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
DEADLINE = 8.0
"""Seconds for the review; HELLO and AUTH together have 10."""
UNKNOWN_LIFE = 3600.0
"""Seconds that a session lasts whose token names no expiry; then the token is reviewed again."""
MAX_LIFE = 24 * 3600.0
"""Seconds after which any bearer token is reviewed again: it may have been revoked at the API server."""
_B64TOKEN: Final = re.compile(r"[A-Za-z0-9\-._~+/]+=*", re.ASCII)
"""The syntax of a bearer token (RFC 6750 §2.1), which has no braces and no quotes. Older API servers also take a JWS in
JSON serialisation (RFC 7515 §7.2), in which a caller can place a second payload that only this agent would read."""


@dataclass(frozen=True, slots=True)
class Authenticated:
    """An identity, and whether the caller's own token goes on in each request."""

    identity: Identity
    token_mode: bool
    token_digest: bytes = b""
    """Of the token that was reviewed, in token mode (`kube.caller.token_digest`)."""
    proved_key: str = ""
    """Thumbprint of the key to which the token is bound, as the caller has proved; empty: the token is not bound."""
    restrictions: SessionRestrictions | None = None
    """What the session gives up of the identity's rights; None: nothing."""


class UnprovedToken(Unauthenticated):
    """A token that is good, whose key the caller has not shown to hold; `identity` is the token's."""

    def __init__(self, identity: Identity, error: ProofRefused) -> None:
        super().__init__(error.message)
        self.identity = identity
        self.refusal = error.refusal


@dataclass(eq=False, repr=False)
class Authenticator:
    """Authenticates AUTH. `verifier` None: no OIDC here. `token_mode` False: no service-account tokens."""

    api: ApiServer
    verifier: TokenVerifier | None
    proofs: ProofChecker
    _: KW_ONLY
    token_mode: bool
    """Whether sessions may carry the caller's own ServiceAccount token."""
    clock: Callable[[], float] = time.time

    async def authenticate(self, auth: Auth, peer: Peer = NO_PEER) -> Authenticated:
        """Answer who an AUTH speaks for that came over a connection in which this agent showed itself as `peer`.

        Raises Unauthenticated (UnprovedToken, where the token is good), PermissionRefused, or Unreachable (may succeed
        later).
        """
        kind = auth.kind.removeprefix(RESTRICTED)
        restrictions = _restrictions(auth) if kind != auth.kind or auth.restrictions else None
        if kind == "oidc":
            if self.verifier is None:
                raise PermissionRefused("this cluster takes service-account tokens only: use --token")
            identity, digest = await self.verifier.verify(auth.token), b""
        elif kind == "bearer":
            if not self.token_mode:
                raise PermissionRefused("this cluster takes no service-account tokens: log in instead of using --token")
            identity, digest = await self._review(auth.token), token_digest(auth.token.encode())
        else:
            raise Unauthenticated("this kind of token is not known here: the client may be newer than the agent")
        try:
            proved = self.proofs.check(identity.binding, auth.token, auth.proof, peer)
        except ProofRefused as error:
            raise UnprovedToken(identity, error) from error
        return Authenticated(identity, kind == "bearer", digest, proved, restrictions)

    async def review_in_session(self, token: str, proved_key: str) -> Identity:
        """Answer whose a token is that a request carries in token mode, in a session that proved the key `proved_key`.

        No request carries a proof; a bound token counts where its key is the session's. Raises as `authenticate`.
        """
        identity = await self._review(token)
        try:
            self.proofs.check_within(identity.binding, proved_key)
        except ProofRefused as error:
            raise UnprovedToken(identity, error) from error
        return identity

    async def _review(self, token: str) -> Identity:
        if _B64TOKEN.fullmatch(token) is None:
            raise Unauthenticated("the token is malformed")
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        try:
            async with asyncio.timeout(DEADLINE):
                code, answer = await self.api.ask("POST", REVIEW, review, token=token)
            if code in (401, 403):
                raise Unauthenticated("the cluster does not accept the token")
            if code != 201:
                raise Unreachable(f"the API server did not review the token (code {code})")
            return self._identity(answer["status"]["userInfo"], token)
        except (AnswerFailed, TimeoutError, KeyError, TypeError, AttributeError) as error:
            # `from None`: what is chained could hold the answer, or the token.
            kind = type(error).__name__
            raise Unreachable(f"the token cannot be reviewed: the API server does not answer ({kind})") from None

    def _identity(self, info: dict[str, Any], token: str) -> Identity:
        name = info["username"]
        if not isinstance(name, str) or not name or name == "system:anonymous":
            raise Unauthenticated("the cluster does not know the token")
        groups = tuple(str(group) for group in info.get("groups") or ())
        uid = str(info.get("uid") or "")
        now = self.clock()
        claims = _claims(token)  # the API server has accepted the token, and so its signature
        expires = min(_time(claims.get("exp")) or now + UNKNOWN_LIFE, now + MAX_LIFE)
        issued = _time(claims.get("iat"))
        clients = () if self.verifier is None else self.verifier.acceptance.actor_clients
        return Identity(
            name,
            uid,
            groups,
            f"bearer#{name}#{uid}",
            "cluster",
            expires,
            issued_at=issued if issued <= now + LEEWAY else 0.0,
            binding=binding(claims),
            actor=actor_of(claims, str(claims.get("iss")), clients),
        )


def _restrictions(auth: Auth) -> SessionRestrictions:
    """Return the restrictions of an AUTH. Raises PermissionRefused for those that are not understood, and
    Unauthenticated for a kind that older agents would serve without them."""
    from arcbridge.agent.restrictions.session_restrictions import SessionRestrictions

    if not auth.kind.startswith(RESTRICTED):
        raise Unauthenticated("restrictions come with a kind of token that does not announce them")
    return SessionRestrictions.read(auth.restrictions)


def _claims(token: str) -> dict[str, Any]:
    """Return the claims of a JWT, which the API server has just accepted; an opaque token has none.

    Raises Unauthenticated for a token of three parts whose payload cannot be read: it would pass for unbound.
    """
    parts = token.split(".")
    if len(parts) != 3:
        return {}
    try:
        return decode_object(parts[1])
    except ValueError:
        raise Unauthenticated("the token looks like a JWT, and its claims cannot be read") from None


def _time(value: object) -> float:
    """Return the unix seconds of a claim; 0 for a token that does not say."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**53
    return float(value) if good else 0.0  # type: ignore[arg-type]

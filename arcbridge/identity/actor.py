"""Reads which program acts for the user of a token, and decides whom a list of such actors means.

The issuer names the actor in `act`, or it issued the token to a client that the settings name as one
(`actor_clients`). Of actors that called each other the outermost is the present one; those within it are history, and
no decision reads them (RFC 8693 §4.1). Invariant: a token has one actor or none, and an `act` that cannot be read is
refused: passed over, it would leave a token of the user alone, with more rights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from arcbridge.identity.names import is_plain
from arcbridge.identity.refusal import TokenRefused
from arcbridge.refusals import RefusalRule

MAX_CHAIN: Final = 10
"""Actors of one token, the present one and those before it: each would be an exchange of tokens."""
ANY: Final = "*"
"""In a list of actors: every actor."""
_CLIENTS: Final = ("client_id", "azp", "appid", "cid")
"""Claims that name the client to which a token was issued: RFC 9068 §2.2, OpenID Connect Core §2, Entra ID's tokens of
version 1, Okta."""


def actor_of(claims: Mapping[str, Any], issuer: str, clients: Collection[str] = ()) -> str:
    """Return the name of the actor of a token of `issuer`; empty where the token is the user's alone.

    The name is `sub` of `act`, or its `client_id` where it has no `sub`; of an actor of another issuer it is
    `ISSUER#NAME`. Without `act` it is the id of the client, where that is one of `clients`; a token that names no
    client is its audience's. Raises TokenRefused.
    """
    if "act" not in claims:
        return _client_of(claims, clients)
    act = claims["act"]
    _check_chain(act)
    name, of = act.get("sub", act.get("client_id")), act.get("iss", issuer)
    if not isinstance(name, str) or not isinstance(of, str):
        raise _refused("has no name (`sub`, or `client_id`) or an issuer (`iss`) that is no text")
    name = name if of == issuer else f"{of}#{name}"
    if not is_plain(name) or name == ANY:
        raise _refused("has a name with characters or a length that are refused")
    return name


def admits(actors: Collection[str], actor: str) -> bool:
    """Return whether what is for these `actors` is for a token with this `actor` (empty: with none).

    What names no actor is for the user alone. So no program gets what its user has by acting for that user, until the
    operator has written that it may.
    """
    return (actor in actors or ANY in actors) if actor else not actors


def _client_of(claims: Mapping[str, Any], clients: Collection[str]) -> str:
    if not clients:
        return ""
    unnamed = True
    for claim in _CLIENTS:
        value = claims.get(claim)
        if not isinstance(value, str | None):
            raise TokenRefused(
                RefusalRule.CLAIMS_ACT,
                "the token names its client in a way that cannot be read",
                detail=f"claim {claim!r} is no text, and actor_clients compares it",
            )
        if value is not None and value in clients:
            return value
        unnamed = unnamed and value is None
    # An id token's audience is its client, and one with a single audience needs no `azp` (OpenID Connect Core §2).
    audiences = claims.get("aud") if unnamed else None
    found = audiences if isinstance(audiences, list) else [audiences]
    return next((one for one in found if isinstance(one, str) and one in clients), "")


def _check_chain(act: object) -> None:
    """Refuse what is no object, at whichever depth, and what has too many of them; reads no further."""
    for _ in range(MAX_CHAIN):
        if not isinstance(act, Mapping):
            raise _refused("is no object")
        if "act" not in act:
            return
        act = act["act"]
    raise _refused(f"has more than {MAX_CHAIN} actors within each other")


def _refused(what: str) -> TokenRefused:
    return TokenRefused(
        RefusalRule.CLAIMS_ACT,
        "the token says in a way that cannot be read who acts for its user; ask the operator of its issuer",
        detail=f"claim 'act' {what} (RFC 8693 §4.1)",
    )

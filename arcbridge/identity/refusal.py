"""Says why a token was refused: a class for the caller, the rule and what it was about for the log.

A message tells only what helps an honest caller ("expired", "not for this cluster"), never a value of the token. The
`rule` is a constant of this package and safe to log and to count. `detail` is for our own log and names the claim or
the audience on both sides. `wanted` is the audience, or the name of the claim, that this place wants: it is told to the
token's holder, whose token an issuer of ours has signed, and to no other peer (docs/security.md#what-a-refusal-tells).

`tell` puts rule and `wanted` behind the message, in a form that `told_in` reads at the other end: a client then says
the sentence itself, and shows no text of a peer but that name, quoted and clean.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from arcbridge.errors import ArcbridgeError, Unauthenticated, Unreachable

RULES: Final = (
    "token.size",
    "token.shape",
    "token.alg",
    "token.crit",
    "token.nested",
    "token.kid",
    "token.iss",
    "token.key",
    "token.signature",
    "token.typ",
    "token.events",
    "token.exp",
    "token.nbf",
    "token.iat",
    "token.life",
    "token.aud",
    "token.aud.forbidden",
    "claims.rule",
    "claims.sub",
    "claims.username",
    "claims.email_verified",
    "claims.uid",
    "claims.groups",
    "claims.groups.overage",
    "claims.groups.many",
    "claims.elsewhere",
    "claims.expression",
    "claims.cost",
    "user.rule",
)
"""The rules that are counted by themselves; the others are counted as `other`."""
ISSUER_KEYS: Final = "issuer.keys"
"""The rule of `IssuerUnavailable`."""
MAX_WANTED: Final = 200
"""Characters of an audience or a claim's name that are told."""

_WANTED: Final = rf"[!#-\[\]-~][ !#-\[\]-~]{{0,{MAX_WANTED - 1}}}"
"""Printable ASCII without quotes and backslashes, so that it cannot end the quotation."""
_TELLABLE: Final = re.compile(_WANTED)
_NAMED: Final = re.compile(rf' \(((?:token|claims|user|issuer)\.[a-z_.]{{1,40}})(?: wants "({_WANTED})")?\)\Z')


class TokenRefused(Unauthenticated):
    """A token was refused; `rule` names the check that failed (a constant of this package, for logs and counters)."""

    def __init__(self, rule: str, message: str, *, wanted: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.rule = rule
        self.wanted = wanted
        """The audience, or the claim's name, that this place wants; empty where it is not told."""
        self.detail = detail
        """For our log: which audience or claim, and what it is there."""


class IssuerUnavailable(Unreachable):
    """The issuer's keys can be neither fetched nor taken from memory; the caller may try again (503, not 401)."""

    rule = ISSUER_KEYS
    wanted = detail = ""


GROUPS_UNAVAILABLE = "the groups of this login cannot be looked up now: "
"""How the sentence of a `GroupsUnavailable` begins, by which a client knows it."""


class GroupsUnavailable(IssuerUnavailable):
    """The token says that its groups are elsewhere, and that place does not answer: no identity with fewer groups is
    made of it. The caller may try again (503)."""

    rule = ""

    def __init__(self, why: str, *, detail: str = "", asked: bool = True) -> None:
        """`why`: for the caller, who is told nothing of settings, files and applications; `detail`: for our log;
        `asked`: whether that place was asked. Where it was not, the next caller costs it nothing either."""
        super().__init__(f"{GROUPS_UNAVAILABLE}{why}; try again shortly")
        self.why = why
        self.detail = detail
        self.asked = asked


class Told(NamedTuple):
    """What a peer has told of a refused token."""

    rule: str
    wanted: str


def tell(error: ArcbridgeError, more: str = "") -> str:
    """Return the message of a refusal for the peer, with `more` words, then rule and `wanted` where there are any to
    tell."""
    rule, wanted = getattr(error, "rule", ""), getattr(error, "wanted", "")
    if not rule or rule.startswith("proof."):
        return error.message + more
    name = f' wants "{wanted}"' if _TELLABLE.fullmatch(wanted) else ""
    return f"{error.message}{more} ({rule}{name})"


def told_in(message: str) -> Told | None:
    """Return what a message of another end tells, in the form of `tell`; None where it tells nothing."""
    found = _NAMED.search(message)
    return None if found is None else Told(found[1], found[2] or "")

"""Says why a token was refused: a class for the caller, the rule and what it was about for the log.

A message tells only what helps an honest caller ("expired", "not for this cluster"), never a value of the token. The
rule is safe to log and to count. `detail` is for our own log and names the claim or the audience on both sides.
`wanted` is the audience, or the name of the claim, that this place wants: it is sent to the token's holder, whose token
an issuer of ours has signed, and to no other peer (docs/security.md#what-a-refusal-tells).
"""

from __future__ import annotations

from typing import Final

from arcbridge.errors import Unauthenticated, Unreachable
from arcbridge.refusals import Refusal, RefusalRule, read_refusal

RULES: Final = tuple(rule for rule in RefusalRule if rule.family in ("token", "claims", "user"))
"""The rules by which a token is refused, for counters."""


class TokenRefused(Unauthenticated):
    """A token was refused; `rule` names the check that failed."""

    def __init__(self, rule: RefusalRule, message: str, *, wanted: str = "", detail: str = "") -> None:
        """`wanted`: the audience, or the claim's name, that this place wants; empty where it is not sent.
        `detail`: which audience or claim it was about, and what it is there."""
        super().__init__(message)
        self.refusal = read_refusal(rule, wanted)
        self.detail = detail

    @property
    def rule(self) -> RefusalRule:
        return self.refusal.rule


class IssuerUnavailable(Unreachable):
    """The issuer's keys can be neither fetched nor taken from memory; the caller may try again (503, not 401)."""

    refusal = Refusal(RefusalRule.ISSUER_KEYS)


class GroupsUnavailable(IssuerUnavailable):
    """The token says that its groups are elsewhere, and that place does not answer: no identity with fewer groups is
    made of it. The caller may try again (503)."""

    refusal = Refusal(RefusalRule.GROUPS_UNAVAILABLE)

    def __init__(self, why: str, *, detail: str = "", asked: bool = True) -> None:
        """`why`: for the caller, who is told nothing of settings, files and applications; `detail`: for our log;
        `asked`: whether that place was asked. Where it was not, the next caller costs it nothing either."""
        super().__init__(f"the groups of this login cannot be looked up now: {why}; try again shortly")
        self.why = why
        self.detail = detail
        self.asked = asked

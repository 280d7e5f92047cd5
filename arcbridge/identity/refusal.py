"""Says why a token was refused: a class for the caller, the rule for the log.

The caller learns only what helps an honest one ("expired", "not for this cluster"); never a claim of the token,
never which of two close rules it was. `rule` is a short constant such as `issuer.unknown` and is safe to log and
to count: it comes from this package, never from the token.
"""

from __future__ import annotations

from arcbridge.errors import Unauthenticated, Unreachable


class TokenRefused(Unauthenticated):
    """A token was refused; `rule` names the check that failed (a constant of this package, for logs and counters)."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


class IssuerUnavailable(Unreachable):
    """The issuer's keys can be neither fetched nor taken from memory; the caller may try again (503, not 401)."""


GROUPS_UNAVAILABLE = "the groups of this login cannot be looked up now: "
"""How the sentence of a `GroupsUnavailable` begins, by which a client knows it."""


class GroupsUnavailable(IssuerUnavailable):
    """The token says that its groups are elsewhere, and that place does not answer: no identity with fewer groups is
    made of it. The caller may try again (503)."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{GROUPS_UNAVAILABLE}{why}; try again shortly")
        self.why = why
